"""The list of planted mistakes; planting them is another matter."""

from collections import Counter

from mutants import MUTANTS
from work import ROOT


def test_each_text_is_once_in_its_file():
    texts = {m.file: (ROOT / m.file).read_text() for m in MUTANTS}
    assert not {
        m.name: texts[m.file].count(m.text) for m in MUTANTS if texts[m.file].count(m.text) != 1
    }


def test_each_name_is_one_mistakes():
    assert not [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1]
    assert all(m.text != m.becomes for m in MUTANTS)
