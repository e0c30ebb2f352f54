"""What a user asks for: a scheme, and rules by the names of tensors, of arguments and a TOML file."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import _checks
from ..schemes import OF_CHECKPOINTS
from .files import CheckpointError, shown
from .layouts import SCHEMES, WeightScheme

_SIZES = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}

_BLOCKS = {"tensor": None, "channel": (1, -1)}


@dataclass(frozen=True)
class Rule:
    """Tensors whose names match one of the patterns get the scheme; None leaves them as they are."""

    match: tuple[str, ...]
    scheme: WeightScheme | None


@dataclass(frozen=True)
class Options:
    """All that decides about the bytes of a quantized checkpoint; see :func:`options`."""

    scheme: WeightScheme = SCHEMES["w8a8"]
    rules: tuple[Rule, ...] = ()
    shard_size: int | None = None
    allow_nonfinite: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Of JSON's types."""
        return {
            "scheme": self.scheme.as_dict(),
            "rules": [[list(r.match), r.scheme and r.scheme.as_dict()] for r in self.rules],
            "shard_size": self.shard_size,
            "allow_nonfinite": self.allow_nonfinite,
        }

    @staticmethod
    def of_dict(d: Mapping[str, Any]) -> Options:
        """The inverse of :meth:`as_dict`."""
        try:
            rules = tuple(
                Rule(_patterns("rules", m), None if s is None else WeightScheme(**s))
                for m, s in d["rules"]
            )
            scheme = WeightScheme(**d["scheme"])
            size, nonfinite = _size(d["shard_size"]), _nonfinite(d["allow_nonfinite"])
            return Options(scheme, rules, size, nonfinite)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"options: not as quantkit writes them: {shown(error)}") from None


def options(
    scheme: str | Mapping[str, Any] | WeightScheme | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shard_size: str | int | None = None,
    allow_nonfinite: bool = False,
) -> Options:
    """Options from arguments and a TOML file, whose keys have the names of the arguments.

    Args:
        scheme: of what no rule matches: a name of ``SCHEMES``, or a mapping with such a name as ``base``
            and fields of WeightScheme that differ. None is "w8a8".
        config: a TOML file, or what it would hold: ``scheme``, ``include``, ``exclude``, ``shard_size``,
            ``allow_nonfinite`` and ``rule``, a list of tables with ``match`` and ``scheme`` or ``skip``.
            Arguments win.
        include: patterns of tensors that get the scheme, though they are embeddings or the like.
        exclude: patterns of tensors that stay as they are.
        shard_size: bytes of an output file at most, such as "2GB"; None keeps the source's division.
        allow_nonfinite: whether NaN and infinities in a weight are no error.

    A pattern is a glob, or after "re:" a regular expression that matches from the beginning. It is tried
    on the tensor's name and on that without ".weight". The first match wins: of exclude, include, then
    the same of the file, then its rules.

    Raises:
        CheckpointError for an unknown key or name, or a value of another type.
    """
    said = _toml(config) if isinstance(config, str | Path) else dict(config or {})
    known = ("scheme", "include", "exclude", "shard_size", "allow_nonfinite", "rule")
    _known("config", said, known)
    base = _scheme(said.get("scheme", "w8a8") if scheme is None else scheme)
    rules = []
    for there in ({"exclude": exclude, "include": include}, said):
        for key, scheme_of_key in (("exclude", None), ("include", base)):
            patterns = _patterns(key, there.get(key, ()))
            rules += [Rule((pattern,), scheme_of_key) for pattern in patterns]
    tables = said.get("rule", [])
    if not isinstance(tables, list):
        raise CheckpointError(f"rule: expected tables: [[rule]], got {shown(repr(tables))}")
    for i, table in enumerate(tables, 1):
        try:
            rules.append(_rule(table))
        except CheckpointError as error:
            raise CheckpointError(f"rule {i}: {error}") from None
    size = said.get("shard_size") if shard_size is None else shard_size
    nonfinite = _nonfinite(allow_nonfinite or said.get("allow_nonfinite", False))
    return Options(base, tuple(rules), _size(size), nonfinite)


