"""Count lines of code: without blank lines, comments and docstrings.

python tools/lines.py [PATH ...]     files or folders; default: csrc, quantkit and setup.py

Prints a table by file, the total, and every line of more than 100 columns.
"""

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = [ROOT / "csrc", ROOT / "quantkit", ROOT / "setup.py"]
COLUMNS = 100
CPP = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
KINDS = (*CPP, ".py")

# Strings, numbers (1'000) and names are matched so that nothing inside them looks like a comment.
CPP_TOKEN = re.compile(
    r"""(?P<comment> //(?:\\\n|[^\n])* | /\*.*?(?:\*/|\Z) )
    | (?:u8|[uUL])?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"
    | "(?:\\.|[^"\\\n])*"
    | '(?:\\.|[^'\\\n])+'
    | \d(?:'?[\w.])*
    | [A-Za-z_]\w*""",
    re.DOTALL | re.VERBOSE,
)
SPACE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def cpp_lines(text: str) -> int:
    """Lines of C++ or CUDA that hold more than spaces and comments."""

    def kept(match: re.Match) -> str:
        comment = match["comment"]
        return match[0] if comment is None else " " + "\n" * comment.count("\n")

    return sum(bool(line.strip()) for line in CPP_TOKEN.sub(kept, text).splitlines())


def docstrings(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Begin and end, as (line, column), of every docstring."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(first := node.body[0], ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            yield (first.lineno, first.col_offset), (first.end_lineno, first.end_col_offset)


def python_lines(text: str) -> int:
    """Lines of Python that hold more than spaces, comments and docstrings."""
    # ast counts columns in bytes, tokenize in characters: the begin of a docstring has no others.
    begins = {begin: end[0] for begin, end in docstrings(ast.parse(text))}
    lines, code, inside = text.splitlines(), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and token.start in begins:
            inside = begins[token.start]  # strings that follow one another are one docstring
        if token.type == tokenize.STRING and token.start[0] <= inside:
            continue
        if token.type not in SPACE:
            code.update(range(token.start[0], token.end[0] + 1))
    return sum(bool(lines[number - 1].strip()) for number in code)


def count(path: Path) -> int:
    text = path.read_text()
    return python_lines(text) if path.suffix == ".py" else cpp_lines(text)


def long_lines(path: Path) -> list[tuple[int, int]]:
    """(line, columns) of each line that is too long."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return [(number, len(line)) for number, line in lines if len(line) > COLUMNS]


def files(paths: list[Path]) -> list[Path]:
    """The files to count, each once; a folder gives those of a known kind."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
        elif path.is_file() and path.suffix in KINDS:
            found.append(path)
        else:
            raise SystemExit(f"lines: {path}: expected a folder or a file in {', '.join(KINDS)}")
    return list(dict.fromkeys(found))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main(arguments: list[str] | None = None) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lines", description=__doc__, formatter_class=kind)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH")
    paths = files(parser.parse_args(arguments).paths or DEFAULT)
    counts = {shown(path): count(path) for path in paths}
    total = f"{len(counts)} files"
    width = max(map(len, [*counts, total]))
    for name, lines in counts.items():
        print(f"{name:{width}}  {lines:6,}")
    print(f"{total:{width}}  {sum(counts.values()):6,}")
    long = [(shown(path), *line) for path in paths for line in long_lines(path)]
    print(f"\nlines of more than {COLUMNS} columns: {len(long)}")
    for name, number, columns in long:
        print(f"{name}:{number}: {columns}")


if __name__ == "__main__":
    main()
