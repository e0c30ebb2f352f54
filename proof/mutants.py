"""Planted mistakes: each is patched into a copy of the sources, built, and must fail the tests that are named.

python proof/mutants.py [NAME ...]: all, or some. Fails if a mistake survives. Its tests run as `make test`
has them, and where it survives there, as `make test-all` has them. The test that caught it must pass on the
right sources. Objects are built with -O1; the emulator only where a test is for it.
A run of all, or of all of one kind, leaves its counts in proof/results/mutants.json and its list in
build/mutants.md.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from work import HERE, ROOT, commit, copy_sources, hash_of, product_files

KERNELS = ("tests/test_kernels.py", "-k", "cuda_emu")
FAR = ("tests/test_cuda.py", "-k", "offsets_beyond_32_bits and cuda_emu")
CPU = ("tests/test_kernels.py",)  # on every instruction set of the CPU
OUT = ("tests/test_out.py",)
OVERLAPS = ("tests/test_overlap.py",)
ERRORS = ("tests/test_errors.py",)
FORMAT_ERRORS = ("tests/test_format_errors.py",)
THREADS = ("tests/test_threads.py",)
ENVIRONMENT = ("tests/test_environment.py", "-k", "test_several_threads")
DIVISION = ("tests/test_division.py",)
AUTOGRAD = ("tests/test_autograd.py",)
MEMORY_GIVEN_BACK = ("tests/test_bad_input.py", "-k", "given_back")
LAYOUTS = ("tests/test_layout.py",)
GENERATED = ("tests/test_generated.py",)
# The .format overloads: on every instruction set of the CPU, by the emulator, and their errors.
FORMATTED = ("tests/test_format_kernels.py",)
EMULATED_FORMATS = ("tests/test_format_kernels.py", "-k", "cuda_emu")
MEASURES = ("tests/test_measure.py",)
LINEAR_LAYERS = ("tests/test_linear.py",)
EMULATED_LINEAR = ("tests/test_linear.py", "-k", "cuda_emu")
LEARNED = ("tests/test_learnable.py",)
EMULATED_MEASURES = ("tests/test_measure.py", "-k", "cuda_emu")
STOCHASTIC = ("tests/test_stochastic.py",)
EMULATED_STOCHASTIC = ("tests/test_stochastic.py", "-k", "cuda_emu")
BAD_SEEDS = ("tests/test_bad_input.py", "-k", "argument_of_each_operator")
SEED_OVERLAPS = ("tests/test_bad_input.py", "-k", "memory_of_another")
PROCESSES = ("tests/test_processes.py", "-k", "child")


def kernels(names):
    return (*CPU, "-k", names)


TIERS = {"daily": (), "full": ("--full",)}
# The slowest selection takes some minutes; what takes longer has not failed.
LIMIT_S = 1800


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    text: str  # once in the file
    becomes: str
    tests: tuple[str, ...] = KERNELS

    @property
    def emulated(self):
        return any("cuda_emu" in argument for argument in self.tests)

    @property
    def kind(self):
        if self.file.startswith("csrc/cuda/"):
            return "CUDA kernels"
        if self.file.startswith("csrc/cpu/"):
            return "CPU loops"
        return "numerics" if self.file.startswith("csrc/numerics/") else "operators"


FLOATS = "csrc/numerics/floats.h"
FORMATS = "csrc/numerics/formats.h"
AFFINE = "csrc/numerics/affine.h"
QUOTIENTS = "csrc/numerics/division.h"
REDUCTIONS = "csrc/numerics/reductions.h"
SCALES = "csrc/numerics/scales.h"
SUMS = "csrc/numerics/sums.h"
PHILOX = "csrc/numerics/philox.h"
LAYOUT = "csrc/layout.cpp"
MEMORY = "csrc/cuda/memory.cuh"
ELEMENTWISE, MIXED = "csrc/cuda/elementwise.cuh", "csrc/cuda/mixed.cuh"
DYNAMIC = "csrc/cuda/dynamic.cuh"
MEASURE = "csrc/cuda/measure.cuh"
RUN = "csrc/cuda/run.cuh"
ROWS, CONVERT, REDUCE = "csrc/cpu/rows.h", "csrc/cpu/convert.h", "csrc/cpu/reduce.h"
CHUNKS = "csrc/cpu/chunks.h"
LOOPS = "csrc/cpu/kernels.h"
SQUARES = "csrc/cpu/errors.h"
PRODUCTS = "csrc/cpu/products.h"
LINEAR, DOTS = "csrc/cpu/linear.h", "csrc/cpu/dots.h"
PARALLEL = "csrc/cpu/parallel.cpp"
OPS = "csrc/ops/ops.h"
TYPES = "csrc/ops/ops.cpp"
STATIC = "csrc/ops/static.cpp"
GIVEN = "csrc/ops/given.h"
CHOOSERS = "csrc/ops/dynamic.cpp"
CHECKED_VALUES = "csrc/torch/checks/values.cpp"
CHECKED_SIZES = "csrc/torch/checks/sizes.cpp"
CHECKED_PARAMETERS = "csrc/torch/checks/parameters.cpp"
CHECKED_OPERATORS = "csrc/torch/checks/operators.cpp"
CHECKED_OUTPUTS = "csrc/torch/checks/outputs.cpp"
TENSOR = "csrc/torch/tensor.cpp"
OVERLAP = "csrc/torch/overlap.cpp"
FAKE = "quantkit/operators.py"

MUTANTS = (
    Mutant("reciprocal for division, given parameters", ELEMENTWISE, "Wide<D>(widen(x)) / s.scale",
           "Wide<D>(widen(x)) * (Wide<D>(1) / s.scale)"),
    Mutant("reciprocal for division, chosen parameters", DYNAMIC, "W(widen(x)) / p.scale;",
           "W(widen(x)) * (W(1) / p.scale);"),
    Mutant("half away from zero", FORMATS, "const V shifted = v + kShifter<V>;",
           "const V shifted = V(__builtin_round(v)) + kShifter<V>;"),
    Mutant("lost tail, given parameters", ELEMENTWISE, "      if (!a.ragged) return;", "      return;"),
    Mutant("lost tail, reduction", DYNAMIC, "for_inside<V>(first_of(u), a.n,", "for_inside<V>(first_of(u), a.n - 1,"),
    Mutant("lost tail, rows", DYNAMIC, "for_inside<V>(first_of(t, u), set.n, body);",
           "for_inside<V>(first_of(t, u), set.n - 1, body);"),
    Mutant("lost head", MEMORY, "i = first < 0 ? 0 : first;", "i = first < 0 ? 1 : first;"),
    Mutant("no vector for the head of a row", RUN, "(aligned ? 0 : width - 1)", "0"),
    Mutant("rows between aligned ones taken for whole", RUN, "dims[k].size == 1 || dims[k].stride[o] % width == 0;",
           "true;"),
    Mutant("wrong shuffle distance", DYNAMIC, "distance = team / 2; distance > 0", "distance = team / 4; distance > 0"),
    Mutant("missing barrier before the block's extrema", DYNAMIC, "  __syncthreads();\n  if (thread < kWarp) {",
           "  if (thread < kWarp) {"),
    Mutant("missing barrier before the parameters", DYNAMIC,
           "      __syncthreads();\n      scale = chosen[0];", "      scale = chosen[0];"),
    Mutant("missing barrier between columns", DYNAMIC, "    __syncthreads();\n    // Each thread joins some columns.",
           "    // Each thread joins some columns."),
    Mutant("divergent barrier", DYNAMIC, "    if (team > kWarp) {\n      if (threadIdx.x == 0) {",
           "    if (team > kWarp && set.aligned) {\n      if (threadIdx.x == 0) {"),
    Mutant("NaN rule lost, given parameters", ELEMENTWISE, "      judged = v;",
           "      judged = 0;"),
    Mutant("NaN rule lost, chosen parameters", DYNAMIC, "p.zero_point != p.zero_point ? p.zero_point : quotient;",
           "quotient;"),
    Mutant("32-bit index", MEMORY, "at.of[o] += dims[k].stride[o] * index;",
           "at.of[o] += int32_t(dims[k].stride[o]) * index;", FAR),
    Mutant("32-bit offset within a set", MEMORY, "    at += dims[k].stride[o] * index;",
           "    at += int32_t(dims[k].stride[o] * index);", FAR),
    Mutant("read past the end", MEMORY, "first >= 0 && first + V <= n;", "first >= 0 && first < n;"),
    Mutant("misaligned vector access", MEMORY,
           "return step == 1 && reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;",
           "return step == 1;"),
    Mutant("strides taken for contiguous", MEMORY,
           "return step == 1 && reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;",
           "return reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;"),
    Mutant("only the first turn of the grid", ELEMENTWISE,
           "item < a.rows * a.parts; item += t.stride) {", "item < a.rows * a.parts; item += a.rows * a.parts) {",
           kernels("cuda_emu and half_precision_pattern")),
    Mutant("parts of a set that do not meet", DYNAMIC,
           "  for (int64_t j = part * each + int(threadIdx.x); j < end; j += kHeld * kThreads) {",
           "  for (int64_t j = part * each + part + int(threadIdx.x); j < end; j += kHeld * kThreads) {",
           kernels("cuda_emu and extreme")),
    Mutant("missing barrier between turns of a reduction", DYNAMIC,
           "    __syncthreads();  // the next turn writes what this one's first warp reads\n", ""),
    Mutant("more threads than a kernel is compiled for", RUN, "whole < kMostThreads ? whole : kMostThreads", "whole < 1024 ? whole : 1024",
           kernels("cuda_emu and large_tensors")),
    Mutant("parts beyond the second", DYNAMIC, "part = item - index * a.parts;", "part = (item - index * a.parts) % 2;",
           kernels("cuda_emu and large_tensors")),
    Mutant("a launch on another stream", RUN, "launch(finalize, parameters, kThreads, stream, a);",
           "launch(finalize, parameters, kThreads, nullptr, a);"),
    Mutant("a product for scales of more bits", QUOTIENTS, "& (rounded<T>(scale) == scale) ?", "?",
           kernels("cuda_emu and more_bits")),
    Mutant("a product beside fractions", QUOTIENTS, "has_reciprocal(scale) & integer &", "has_reciprocal(scale) &",
           kernels("cuda_emu and hard_values")),
    Mutant("scratch not cleared", RUN, "const char* error = launch(clear, parameters, kThreads, stream, a);",
           "const char* error = nullptr;\n    (void)clear;"),
    Mutant("zero point not rounded to half precision", ELEMENTWISE, "number<D, true>(a.add", "number<D, false>(a.add",
           kernels("cuda_emu and zero_points")),
    Mutant("zero point of the CPU not rounded", RUN, "values_of(e.add, e.steps.add)",
           "values_of(e.add)", kernels("cuda_emu and zero_points_that")),
    Mutant("the gradient outside the limits", MIXED, "inside ? load(static_cast<const Bits*>(x) + from)",
           "true || inside ? load(static_cast<const Bits*>(x) + from)"),
    Mutant("x's elements for the gradient's", MIXED, "store_selected(inside, a.q_in, at.of[kQ],",
           "store_selected(inside, a.x, at.of[kX],"),
    Mutant("x's step for the gradient", MIXED, "store_selected(inside, a.q_in, at.of[kQ],",
           "store_selected(inside, a.q_in, at.of[kX],"),
    # The CPU's loops.
    Mutant("CPU: a product for the division", ROWS, "x[i] / (kOwn ? divide[i] : divide0), kOwn",
           "x[i] * (1 / (kOwn ? divide[i] : divide0)), kOwn", CPU),
    Mutant("CPU: quotient and sum contracted", ROWS, "v = affine_for_code<D, S>(quotient(x[i], reciprocal), add0);",
           "v = affine_for_code<D, S>(__builtin_fmaf(x[i], reciprocal.high, add0), 0);", kernels("hard_values and avx and float32")),
    Mutant("CPU: correction dropped", ROWS, "kFloat ? corrected_quotient(x[i], divide0, reciprocal)",
           "kFloat ? quotient(x[i], reciprocal)", kernels("quotients and avx")),
    Mutant("CPU: NaN rule lost, division", ROWS, "kMode >= kReciprocal ? x[i] : v;",
           "kMode >= kReciprocal ? x[i] : 0;", CPU),
    Mutant("CPU: NaN rule lost, product", ROWS, "kMode >= kReciprocal ? x[i] : v;",
           "kMode >= kReciprocal ? 0 : v;", kernels("hard_values and avx and float32")),
    Mutant("CPU: lost tail of float16", CONVERT, "for (; i < n; ++i) to[i] = narrow<f16>(from[i]);",
           "for (; i + 1 < n; ++i) to[i] = narrow<f16>(from[i]);", kernels("given_parameters and avx and float16")),
    Mutant("CPU: lost tail of a reduction", REDUCE, "for (int64_t i = 0; i < r.n; ++i) {",
           "for (int64_t i = 0; i + 1 < r.n; ++i) {", CPU),
    Mutant("CPU: float16 cut off", CONVERT, "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO", kernels("given_parameters and avx and float16")),
    Mutant("CPU: uint8 codes taken for int8", LOOPS, "back_loop = with_format(e.format,",
           "back_loop = with_format(e.format == Format::uint8 ? Format::int8 : e.format,", kernels("every_code")),
    Mutant("CPU: float16 taken for bfloat16", LOOPS, "case Type::f16: return loops_for<f16, E, Q>(e);",
           "case Type::f16: return loops_for<bf16, E, Q>(e);", kernels("chosen_parameters and float16")),
    Mutant("CPU: the sum rounded to x's dtype", LOOPS, "e.x_type != Type::f64 && e.steps.there_in(e.x_type)",
           "e.x_type != Type::f64 && e.steps.divide == e.x_type", kernels("mix_of_dtypes and float16")),
    Mutant("CPU: the greatest key begins at 0", REDUCTIONS, "return k == 0 ? Bits(-kMagnitude<X> - 1) :",
           "return k == 0 ? Bits(0) :", CPU),
    Mutant("CPU: the least key begins at 0", REDUCTIONS, "Bits(-kMagnitude<X> - 1) : kMagnitude<X>;",
           "Bits(-kMagnitude<X> - 1) : Bits(0);", CPU),
    # Chunks.
    Mutant("CPU: a walk from inside a row", CHUNKS, "    at.move(inner, -first);\n", "", kernels("large_tensors and float32 and avx2")),
    Mutant("CPU: x's step for y", CHUNKS, "at.of[kY] + done * step[kY]", "at.of[kY] + done * step[kX]", OUT),
    Mutant("CPU: x for the gradient", LOOPS, "grad.get(c.q, c.q_step, n)",
           "grad.get(c.x, c.x_step, n)", GENERATED),
    Mutant("CPU: the gradient outside the limits", CONVERT, "keep[i] ? from[i] : Bits(0)", "from[i]", GENERATED),
    Mutant("CPU: gradients of two bytes taken for four", CONVERT, "case 2: return select_row<int16_t>",
           "case 2: return select_row<int32_t>", GENERATED),
    Mutant("CPU: x's step for q", CHUNKS, "at.of[kQ] + done * step[kQ]", "at.of[kQ] + done * step[kX]", kernels("long_rows")),
    Mutant("CPU: rows that do not join", CHUNKS, "joins &= outer.continues(inner, o);",
           "joins &= o == kX || outer.continues(inner, o);", CPU),
    Mutant("CPU: the parameters of another chunk", CHUNKS, "offset != base || first != start || filled < n",
           "offset != base || filled < n", kernels("long_rows or large_tensors")),
    Mutant("CPU: parameters past the end of their row", CHUNKS, "pattern.inner_step == 1 && column + n <= pattern.inner",
           "pattern.inner_step == 1", CPU),
    Mutant("CPU: lost tail of a stream", CHUNKS, "  memcpy(to + i, from + i, bytes - i);\n", "", OUT),
    Mutant("CPU: in place, nothing written", CHUNKS, "    if (apart) memcpy(to, from, n * size);\n",
           "", OUT),
    # The choice of a loop.
    Mutant("CPU: a reciprocal accepted unproved", LOOPS, "if (!exact_reciprocal(*static_cast<const float*>(rows.divide), rows.reciprocal)) return kDivide;",
           "exact_reciprocal(*static_cast<const float*>(rows.divide), rows.reciprocal);", kernels("quotients and avx")),
    Mutant("CPU: the loop of another row's zero point", LOOPS, "scale_known != c.scale || zero_point_known != c.zero_point",
           "scale_known != c.scale", kernels("long_rows")),
    Mutant("CPU: the reciprocal of another row", LOOPS, "scale_known != c.scale || zero_point_known != c.zero_point",
           "zero_point_known < 0", kernels("long_rows")),
    Mutant("CPU: one zero point for both directions", LOOPS, "e.add.data == e.subtract.data && (!fast || e.steps.add == Type::f32)",
           "e.add.data == e.subtract.data", kernels("zero_points_that")),
    Mutant("CPU: integer zero points rounded alike", LOOPS, "e.add.data == e.subtract.data && (!fast",
           "(!fast", kernels("mix_of_dtypes")),
    Mutant("CPU: zero point not rounded", LOOPS, "fast ? e.steps.add : Type::f64, fast)",
           "fast ? e.steps.add : Type::f64, false)", kernels("zero_points_that")),
    Mutant("CPU: float16's infinity beside a large zero point", LOOPS, "e.steps.divide == Type::f16 ? 0x1p10 : 0x1p20",
           "0x1p20", kernels("zero_points_at and avx and float16")),
    Mutant("CPU: no clipping of codes below q_min", LOOPS, "e.q_max >= 1 && e.q_min <= -e.q_max", "e.q_max >= 1", kernels("symmetric_limits")),
    Mutant("CPU: no clipping of codes above 0", LOOPS, "e.q_max >= 1 && e.q_min <= -e.q_max", "e.q_min <= -e.q_max", kernels("symmetric_limits")),
    Mutant("CPU: strided outputs streamed", LOOPS, "const bool nontemporal = kHasNontemporal && e.nontemporal && chunks.contiguous;",
           "const bool nontemporal = kHasNontemporal && e.nontemporal;", OUT),
    Mutant("every part of a dimension begins at 0", LAYOUT, "part.offset[o] += begin * dims[dim].stride[o];",
           "part.offset[o] += 0;", kernels("large_tensors or extreme")),
    Mutant("CPU: one parameter for a chunk of strided x", LOOPS, "columns ? (first + done) % inner.size : 0;",
           "columns ? first % inner.size : 0;", kernels("long_rows")),
    Mutant("CPU: rows with gaps taken for one piece", LOOPS, "inner.stride[kX] == 1 && outer->stride[kX] == inner.size;",
           "inner.stride[kX] == 1;", CPU),
    Mutant("CPU: short rows that another thread ends", LOOPS, "begin % inner.size == 0 &&\n                    end % inner.size == 0;",
           "begin % inner.size == 0;", (*THREADS, "-k", "short_rows")),
    Mutant("CPU: minima of the threads not joined", REDUCE, "to[i] = R::template join<1>(to[i], from[i]);",
           "to[i] = to[i];", kernels("large_tensors or extreme")),
    # How the work is split, and where it runs.
    Mutant("CPU: an element between two threads lost", PARALLEL, "if (begin < end) body(begin, end);",
           "if (begin < end) body(begin, end - (end < n));", kernels("large_tensors")),
    Mutant("CPU: lost tail of the last thread", PARALLEL, "  if (i >= parts) return n;\n", "", CPU),
    Mutant("CPU: an element between two reductions lost", PARALLEL, "k.reduce(d, border(n, i, threads, kBorder),",
           "k.reduce(d, border(n, i, threads, kBorder) + (i > 0),", kernels("extreme")),
    Mutant("CPU: a parameter between two threads lost", PARALLEL, "const int64_t begin = border(size, i, threads, multiple),",
           "const int64_t begin = border(size, i, threads, multiple) + (i > 0),", kernels("large_tensors")),
    Mutant("CPU: the second thread's keys not joined", PARALLEL, "for (int64_t i = 1; i < threads; ++i) k.join",
           "for (int64_t i = 2; i < threads; ++i) k.join", kernels("large_tensors or extreme")),
    Mutant("CPU: threads in the caller's environment", PARALLEL, "        FloatingPointGuard guard;\n        (*static_cast",
           "        (*static_cast", ENVIRONMENT),
    Mutant("CPU: flushed denormals", "csrc/cpu/fpenv.h", "_mm_setcsr(0x1f80)", "_mm_setcsr((saved_ & 0x8040) | 0x1f80)", ENVIRONMENT),
    Mutant("CPU: the caller's rounding", "csrc/cpu/fpenv.h", "_mm_setcsr(0x1f80)", "_mm_setcsr((saved_ & 0x6000) | 0x1f80)", ENVIRONMENT),
    Mutant("CPU: the caller's environment not restored", "csrc/cpu/fpenv.h", "~FloatingPointGuard() { _mm_setcsr(saved_); }",
           "~FloatingPointGuard() {}", ENVIRONMENT),
    Mutant("CPU: a forked child asks for threads", PARALLEL, "  if (forked_from_threads()) return 1;\n", "", PROCESSES),
    Mutant("CPU: every child goes alone", "csrc/cpu/forks.cpp", "several = used || count_threads() > at_first;", "several = true;", PROCESSES),
    # csrc/numerics as the CPU compiles it.
    Mutant("CPU: rounded before the zero point", AFFINE, "rounded<D2>(Wide<D2>(rounded<D1>(quotient)) + zero_point)",
           "rounded<D2>(Wide<D2>(__builtin_rint(rounded<D1>(quotient))) + zero_point)", CPU),
    Mutant("CPU: half of bfloat16 up", FLOATS, "const float r = bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);",
           "const float r = bit_cast<float>((bits + 0x8000u) & 0xffff0000u);", kernels("given_parameters and bfloat16")),
    Mutant("CPU: half of bfloat16 up, for a code", FLOATS, "return bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u);",
           "return bit_cast<float>((bits + 0x8000u) & 0xffff0000u);", kernels("half_precision_pattern and avx and bfloat16")),
    Mutant("CPU: float16's NaN and infinity", FLOATS, "magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u", "0x38000000u", kernels("given_parameters and float16")),
    Mutant("CPU: true is the byte", FLOATS, "return v.byte != 0;", "return v.byte;", kernels("any_byte")),
    Mutant("CPU: the greatest code is never reached", FORMATS, "bit_cast<Bits>(clamp(v, low, high)) & keep",
           "bit_cast<Bits>(clamp(v, low, high - 1)) & keep", CPU),
    Mutant("CPU: everything within the limits", FORMATS, "clamp(v, low - 1, high + 1)",
           "clamp(v, low, high)", CPU),
    Mutant("CPU: difference and product distributed", AFFINE, "return E2(E1(q) - zero_point) * scale;",
           "return E2(q) * scale - E2(zero_point) * scale;", CPU),
    Mutant("CPU: a NaN loses", REDUCTIONS, "return Bits(bit_cast<Bits>(v) & kMagnitude<T>);",
           "return widen(v) != widen(v) ? Bits(0) : Bits(bit_cast<Bits>(v) & kMagnitude<T>);", kernels("constants")),
    Mutant("CPU: zero points of -0.0", REDUCTIONS, "zero_point = narrow<P>(0);", "zero_point = narrow<P>(-Wide<P>(0));", kernels("constants")),
    Mutant("CPU: eps not rounded", SCALES, "return rounded<P>(Wide<P>(eps));", "return Wide<P>(eps);", kernels("constants")),
    Mutant("CPU: the extent not rounded", SCALES, "scale_of<P>(rounded<P>(x_max - x_min),", "scale_of<P>(x_max - x_min,", kernels("chosen_parameters and float16")),
    Mutant("CPU: the quotient of a zero point not rounded", SCALES, "= rounded<P>(x_min / scale);", "= x_min / scale;", kernels("chosen_parameters and float16")),
    Mutant("CPU: zero left out of negative x", SCALES, "    x_max = x_max < 0 ? 0 : x_max;\n", "", kernels("constants")),
    Mutant("CPU: every reciprocal is exact", QUOTIENTS, "  return exact;\n", "  return true;\n", DIVISION),
    Mutant("CPU: reciprocals whose low part is denormal", QUOTIENTS, "scale <= 0x1p60f", "scale <= 0x1p110f", DIVISION),
    Mutant("CPU: reciprocals of denormal scales", QUOTIENTS, "scale >= 0x1p-60f", "scale >= 0x1p-140f", DIVISION),
    Mutant("CPU: the nearest midpoints only", QUOTIENTS, "most = 8 >> zeros", "most = 1 >> zeros", DIVISION),
    Mutant("CPU: low part of a reciprocal lost", QUOTIENTS, "__builtin_fmaf(x, r.high, x * r.low)", "x * r.high", DIVISION),
    Mutant("CPU: no step from the quotient", QUOTIENTS, "return __builtin_fmaf(__builtin_fmaf(-q, scale, x), r.high, q);", "return q;", DIVISION),
    # The operators.
    Mutant("parameters left out of merged dimensions", LAYOUT, "for (int o = 0; merges && o < kOperands; ++o)",
           "for (int o = 0; merges && o < kScale; ++o)", CPU),
    Mutant("the block of a scale for a zero point alone", LAYOUT, "for (int o = 0; o < kOperands; ++o) {\n    const int64_t block",
           "for (int o = 0; o < kZeroPoint; ++o) {\n    const int64_t block", kernels("mix_of_dtypes")),
    Mutant("parameters without dimensions, x without too", TYPES, "return dim > 0 && parameter_dim == 0 ? t", "return parameter_dim == 0 ? t", kernels("scalar_tensors")),
    Mutant("integer zero points in half precision", GIVEN, "return float32 || (wide && scale.half()) ? Type::f32 : scale.kind();",
           "return float32 ? Type::f32 : scale.kind();", kernels("mix_of_dtypes")),
    Mutant("a range just below half precision", OPS, "q_min < -128 || q_max > 255", "q_min < -129 || q_max > 255", kernels("limits_at")),
    Mutant("a range just above half precision", OPS, "q_min < -128 || q_max > 255", "q_min < -128 || q_max > 256", kernels("limits_at")),
    Mutant("x's strides for the gradient", GIVEN, "axes_of(data, beside, y)",
           "axes_of(data, e.q_in != nullptr ? nullptr : beside, y)", GENERATED),
    Mutant("a contiguous step for strided parameters", LAYOUT, "a.stride[operand] = strides[own];",
           "a.stride[operand] = own + 1 < own_dim ? own_sizes[own_dim - 1] : 1;", kernels("strided_and_expanded")),
    Mutant("empty tensors quantized", STATIC, "    if (outs[0].numel == 0) return;\n",
           "", kernels("cuda_emu and zero_elements")),
    Mutant("written before it is claimed", OPS, "  claim_outs(given, call.inputs(), call.in_place());\n  call.run(infos, false);",
           "  call.run(infos, false);\n  claim_outs(given, call.inputs(), call.in_place());", OUT),
    Mutant("written before the last output is checked", OPS, "    check_out(infos[i], r.sizes, r.dim, r.dtype, *r.like);\n",
           "    if (i > 0 && i + 1 == Call::kResults) call.run(infos, false);\n    check_out(infos[i], r.sizes, r.dim, r.dtype, *r.like);\n", OUT),
    Mutant("claimed before a check", OPS, "    check_out(infos[i], r.sizes, r.dim, r.dtype, *r.like);\n",
           "    claim_outs({&infos[i]}, call.inputs(), call.in_place());\n    check_out(infos[i], r.sizes, r.dim, r.dtype, *r.like);\n", OUT),
    # What compilers are told.
    Mutant("fake kernels: parameters in x's dtype", FAKE, "steps.first_dtype(x, q_min, q_max)", "steps.first_dtype(x, -128, 127)", GENERATED),
    Mutant("fake kernels: integer zero points in float32", "quantkit/_checks/operators.py", "else scale.dtype\n", "else torch.float32\n", GENERATED),
    Mutant("fake kernels: contiguous results", FAKE, "return torch.empty_like(t, dtype=dtype, requires_grad=False)",
           "return t.new_empty(t.shape, dtype=dtype)", GENERATED),
    # Each check of an output, removed.
    Mutant("no check of an output's dtype", CHECKED_OUTPUTS, "if (out.dtype != dtype)\n    raise(", "if (false)\n    raise(", OUT),
    Mutant("no check of an output's shape", CHECKED_OUTPUTS, "if (!std::equal(out.sizes, out.sizes + out.dim, sizes, sizes + dim))", "if (false)", OUT),
    Mutant("no check for overlap with itself", CHECKED_OUTPUTS, "if (overlaps_itself(*out))", "if (false)", OUT),
    Mutant("no check for overlap with inputs", CHECKED_OUTPUTS, "others = inputs;", "others;", OUT),
    Mutant("no check for overlap with the gradient", STATIC, "    if (gradient != nullptr) inputs.insert(inputs.begin(), gradient);\n",
           "", OUT),
    Mutant("no check for overlap of outputs", CHECKED_OUTPUTS, "    others.insert(others.end(), outs.begin(), outs.begin() + i);\n", "", OUT),
    Mutant("in place from another address", CHECKED_OUTPUTS, "bool same = a.data == b.data && a.dtype == b.dtype;", "bool same = a.dtype == b.dtype;", OUT),
    Mutant("in place in another order", CHECKED_OUTPUTS, "same &= a.sizes[d] == 1 || a.strides[d] == b.strides[d];", "same &= true;", OUT),
    Mutant("in place of another dtype", CHECKED_OUTPUTS, "bool same = a.data == b.data && a.dtype == b.dtype;", "bool same = a.data == b.data;", OUT),
    Mutant("outputs inside a graph", CHECKED_OUTPUTS, "if (aoti_torch_grad_mode_is_enabled() && !is_leaf(*out))", "if (false)", AUTOGRAD),
    Mutant("no new version of an output", CHECKED_OUTPUTS, "if (aoti_torch_copy_(out->handle, out->handle, 0) != AOTI_TORCH_SUCCESS)", "if (false)", AUTOGRAD),
    # And each check of an argument.
    Mutant("no check of the order of limits", CHECKED_PARAMETERS, "if (q_min > q_max)", "if (false)", ERRORS),
    Mutant("no check of the least limit", CHECKED_PARAMETERS, "return F::kLow <= q_min && q_min <= q_max && q_max <= F::kHigh;", "return q_min <= q_max && q_max <= F::kHigh;", ERRORS),
    Mutant("no check of the greatest limit", CHECKED_PARAMETERS, "return F::kLow <= q_min && q_min <= q_max && q_max <= F::kHigh;", "return F::kLow <= q_min && q_min <= q_max;", ERRORS),
    Mutant("no check of eps", CHECKED_OPERATORS, "if (bits == 0 || bits > bit_cast", "if (bits > bit_cast", ERRORS),
    Mutant("eps compared as its caller compares", CHECKED_OPERATORS, "if (bits == 0 ||", "if (!(eps > 0) ||", ("tests/test_environment.py", "-k", "denormal_is_above_0 and avx2")),
    Mutant("no check of include_zero", CHECKED_OPERATORS, "if (include_zero && symmetric)", "if (false)", ERRORS),
    Mutant("no check of the number of blocks", CHECKED_SIZES, "if (static_cast<int64_t>(blocks.size()) != x.dim)", "if (blocks.empty())", ERRORS),
    Mutant("no check of block sizes", CHECKED_SIZES, "if (blocks[d] == 0 || blocks[d] < -1)", "if (blocks[d] == 0)", ERRORS),
    Mutant("no check that blocks divide", CHECKED_SIZES, "if (!short_blocks && blocks[d] != -1 &&", "if (false && blocks[d] != -1 &&", ERRORS),
    Mutant("no check for emptiness", CHECKED_OPERATORS, "if (x.numel == 0 && !blockless)", "if (false)", ERRORS),
    Mutant("no check of a scale's dtype", CHECKED_PARAMETERS, "check_kind(scale, true);\n  check_kind(zero_point, false);",
           "check_kind(scale, false);\n  check_kind(zero_point, false);", ERRORS),
    Mutant("no check that parameters fit", CHECKED_PARAMETERS, "  check_fit(zero_point, x);\n", "", ERRORS),
    Mutant("no check that parameters broadcast", CHECKED_PARAMETERS, "if (!fit_each_other(scale, zero_point))", "if (false)", ERRORS),
    Mutant("no check of a gradient's dtype", CHECKED_OPERATORS, "if (grad.dtype != x.dtype)", "if (false)", ERRORS),
    Mutant("no check of a gradient's shape", CHECKED_OPERATORS, "if (!std::equal(grad.sizes, grad.sizes + grad.dim, x.sizes, x.sizes + x.dim))", "if (false)", ERRORS),
    # Tensors: their memory.
    Mutant("the strides of x where it has gaps", TENSOR, "if (t.strides[*d] != expected) return false;", "", CPU),
    Mutant("memory shorter than its tensor", TENSOR, "if (numel > 0 && read &&", "if (false && read &&", MEMORY_GIVEN_BACK),
    Mutant("memory shorter by one element", TENSOR, "(offset + last + 1) *", "(offset + last) *", MEMORY_GIVEN_BACK),
    Mutant("memory shorter than where a tensor begins", TENSOR, "(offset + last + 1) *", "(last + 1) *", MEMORY_GIVEN_BACK),
    Mutant("overlap of the last element", OVERLAP, "t.strides[d] * (t.sizes[d] - 1);", "t.strides[d] * (t.sizes[d] - 2);", OVERLAPS),
    Mutant("overlap of neighbours", OVERLAP, "low = ahead - a_size + 1,", "low = ahead - a_size,", OVERLAPS),
    Mutant("overlap of first bytes only", OVERLAP, "high = ahead + b_size - 1;", "high = ahead;", OVERLAPS),
    Mutant("overlap of equal strides", OVERLAP, "if (target < 0) continue;", "if (target <= 0) continue;", OVERLAPS),
    # Geometry.
    Mutant("an order that loses a dimension", LAYOUT, "dims[at] = dims[at - 1];",
           "dims[at] = dims[k];", LAYOUTS),
    Mutant("tiles on one place", LAYOUT, "  for (int64_t& stride : pieces.stride) stride *= piece;\n",
           "", LAYOUTS),
    Mutant("tiles that leave a rest", LAYOUT, "  while (row.size % piece != 0) --piece;\n",
           "", LAYOUTS),
    Mutant("repeats left out where parameters step", LAYOUT, "dim.stride[kX] != 0 || dim.stride[kScale] != 0;",
           "dim.stride[kX] != 0;", LAYOUTS),
    Mutant("CPU: slabs of the reduced layout", PARALLEL, "    states_ /= count_;",
           "    count_ = reduced_.slabs();\n    states_ /= count_;", OUT),
    Mutant("CPU: a part of another dimension", PARALLEL, "if (layout.dims[k].stride[kScale] != 0 && place-- == 0)",
           "if (place-- == 0)", kernels("large_tensors")),
    # Columns, chosen parameters, masks.
    Mutant("CPU: lost tail of columns", REDUCE, "for (; n > 0; x += columns",
           "for (; n >= columns; x += columns", CPU),
    Mutant("CPU: columns from inside a row", REDUCE, "x += head, n -= head;",
           "n -= head;", CPU),
    Mutant("CPU: the last period not joined", REDUCE, "for (int64_t i = 0; i < period; i += columns)",
           "for (int64_t i = 0; i + columns < period; i += columns)", kernels("large_tensors or extreme")),
    Mutant("CPU: scale's step for zero points", REDUCE, "i * f.zero_point_step",
           "i * f.scale_step", OUT),
    Mutant("CPU: centred codes of half precision not clipped", ROWS, "else if constexpr (kCentre && kFloat)",
           "else if constexpr (kCentre)", kernels("chosen_parameters and avx")),
    Mutant("a mask with NaN inside", FORMATS, "clamp(v, low - 1, high + 1)",
           "clamp(v != v ? low : v, low - 1, high + 1)", CPU),
    Mutant("the result's strides for the mask", STATIC, "given.run(e, x, beside, y,",
           "given.run(e, x, y != nullptr && e.q != nullptr ? y : beside, y,", OUT),
    Mutant("CPU: the gradient's step for the mask", LOOPS, "mask.get(c.q, c.q_step, n)",
           "mask.get(c.x, c.x_step, n)", CPU),
    Mutant("x's place for the mask", ELEMENTWISE, "store(static_cast<uint8_t*>(a.q) + q,",
           "store(static_cast<uint8_t*>(a.q) + at.of[kX] + i * a.stride[kX],"),
    Mutant("the gradient's place for the mask", MIXED, "load(static_cast<const uint8_t*>(a.q_in) + at.of[kQ])",
           "load(static_cast<const uint8_t*>(a.q_in) + at.of[kX])"),
    Mutant("no check of a mask's dtype", CHECKED_OPERATORS, "  check_dtype(mask, Type::boolean);\n", "", ERRORS),
    Mutant("no check of a masked gradient's shape", CHECKED_OPERATORS, "if (!std::equal(grad.sizes, grad.sizes + grad.dim, mask.sizes, mask.sizes + mask.dim))",
           "if (false)", ERRORS),
    # Float formats.
    Mutant("float8: not clipped", FORMATS, "bit_cast<float>(magnitude < limit ? magnitude : limit)",
           "bit_cast<float>(magnitude)", FORMATTED),
    Mutant("float8: subnormals begin a binade lower", FORMATS, "field > kLeastField ? field : kLeastField;\n    const float addend",
           "field > kLeastField - (2 << 23) ? field : kLeastField;\n    const float addend", FORMATTED),
    Mutant("float8: another code of NaN", FORMATS, "number ? e.code : kNanCode,",
           "number ? e.code : kNanCode ^ 1,", FORMATTED),
    Mutant("float8: the sign of a NaN", FORMATS, "number ? e.code : kNanCode,",
           "number ? e.code : (e.code & kCodeSign) | kNanCode,", FORMATTED),
    Mutant("float8: the sign of what was clipped", FORMATS, "sign = bit_cast<int32_t>(from) & kSign;\n    return",
           "sign = bit_cast<int32_t>(v) & kSign;\n    return", FORMATTED),
    Mutant("float8: codes that count no binades", FORMATS, " + (power >> (23 - M)) - (kLeastField >> (23 - M)));",
           ");", FORMATTED),
    Mutant("float8: ties by an odd addend", FORMATS, "(power >> (23 - M)) - (kLeastField >> (23 - M)));",
           "(power >> (23 - M)) - (kLeastField >> (23 - M)) + 1);", FORMATTED),
    Mutant("float8: subnormal codes taken for normal ones", FORMATS, "magnitude < (1 << M) ? small : normal;",
           "normal;", FORMATTED),
    Mutant("float8: an infinity that is NaN", FORMATS, "M == 2 && magnitude == kFinite ? 0x7f800000 : kNan;",
           "kNan;", FORMATTED),
    Mutant("a mask without the greatest limit", FORMATS, "return Bits(v >= low ? -1 : 0) & Bits(v <= high ? -1 : 0);",
           "return Bits(v >= low ? -1 : 0);", FORMATTED),
    Mutant("float8: a mask of rounded numbers", FORMATS, "inside(float v, float low, float high) { return between(v, low, high); }",
           "inside(float v, float low, float high) { return IntegerEncoder::inside(v, low, high); }", FORMATTED),
    Mutant("CPU: a mask of what is rounded twice", ROWS, "(kSame<D, whole> ? between(v, low, high) : E::inside(v, low, high))",
           "E::inside(v, low, high)", FORMATTED),
    Mutant("CPU: float8's NaN as float16", FORMATS, "_mm_set1_epi16(0x7c00)", "_mm_set1_epi16(0)", FORMATTED),
    Mutant("CPU: the power beside scales that overflow with it", ROWS, "kOwn || !(scale0 >= F::kScales || scale0 <= -F::kScales);",
           "true;", FORMATTED),
    Mutant("CPU: lost tail of float8 as float16", ROWS, "exact && i + 8 <= n; i += 8", "exact && i < n; i += 8", FORMATTED),
    # Codes of which several share a byte.
    Mutant("packed: the second code first", FORMATS, "uint8_t(byte >> place * kBits &",
           "uint8_t(byte >> (kPerByte - 1 - place) * kBits &", FORMATTED),
    Mutant("packed: a sign that covers the second code", FORMATS, "(uint8_t(codes[k]) & ((1 << kBits) - 1)) << k * kBits",
           "uint8_t(codes[k]) << k * kBits", FORMATTED),
    Mutant("packed: no sign", FORMATS, "(Packing<kBits>::field(byte, place) ^ sign) + kFrom",
           "Packing<kBits>::field(byte, place)", FORMATTED),
    Mutant("CPU: packed codes read from a byte each", CHUNKS, "convert(base + offset / packed, converted.bytes, count);",
           "convert(base + offset, converted.bytes, count);", FORMATTED),
    Mutant("CPU: packed codes read from whole bytes on", CHUNKS, "return converted.bytes + begin;",
           "return converted.bytes;", FORMATTED),
    Mutant("CPU: the last packed code not read", CHUNKS, "count = (begin + n + packed - 1) / packed * packed;",
           "count = n;", FORMATTED),
    Mutant("CPU: packed codes that lie apart, all from one byte", CHUNKS, "for (int64_t i = 0; i < n; ++i, offset += step) {",
           "for (int64_t i = 0; i < n; ++i, offset += i % 2 * step) {", FORMATTED),
    Mutant("CPU: packed codes written to a byte each", CHUNKS, "return convert(made.bytes, base + offset / packed, n);",
           "return convert(made.bytes, base + offset, n);", FORMATTED),
    Mutant("codes left unpacked", TYPES, "  if (!bytes_) return repack(Operation::pack, q_, *made_, format_);\n",
           "  if (!bytes_) return;\n", FORMATTED),
    Mutant("packed codes not copied to strided outputs", TYPES, "  copy(q_, packed);\n", "", OUT),
    Mutant("two parameters in a byte", TYPES, "return block % per_byte(format) == 0 || block >= x.sizes[x.dim - 1];",
           "return true;", FORMATTED),
    Mutant("packed codes in the order of x, chosen parameters", CHOOSERS, "e.packed ? kQ : kX, e.packed ? kX : kQ,", "kX, kQ,", FORMATTED),
    Mutant("packed codes in the order of x, given parameters", STATIC, "given.run(e, x, beside, y, kFake ? kY : kQ, wide,",
           "given.run(e, x, beside, y, kX, wide,", FORMATTED),
    Mutant("packed codes unpacked from between others", TYPES, "const bool apart = q.strides[q.dim - 1] != 1 && q.sizes[q.dim - 1] > 1;",
           "const bool apart = false;", FORMATTED),
    # float32 steps.
    Mutant("steps of x's dtype where float32 ones are asked for", GIVEN, "    if (float32) e.steps = {", "    if (false) e.steps = {", FORMATTED),
    Mutant("integer zero points in half precision, float32 steps", GIVEN, "return float32 || (wide && scale.half())",
           "return (wide && scale.half())", FORMATTED),
    Mutant("CPU: quotients not rounded first", LOOPS, "      if (e.steps.round_first) return loops_for<whole, E, Q>(e);\n", "", FORMATTED),
    Mutant("half away from zero, rounded first", AFFINE, "return small ? (v + kShifter<float>)-kShifter<float> : v;",
           "return small ? __builtin_roundf(v) : v;", FORMATTED),
    Mutant("chosen parameters: quotients not rounded first", CHOOSERS, "    e.steps.round_first = round_first;\n", "", FORMATTED),
    Mutant("half_range by whole steps", CHOOSERS, "static_cast<double>(std::max<int64_t>(q_max - q_min, 1)) / 2;",
           "static_cast<double>(std::max<int64_t>(q_max - q_min, 1) / 2);", FORMATTED),
    Mutant("CPU: half_range taken for centred", CHOOSERS, "e.centred = scheme.symmetric && scheme.steps == std::max(scheme.q_max, 1) &&",
           "e.centred = scheme.symmetric &&", FORMATTED),
    Mutant("blocks of equal sizes where the last is short", TYPES, "const bool by_given = given > 0 && sizes[i] == blocks_in(x.sizes[d], given);",
           "const bool by_given = false;", FORMATTED),
    Mutant("no cut before a short last block", LAYOUT, "return count == 0 ? axis.size : axis.size - axis.size % blocks[count - 1];",
           "return axis.size;", LAYOUTS),
    # Scales that are stored as codes.
    Mutant("ceil: the power of two below", SCALES, "(scale >> 23) + ((scale & 0x7fffff) != 0)", "scale >> 23", FORMATTED),
    Mutant("ceil: one more at a power of two", SCALES, "((scale & 0x7fffff) != 0)", "1", FORMATTED),
    Mutant("ceil: the smallest power twice", SCALES, "scale <= 1 << 22 ? 0 :", "scale < 1 << 22 ? 0 :", FORMATTED),
    Mutant("even: floor", SCALES, "kRule == Rule::even ? s.half : 0", "0", FORMATTED),
    Mutant("floor: not above eps", SCALES, "code = code < least ? least : code;", "", FORMATTED),
    Mutant("a code of NaN for infinity", SCALES, "bits == kInfinity ? 254 : code", "bits == kInfinity ? 255 : code", FORMATTED),
    Mutant("no code of NaN", SCALES, "bits > kInfinity ? 255 :", "bits > kInfinity ? 254 :", FORMATTED),
    Mutant("e8m0: its smallest number is 0", FORMATS, "code == 0 ? 1 << 22 :", "code == 0 ? 0 :", FORMATTED),
    Mutant("a global scale that only divides", SCALES, "return {made.code, made.number * global};", "return {made.code, made.number};", FORMATTED),
    Mutant("a global scale after eps", SCALES, "raised<float>(max_abs / float(s.steps) / global, s)", "raised<float>(max_abs / float(s.steps), s) / global", FORMATTED),
    Mutant("powers of two that are floor's taken for centred", CHOOSERS, "(!stored || scheme.rule == Rule::ceil)", "true", FORMATTED),
    Mutant("a global scale that dequantize does not take", TYPES, "axes.add(kScale, scale->sizes, scale->strides, scale->dim);\n", "", FORMATTED),
    Mutant("float4: the sign of 8 bits", FORMATS, "int32_t(uint32_t(sign) >> (32 - kBits)),", "int32_t(uint32_t(sign) >> 24),", FORMATTED),
    # The same in CUDA.
    Mutant("a mask of what is rounded twice", MIXED, "a.steps.round_first || a.draws_randomly ? between(v, low, high) != 0",
           "a.draws_randomly ? between(v, low, high) != 0", EMULATED_FORMATS),
    Mutant("float32 for an output of half precision", RUN, "  if (kResult == Result::codes && back && e.y_type != Type::f32) return nullptr;\n",
           "", EMULATED_FORMATS),
    Mutant("float32 for an output of half precision, of rows", RUN, "  if (e.operation == Operation::quantize_dequantize && e.y_type != Type::f32) return false;\n",
           "", EMULATED_FORMATS),
    Mutant("rows of float formats by the integers' kernel", RUN, "if (is_float(e.format) || e.steps.round_first || e.seed != nullptr || d.stored != nullptr)",
           "if (d.stored != nullptr || e.steps.round_first || e.seed != nullptr)", EMULATED_FORMATS),
    Mutant("rows rounded first by the usual kernel", RUN, "if (is_float(e.format) || e.steps.round_first || e.seed != nullptr || d.stored != nullptr)",
           "if (is_float(e.format) || e.seed != nullptr || d.stored != nullptr)", EMULATED_FORMATS),
    Mutant("quotients not rounded first", MIXED, "  if (steps.round_first) return sum_in<float>(rounded<whole>(float(quotient)), zero_point);\n",
           "", EMULATED_FORMATS),
    Mutant("only the first code of a byte", MIXED, "F::kPerByte * i + k, F::unpacked(byte, k));",
           "F::kPerByte * i + k, F::unpacked(byte, 0));", EMULATED_FORMATS),
    # Stochastic rounding.
    Mutant("9 rounds of Philox", PHILOX, "kPhiloxRounds = 10", "kPhiloxRounds = 9", STOCHASTIC),
    Mutant("Philox: the key's other step", PHILOX, "second += 0xbb67ae85u", "second += 0x9e3779b9u", STOCHASTIC),
    Mutant("draws: halves of a word swapped", PHILOX, "16 * (index % 2)", "16 * (1 - index % 2)", STOCHASTIC),
    Mutant("rounded up where the fraction is the draw's", PHILOX, "bit_cast<uint32_t>(u - (magnitude - float(whole))) >> 31", "u <= magnitude - float(whole)",
           STOCHASTIC),
    Mutant("a draw without the half step", PHILOX, "0x3f800040u", "0x3f800000u", STOCHASTIC),
    Mutant("CPU: the stream's upper word left out", PRODUCTS, "d[k] = W::all(from.stream >> 32);", "d[k] = W::all(0);", STOCHASTIC),
    Mutant("CPU: lanes in the order of counters", PRODUCTS, "lanes[k] = k / 2 + k % 2 * (kLanes / 2);", "lanes[k] = k;", STOCHASTIC),
    Mutant("CPU: a chunk's draws from its first counter on", LOOPS, "return draws + first % kDrawsOfWords;", "return draws;", STOCHASTIC),
    Mutant("the offset of places left out", TYPES, "first_ = index->front();", "", STOCHASTIC),
    Mutant("places by x's own strides", TYPES, "strides_.assign(index->begin() + 1, index->end());", "strides_.assign(x.strides, x.strides + x.dim);", STOCHASTIC),
    Mutant("CPU: rows joined whose places are apart", CHUNKS, "kOfElements[] = {kX, kQ, kY, kIndex};", "kOfElements[] = {kX, kQ, kY};", STOCHASTIC),
    Mutant("CPU: a random mask of what is rounded", ROWS, "{ return between(v, low, high); }", "{ return E::inside(v, low, high); }", STOCHASTIC),
    Mutant("integers drawn before they are clipped", FORMATS, "bit_cast<int32_t>(clamp(v, low, high)) & (from == from ? -1 : 0)",
           "bit_cast<int32_t>(v) & (from == from ? -1 : 0)", STOCHASTIC),
    Mutant("no check of places", CHECKED_OPERATORS, "if (least < 0 || most > INT64_MAX)", "if (least < 0)", STOCHASTIC),
    Mutant("no check of a seed's shape", CHECKED_OPERATORS, "seed.dim != 1 || seed.sizes[0] != 2", "seed.dim != 1", BAD_SEEDS),
    Mutant("a seed may overlap outputs", CHOOSERS, "    if (drawn) inputs.push_back(&drawn.seed());\n", "", SEED_OVERLAPS),
    Mutant("a mask of what is rounded up or down", MIXED, "a.steps.round_first || a.draws_randomly ? between(v, low, high) != 0",
           "a.steps.round_first ? between(v, low, high) != 0", EMULATED_STOCHASTIC),
    Mutant("rows drawn by the usual kernel", RUN, "if (is_float(e.format) || e.steps.round_first || e.seed != nullptr || d.stored != nullptr)",
           "if (is_float(e.format) || e.steps.round_first || d.stored != nullptr)", EMULATED_STOCHASTIC),
    # Checks of the .format overloads.
    Mutant("no check of a global scale's shape", CHECKED_PARAMETERS, "if ((global.dim != 0 && global.dim != dim) || !fits(global, scale))", "if (false)", ERRORS),
    Mutant("no check of a rule's dtype", CHECKED_OPERATORS, "(choice.stored == Stored::e8m0 && choice.half_range)", "false", ERRORS),
    Mutant("no check of a global scale beside a rule", CHECKED_OPERATORS, "if (has_global && choice.rule != Rule::none)", "if (false)", ERRORS),
    Mutant("no check of e4m3's smallest scale", CHECKED_OPERATORS, "!(eps > 0x1p-10 + 0x1p-34)", "!(eps > 0x1p-10)", FORMAT_ERRORS),
    Mutant("no check of a scale's other dtype", CHECKED_OPERATORS, "if (scale_dtype && *scale_dtype != dtype_of(Type::f32))", "if (false)", ERRORS),
    Mutant("no check of half_range's format", CHECKED_OPERATORS, "if (choice.half_range && (is_float(format) || !is_signed))", "if (false)", ERRORS),
    Mutant("no check that a limit is a number of the format", CHECKED_PARAMETERS, "&&\n             F::within(float(q_max), 0.0f).number == float(q_max);", ";", FORMAT_ERRORS),
    Mutant("no check that limits are opposite", CHECKED_PARAMETERS, "return q_min == -q_max && 0 < q_max", "return 0 < q_max", FORMAT_ERRORS),
    Mutant("no check of a float format's zero point", CHECKED_PARAMETERS, "    if (is_float(format))\n      raise(\"zero_point: expected None", "    if (false)\n      raise(\"zero_point: expected None", ERRORS),
    Mutant("no check of a float format's scheme", CHECKED_OPERATORS, 'if (is_float(format)) raise("symmetric', 'if (false) raise("symmetric', ERRORS),
    Mutant("no check of round_first", CHECKED_OPERATORS, "if (round_first && is_float(format))", "if (false)", ERRORS),
    Mutant("no check that codes fill bytes", CHECKED_OPERATORS, "if (codes > 1 && (x.dim == 0 || x.sizes[x.dim - 1] % codes != 0))", "if (codes > 1 && x.dim == 0)", FORMAT_ERRORS),
    Mutant("no check of codes' dtype", CHECKED_VALUES, "if (q.dtype != dtype_of(format) &&", "if (false &&", FORMAT_ERRORS),
    Mutant("no check of output_dtype", CHECKED_VALUES, "for (const Type type : {Type::f16, Type::bf16, Type::f32})", "for (const Type type : {Type::f16, Type::bf16, Type::f32, Type::f64})", FORMAT_ERRORS),
    Mutant("no check that scale has a size for each block", CHECKED_PARAMETERS, "if (!std::equal(scale.sizes, scale.sizes + scale.dim, counts.begin(), counts.end()))",
           "if (false)", ERRORS),
    Mutant("a carry lost", SUMS, "    digits[k] = rest & 0xffffffffu;\n    rest >>= 32;",
           "    digits[k] = rest & 0xffffffffu;\n    rest = 0;", MEASURES),
    Mutant("a sum rounded without what is below", SUMS, "bits | (rest != 0 ? 1 : 0)", "bits", MEASURES),
    Mutant("the greatest error of the last part", SUMS,
           "to.max_error = to.max_error > from.max_error ? to.max_error : from.max_error;",
           "to.max_error = from.max_error;", MEASURES),
    Mutant("a binade more than two parts hold", SQUARES, "((position + 1) / 2 + 1) << 23", "((position + 1) / 2) << 23",
           MEASURES),
    Mutant("a part that leaves its binade", SQUARES, "<< 52) * 1.5;", "<< 52);", MEASURES),
    Mutant("what a lower sum takes from the upper lost", SQUARES, "    sums[0] += sums[1] >> kPartBits;", "", MEASURES),
    Mutant("what lies far below the greatest lost", SQUARES, "    if (others == 0) return;", "    return;", MEASURES),
    Mutant("what is left out is not counted", SQUARES, "    left_out += keep + 1;\n", "", MEASURES),
    Mutant("an offset of 127 in products of bytes", LINEAR, "added[k] = 128;", "added[k] = 127;", LINEAR_LAYERS),
    Mutant("a copied row of bytes without its offset", LINEAR, "^ 0x80;", "^ 0x00;", LINEAR_LAYERS),
    Mutant("a few tokens without the offset", DOTS, "_mm512_set1_epi8(-128)", "_mm512_set1_epi8(0)", LINEAR_LAYERS),
    Mutant("columns beyond a block lost", LINEAR, "from < l.depth; from += kDepth", "from < kDepth; from += kDepth",
           LINEAR_LAYERS),
    Mutant("both scales multiplied first", "csrc/numerics/affine.h", "float(sum) * x_scale * scale",
           "float(sum) * (x_scale * scale)", LINEAR_LAYERS),
    Mutant("the tail of a row of bytes lost", DOTS, "  if (k < n) add(", "  if (false) add(", LINEAR_LAYERS),
    Mutant("the padding of products not cleared", "csrc/ops/linear.cpp", "if (rows * columns != n) clear(",
           "if (false) clear(", EMULATED_LINEAR),
    Mutant("a learned scale's sum in one part", "quantkit/sums.py", "while largest := _largest(terms):",
           "if largest := _largest(terms):", LEARNED),
    Mutant("a learned scale's sum rounded twice", "quantkit/sums.py", "rounded(carried(torch.where(negative, -digits, digits)), dtype)",
           "rounded(carried(torch.where(negative, -digits, digits))).to(dtype)", LEARNED),
    Mutant("infinite terms of a learned scale added", "quantkit/learnable.py", "torch.where(self.kept, terms, 0.0)",
           "terms", LEARNED),
    Mutant("parts joined without carries", "quantkit/sums.py", "rounded(carried(limbs))", "rounded(limbs)", MEASURES),
    Mutant("missing barrier before the sums", MEASURE, "  __syncthreads();\n  Measured* const m",
           "  Measured* const m", EMULATED_MEASURES),
    Mutant("the lower window of a thread taken for the upper", MEASURE, "give(lower_sum, lower_high, window - 1, add);",
           "give(lower_sum, lower_high, window, add);", EMULATED_MEASURES),
    Mutant("upper halves of a thread's squares lost", MEASURE, "    high += lower ? 0 : square >> 32;\n", "",
           EMULATED_MEASURES),
)  # fmt: skip


KINDS = sorted({m.kind for m in MUTANTS})


def run(command, folder, emulated=False, **options):
    env = {k: v for k, v in os.environ.items() if not k.startswith("QUANTKIT_")}
    env |= {"FORCE_CPU": "1", "CXXFLAGS": "-O1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"QUANTKIT_BUILD_EMU": "1" if emulated else "0"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **options)


def build(folder, emulated):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return run(command, folder, emulated)


def tested(tests, folder, tier):
    """What failed first: None if nothing did, "" if that took too long."""
    # Verbose: where a test crashes, its name is the last line.
    command = [sys.executable, "-m", "pytest", "-x", "-vv", "--tb=line", *TIERS[tier], *tests]
    try:
        done = run(command, folder, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return ""  # a slow machine, for all that is known
    if done.returncode == 0:
        return None
    if done.returncode == 1 and (failed := failures(done)):
        return failed[0]
    begun = re.findall(
        r"^(tests/\S+::.+?)(?: (?:PASSED|SKIPPED|FAILED).*)?$", done.stdout, re.MULTILINE
    )
    if done.returncode < 0 and begun:
        return begun[-1].strip()
    raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")


def failures(done):
    return re.findall(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


def failing(tests, folder):
    """Those that fail where nothing is wrong: they have caught nothing."""
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=line", "--full", *dict.fromkeys(tests)]
    done = run(command, folder) if tests else None
    if done and done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return failures(done) if done else []


def check(mutant, right, folder):
    """(the tier that caught it, or "", the test that did)."""
    shutil.rmtree(folder)
    # With the times of the objects, so that only what changes is built.
    shutil.copytree(right, folder)
    file = folder / mutant.file
    source = file.read_text()
    assert source.count(mutant.text) == 1, f"{mutant.name}: its text is in {mutant.file} not once"
    file.write_text(source.replace(mutant.text, mutant.becomes))
    done = build(folder, mutant.emulated)
    assert done.returncode == 0, f"{mutant.name} does not compile:\n{done.stderr}"
    for tier in TIERS:
        how = tested(mutant.tests, folder, tier)
        if how:
            return tier, how
    return "", "did not end" if how == "" else ""


def sample(count, seed):
    """Mutants chosen at random, one of each kind among them."""
    chosen, rest = [], list(MUTANTS)
    random.Random(seed).shuffle(rest)
    for kind in KINDS:
        chosen.append(next(m for m in rest if m.kind == kind))
    rest = [m for m in rest if m not in chosen]
    return chosen + rest[: max(count - len(chosen), 0)]


def lines(results):
    """What became of each."""
    yield "| mistake | in | tier | caught by |"
    yield "|---|---|---|---|"
    for mutant, tier, how, _ in results:
        by = f"`{how}`" if tier else f"**survived** {how}"
        yield f"| {mutant.name} | `{mutant.file}` | {tier} | {by} |"


def write(results, before):
    """The list, and the counts of each kind that ran whole, beside those of the other kinds."""
    path = HERE / "results" / "mutants.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for kind in KINDS:
        some = [result for result in results if result[0].kind == kind]
        if len(some) == sum(m.kind == kind for m in MUTANTS):
            minutes = round(sum(seconds for *_, seconds in some) / 60)
            caught = Counter(tier or "survived" for _, tier, _, _ in some)
            kept[kind] = before | {"date": str(date.today()), "minutes": minutes, "caught": caught}
    for file, text in (
        (path, json.dumps(kept, indent=1)),
        (ROOT / "build" / "mutants.md", "\n".join(lines(results))),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text + "\n")
        print(f"written: {file.relative_to(ROOT)}")


def counted(results):
    tiers = [tier for _, tier, _, _ in results]
    caught = len(tiers) - tiers.count("")
    return f"{caught} of {len(tiers)} caught, {tiers.count('daily')} of them by make test"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="names, or the beginnings of some")
    parser.add_argument("--kind", choices=KINDS, help="those of one kind")
    parser.add_argument("--sample", type=int, metavar="N", help="N at random, 4 or more")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the sample")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if m.kind == (args.kind or m.kind)]
    chosen = [m for m in chosen if not args.names or m.name.startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(args.names)}")
    if args.sample is not None:
        if args.names or args.kind or args.sample < len(KINDS):
            parser.error(
                "--sample: expected at least one of each kind, 4, and neither names nor --kind"
            )
        chosen = sample(args.sample, args.seed)
        print(f"--sample {args.sample} --seed {args.seed}", flush=True)
    results, before = [], {"sources": hash_of(product_files())[:16], "commit": commit()}
    with tempfile.TemporaryDirectory() as temporary:
        folder, right = Path(temporary) / "changed", Path(temporary) / "right"
        copy_sources(folder)
        done = build(folder, any(m.emulated for m in chosen))
        assert done.returncode == 0, done.stderr
        shutil.copytree(folder, right)
        for mutant in chosen:
            start = time.monotonic()
            tier, how = check(mutant, right, folder)
            seconds = round(time.monotonic() - start)
            result = f"caught, {tier}" if tier else "SURVIVED"
            print(f"{result}  {mutant.name}  ({seconds} s)  {how}", flush=True)
            results.append((mutant, tier, how, seconds))
        wrong = failing([how for _, tier, how, _ in results if tier], right)
    for i, (mutant, _, how, seconds) in enumerate(results):
        if how in wrong:
            results[i] = (mutant, "", f"{how}, which fails without the mistake too", seconds)
            print(f"SURVIVED  {mutant.name}  {results[i][2]}")
    print(counted(results))
    if not args.names and args.sample is None:
        write(results, before)
    return 0 if all(tier for _, tier, _, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
