"""Calls of operators on every backend, compared with the reference, counted and hashed."""

import math
import sys
import zlib

import torch
import xxhash
from work import ROOT

sys.path.insert(0, str(ROOT / "tests"))  # also for modules that import this one first

from lib.cases import BITS, assert_same, flat

import quantkit
from quantkit import _load
from quantkit.operators import OPERATORS, overloads

EMULATED = "cuda_emu"
EMULATED_EVERY = 17  # the emulator takes one call of so many


class Covered:
    """Calls operators on every backend, compares and hashes what they return."""

    def __init__(self, *task):
        extension = _load.extension
        self.backends = list(quantkit.backend().isas) if extension else ["fallback"]
        self.hashes = {name: xxhash.xxh3_128() for name in self.backends}
        self.sample = xxhash.xxh3_128()  # the reference's, of the calls that the emulator takes too
        self.inputs = self.results = self.emulated = 0
        self.drawn = None
        # Where the emulator begins: each task elsewhere.
        self.calls = zlib.crc32(repr(task).encode())

    def call(self, name, *args, **options):
        """An operator's results."""
        operator, _ = overloads(name)
        if _load.extension is None:
            found = operator(*args, **options)
            add_results(self.hashes["fallback"], found)
            self.results += sum(t.numel() for t in flat(found))
            return found
        expected = OPERATORS[name].reference(*args, **options)
        nans = [is_real(t) and bool(t.isnan().any()) for t in flat(expected)]
        emulates = self.calls % EMULATED_EVERY == 0
        for isa in self.backends:
            if isa == EMULATED and not emulates:
                continue
            _load.extension.set_isa(isa)
            found = operator(*args, **options)
            try:
                assert_same(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {error}") from None
            add_results(self.hashes[isa], found, nans)
        count = sum(t.numel() for t in flat(expected))
        if emulates:
            add_results(self.sample, expected, nans)
            self.emulated += count
        self.calls += 1
        self.results += count
        return expected

    def given(self, x, scale, zero_point, q_min, q_max, code):
        """quantize, dequantize of its result, fake_quantize."""
        given = (x, scale, zero_point, q_min, q_max)
        q = self.call("quantize", *given, code)
        self.call("dequantize", q, scale, zero_point)
        self.call("_fake_quantize", *given)
        self.inputs += x.numel()

    def draws(self, *parameters):
        """Tells results of other parameters apart: torch's exp2 is not the same on every machine."""
        digest = xxhash.xxh3_64()
        add_results(digest, parameters)
        self.drawn = digest.hexdigest()

    def report(self):
        hashes = {name: digest.hexdigest() for name, digest in self.hashes.items()}
        emulated = hashes.pop(EMULATED, None)
        if emulated is not None:
            assert emulated == self.sample.hexdigest(), "the emulator's hash differs"
        assert len(set(hashes.values())) == 1, hashes
        return {
            "inputs": self.inputs,
            "results": self.results,
            "hashes": hashes,
            "drawn": self.drawn,
            "emulated": {"results": self.emulated, "hash": self.sample.hexdigest()},
        }


def is_real(t):
    """Whether t holds floating numbers, not codes."""
    return t.is_floating_point() and t.element_size() > 1


def add_results(digest, results, nans=None):
    """Adds results to a hash; nans: whether each has any, where that is known."""
    for i, t in enumerate(flat(results)):
        if not is_real(t):
            t = t.view(torch.uint8) if t.is_floating_point() else t
        else:
            if nans is None or nans[i]:
                t = t.masked_fill(t.isnan(), math.nan)
            t = t.view(BITS[t.element_size()])
        digest.update(t.contiguous().numpy())
