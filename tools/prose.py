"""Checks the prose of the pages: python tools/prose.py [pages]

A sentence has at most 30 words, and no word is one that only this project would understand.
"""

import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "examples/*.md", "proof/*.md")
MOST = 30
# Each with what to write instead.
INVENTED = {
    r"lent": "shared",
    r"moods?": "mode",
    r"refusals?": "error",
    r"teaching (module|function)s?": "quant_tool, reference function",
    r"for ever": "without end, or hangs",
    r"streams? past": "nontemporal store",
}
SENTENCE = re.compile(r"(?<=[.!?])[\"')*]*\s+")


def passages(text: str):
    """Each paragraph, item and cell: its line, its text, and whether it is prose."""
    kind = ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type.endswith("_open"):
            kind = token.tag
        if token.type == "inline":
            parts = ["X" if part.type == "code_inline" else part.content for part in token.children]
            line = token.map[0] + 1 if token.map else 0
            yield line, "".join(part or " " for part in parts), kind in ("p", "td")


def faults(text: str):
    for line, passage, prose in passages(text):
        for pattern, instead in INVENTED.items():
            if found := re.search(rf"\b({pattern})\b", passage, re.IGNORECASE):
                yield line, f'"{found[0]}": write {instead}'
        for sentence in SENTENCE.split(passage) if prose else ():
            if (words := len(sentence.split())) > MOST:
                yield line, f"{words} words: {sentence[:60]}…"


def main() -> None:
    pages = [Path(page) for page in sys.argv[1:]] or sorted(
        page for pattern in PAGES for page in ROOT.glob(pattern)
    )
    found = [
        f"{page.resolve().relative_to(ROOT)}:{line}: {fault}"
        for page in pages
        for line, fault in faults(page.read_text())
    ]
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
