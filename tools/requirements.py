"""Prints requirements of pyproject.toml, one a line: python tools/requirements.py build (or an extra)."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pip brings its own
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(kind):
    """Of the build, or of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if kind == "build":
        return project["build-system"]["requires"]
    return project["project"]["optional-dependencies"][kind]


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
