"""Write docs/api.md from the docstrings of every public name.

python tools/api_page.py
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quantkit
from quantkit import _load, checkpoint, nn, observers, onnx

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
HEAD = """# API

Every public name, from its docstring. `python tools/api_page.py` writes this page.
The operators have a page of their own: [operators.md](operators.md).
"""
# Their names have a section each, but those that quantkit itself has.
MODULES = (nn, observers, checkpoint, onnx)
# Of a mapping, which has no docstring.
SCHEMES = """The schemes of :func:`quantize`: a read-only mapping from each name to what it stands for.

All take float32 steps. docs/formats.md has their sizes, and the SQNR of a weight in each.
"""


def signature(function: Callable) -> str:
    """The call without types, which are in the source."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=bare, return_annotation=found.empty))
    return re.sub(r"<function (\w+) at \w+>", r"\1", text)


def markdown(docstring: str) -> str:
    """Google's sections as bold words and lists, rst's roles as code."""
    lines = []
    section = False
    for line in inspect.cleandoc(docstring).splitlines():
        line = re.sub(r":\w+:`([\w.]+)`|``(.*?)``", lambda m: f"`{m[1] or m[2]}`", line)
        line = re.sub(r"(?<![\w/])docs/(\w+)\.md", r"[\1.md](\1.md)", line)
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Warning|Note):", line):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and (entry := re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {names}: {entry[2]}")
        elif section and line.startswith("        "):
            lines.append("  " + line.strip())
        else:
            if line and lines and lines[-1].startswith(("- ", "  ")):
                lines.append("")  # the end of a list
            section = section and (not line or line.startswith("    "))
            lines.append(line.strip())
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str) -> str:
    value = getattr(quantkit, name)
    if value is quantkit.SCHEMES:
        rows = "\n".join(f"| `{scheme}` | {text} |" for scheme, text in value.items())
        table = f"| scheme | codes and scales |\n|---|---|\n{rows}\n"
        return f"## quantkit.{name}\n\n{markdown(SCHEMES)}\n{table}"
    if inspect.ismodule(value):
        names = ", ".join(f"`{n}`" for n in value.__all__)
        return f"## quantkit.{name}\n\n{markdown(value.__doc__)}\nIts names: {names}.\n"
    text = f"## quantkit.{name}\n\n{described(name, value)}"
    if value is quantkit.backend:
        text += f"\n{markdown(_load.Backend.__doc__ or '')}"
    return text


def described(name: str, value: object) -> str:
    """The call and the docstring; of a class its own methods, too."""
    if not callable(value):
        return f"{', '.join(f'`{v}`' for v in value)}\n"
    if isinstance(value, type) and issubclass(value, Exception):
        return markdown(value.__doc__ or "")
    text = f"```\n{name}{signature(value)}\n```\n\n{markdown(value.__doc__ or '')}"
    for method, function in vars(value).items() if inspect.isclass(value) else ():
        plain = getattr(function, "__func__", function)  # of a classmethod
        if not method.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
            call = signature(getattr(value, method) if plain is not function else plain)
            text += f"\n`.{method}{call}`: {markdown(plain.__doc__)}"
        elif not method.startswith("_") and isinstance(function, property) and function.__doc__:
            text += f"\n`.{method}`: {markdown(function.__doc__)}"
        elif method == "__init__" and function.__doc__:
            text += f"\n{markdown(function.__doc__)}"
    return text


def section(module: ModuleType) -> str:
    known = [getattr(quantkit, name) for name in quantkit.__all__]
    text = f"## {module.__name__}\n\n{markdown(module.__doc__ or '')}"
    for name in module.__all__:
        if not any((value := getattr(module, name)) is k for k in known):
            text += f"\n### {module.__name__}.{name}\n\n{described(name, value)}"
    return text


def page() -> str:
    names = (entry(name) for name in quantkit.__all__)
    return "\n".join([HEAD, *names, *map(section, MODULES)])


if __name__ == "__main__":
    PAGE.write_text(page())
