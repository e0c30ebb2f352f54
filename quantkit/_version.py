"""quantkit's version and the oldest torch it runs with; setup.py reads this file too, without torch."""

__version__ = "0.2.0"
TORCH_FLOOR = (2, 10)


def release(version: str) -> tuple[int, int]:
    """(2, 10) for "2.10.0a0+b558c98"."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def floor_text() -> str:
    return ".".join(map(str, TORCH_FLOOR))
