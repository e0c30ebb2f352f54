"""The regression guard: which cells got slower between two runs, beyond the noise that both measured."""

from __future__ import annotations

from .cells import OURS, OURS_OUT

SAME = ("gpu", "cpu", "cores", "torch", "threads", "python", "huge_pages")
LEAST = 0.05  # smaller changes of a median are not worth a look


def identity(cell: dict) -> tuple:
    names = ("group", "op", "dtype", "granularity", "scheme", "threads", "caches")
    device = cell.get("device", "cpu")  # runs from before there was another have none
    return (*(cell[name] for name in names), tuple(cell["shape"]), device)


def yardstick(old: dict, new: dict) -> str | None:
    """What cancels the machine's mood: a copy in both cells, else eager, else abs."""
    for name in ("copy", "eager", "torch.ops.aten.abs"):
        if name in old["contestants"] and name in new["contestants"]:
            return name
    return None


def pairs(old: dict, new: dict) -> tuple[list[tuple[dict, dict]], list[dict]]:
    """The cells of both runs that can be compared, and those of both that cannot: no common yardstick."""
    before = {identity(cell): cell for cell in old["cells"]}
    both = [(before[identity(c)], c) for c in new["cells"] if identity(c) in before]
    fit = [(then, now) for then, now in both if yardstick(then, now) is not None]
    return fit, [now for then, now in both if yardstick(then, now) is None]


def differences(old: dict, new: dict) -> list[str]:
    """What makes the two runs hard to compare."""
    a, b = old["machine"], new["machine"]
    notes = [f"{k}: {a.get(k)} then, {b.get(k)} now" for k in SAME if a.get(k) != b.get(k)]
    isas = [machine["quantkit"]["isa"] for machine in (a, b)]
    return notes + ([f"isa: {isas[0]} then, {isas[1]} now"] if isas[0] != isas[1] else [])


def _relative(cell: dict, name: str, mark: str) -> tuple[float, float]:
    """The median in units of the yardstick's, and its noise: both spreads between the quartiles."""
    own, unit = cell["contestants"][name], cell["contestants"][mark]
    spread = sum((c["upper"] - c["lower"]) / c["median"] for c in (own, unit))
    return own["median"] / unit["median"], spread


def slower(old: dict, new: dict) -> list[tuple[dict, str, float, float]]:
    """(cell, contestant, how many times the time of before, the noise), the worst first."""
    found = []
    for earlier, cell in pairs(old, new)[0]:
        mark = yardstick(earlier, cell)
        for name in cell["contestants"]:
            ours = name.startswith((OURS, OURS_OUT, "torch.ops.quantkit"))
            if not ours or name not in earlier["contestants"]:
                continue
            then, then_noise = _relative(earlier, name, mark)
            now, now_noise = _relative(cell, name, mark)
            noise = max(LEAST, then_noise, now_noise)
            if now / then > 1 + noise:
                found.append((cell, name, now / then, noise))
    return sorted(found, key=lambda entry: -entry[2])
