"""The example of sentence embeddings, which needs transformers and the model."""

import re
import sys

import pytest
from test_examples import EXAMPLES, run

pytest.importorskip("transformers", reason="make loaders-test")


def test_embeddings_are_close_to_those_of_float32(minilm, tmp_path):
    text = run(sys.executable, EXAMPLES / "embeddings.py", folder=tmp_path)
    assert float(re.search(r"least cosine (\d\.\d+)", text)[1]) >= 0.98
    assert "batch 1:" in text and "batch 32:" in text