def _rule(table: Any) -> Rule:
    _known("keys", table, ("match", "scheme", "skip"))
    skip = table.get("skip", False)
    if "match" not in table or not isinstance(skip, bool) or ("scheme" in table) == skip:
        raise CheckpointError(
            f"expected match, and scheme or skip = true, got {shown(dict(table))}"
        )
    match = [table["match"]] if isinstance(table["match"], str) else table["match"]
    patterns = _patterns("match", match)
    if not patterns:
        raise CheckpointError("match: expected a pattern or more, got []")
    return Rule(patterns, None if skip else _scheme(table["scheme"]))


def _known(what: str, table: Any, keys: Sequence[str]) -> None:
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{what}: expected a table, got {shown(repr(table))}")
    for key in table:
        if key not in keys:
            raise CheckpointError(
                f"{what}: expected one of {', '.join(keys)}, got {shown(repr(key))}"
            )


def _toml(path: str | Path) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        raise CheckpointError(
            "config: Python 3.10 reads TOML with tomli: pip install tomli"
        ) from None
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8")
        said = tomllib.loads(text)
        repr(said)  # a message may show a part of it
        return said
    except OSError as error:
        reason = error.strerror
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        end = f"line {len(text.splitlines())}, the end"
        reason = str(error).replace("end of document", end)
    raise CheckpointError(f"config: {shown(path)}: {shown(reason)}")


def _scheme(given: object) -> WeightScheme:
    if isinstance(given, WeightScheme):
        return given
    changes: dict[str, Any] = {}
    if isinstance(given, Mapping):
        changes = dict(given)
        given = changes.pop("base", "w8a8")
        _known("scheme", changes, [f.name for f in fields(WeightScheme)])
    if not isinstance(given, str) or given not in SCHEMES:
        own = " or ".join(name for name, other in OF_CHECKPOINTS.items() if other == given)
        hint = f", the functions' name of {own}" if own else ""
        raise CheckpointError(
            f"scheme: expected one of {', '.join(SCHEMES)}, got {shown(repr(given))}{hint}"
        )
    if not changes:
        return SCHEMES[given]
    text = ", ".join(f"{k}={v}" for k, v in sorted(changes.items()) if k != "name")
    block = changes.get("block")
    if isinstance(block, str) and block in _BLOCKS:
        changes["block"] = _BLOCKS[block]
    elif not isinstance(block, list | tuple | None):
        raise CheckpointError(
            'scheme: block: expected "tensor", "channel" or [rows, numbers of a row], '
            f"got {shown(repr(block))}"
        )
    changes.setdefault("name", f"{given} with {text}")
    try:
        return replace(SCHEMES[given], **changes)
    except (TypeError, ValueError) as error:
        text = re.sub(r"\b(True|False)\b", lambda found: found[0].lower(), str(error))
        text = text.replace("got None", 'got "tensor"')  # as TOML spells them
        raise CheckpointError(f"scheme: {shown(text)}") from None


def _patterns(key: str, patterns: Any) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise CheckpointError(f"{key}: expected a list of patterns, got {shown(repr(patterns))}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise CheckpointError(f"{key}: expected patterns, got {shown(repr(pattern))}")
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            reason = "it is nested too deep" if isinstance(error, RecursionError) else error
            raise CheckpointError(f"{key}: {shown(repr(pattern))}: {shown(reason)}") from None
    return tuple(patterns)


def _nonfinite(value: object) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"allow_nonfinite: expected true or false, got {shown(repr(value))}")
    return value


def _size(value: Any) -> int | None:
    return None if value is None else size_of(value)


def size_of(text: str | int) -> int:
    """Bytes: an int, or a number with KB, MB, GB, TB, or KiB, MiB, GiB, TiB."""
    said = _checks.shown(text) if isinstance(text, int) else str(text)
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B?)", said)
    if found is None or found[2] not in _SIZES or isinstance(text, bool):
        raise CheckpointError(
            f"shard_size: expected a size such as 2GB or 500MiB, got {shown(said)}"
        )
    size = float(found[1]) * _SIZES[found[2]]
    if not 1 <= size <= 2**63:
        raise CheckpointError(f"shard_size: expected 1 byte to 8 EiB, got {shown(said)}")
    return int(size)


def matches(pattern: str, name: str) -> bool:
    names = (name, name.removesuffix(".weight"))
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], n) for n in names)
    return any(fnmatch.fnmatchcase(n, pattern) for n in names)
