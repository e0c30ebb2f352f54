// The CUDA kernels as one more instruction set of a development build: run by the emulator.

#define QUANTKIT_EMULATE
#include "../../csrc/cuda/dynamic.cuh"
#include "../../csrc/cuda/linear.cuh"
#include "../../csrc/cuda/measure.cuh"
#include "recorder.h"

namespace quantkit {
namespace {

// As a small GPU, where threads take several items in turn, and as a larger one, where sets are
// split, by turns.
constexpr int64_t kBlocksPerProcessor = 4;
thread_local unsigned turn = 0;
int64_t multiprocessors() { return turn % 2 != 0 ? 2 : 20; }

// ---- the memory of a launch ---------------------------------------------------------------------

void add(emu::Buffers& buffers, const char* name, const void* data, int64_t last, int64_t size,
         bool writable) {
  if (data == nullptr) return;
  const char* const begin = static_cast<const char*>(data);
  buffers.push_back({name, begin, begin + (last + 1) * size, writable});
}

// The last element of an operand.
int64_t last_of(Operand o, const Dim* dims, int count) {
  int64_t last = 0;
  for (int k = 0; k < count; ++k) last += (dims[k].size - 1) * dims[k].stride[o];
  return last;
}

emu::Buffers buffers_of(const ElementwiseArgs& a) {
  emu::Buffers buffers;
  const int64_t beside = size_beside(a.operation, a.format, a.y_type);
  const auto last = [&](Operand o) {
    return a.start.of[o] + last_of(o, a.dims, a.count) + (a.n - 1) * a.stride[o];
  };
  add(buffers, "x", a.x, last(kX), a.x == nullptr ? 0 : size_of(a.x_type), false);
  const int64_t codes = per_byte(a.format);
  add(buffers, "q_in", a.q_in, last(kQ), a.operation == Operation::pack ? codes : beside, false);
  add(buffers, "q", a.q, last(kQ), a.operation == Operation::unpack ? codes : beside, true);
  add(buffers, "y", a.y, last(kY), size_of(a.y_type), true);
  for (const Values* p : {&a.scale, &a.add, &a.subtract})
    add(buffers, p == &a.scale ? "scale" : "zero_point", p->data,
        last(p == &a.scale ? kScale : kZeroPoint), size_of(p->type), false);
  add(buffers, "seed", a.seed, 1, sizeof(int64_t), false);
  return buffers;
}

emu::Buffers buffers_of(const SetArgs& a) {
  emu::Buffers buffers;
  const auto last = [&](Operand o) { return a.start.of[o] + last_of(o, a.dims, a.count); };
  add(buffers, "x", a.x, last(kX), size_of(a.x_type), false);
  add(buffers, "q", a.q, last(kQ), a.code_bytes, true);
  add(buffers, "x_hat", a.y, last(kY), 4, true);
  add(buffers, "scale", a.scale, last(kScale), size_of(a.p_type), true);
  add(buffers, "zero_point", a.zero_point, last(kZeroPoint), size_of(a.p_type), true);
  add(buffers, "stored", a.stored, last(kScale), size_of(a.scheme.stored), true);
  add(buffers, "global_scale", a.global.data, a.each_global ? last(kScale) : 0,
      size_of(a.global.type), false);
  add(buffers, "keys", a.keys, (a.scheme.symmetric ? 1 : 2) * a.sets - 1,
      a.x_type == Type::f64 ? 8 : 4, true);
  return buffers;
}

emu::Buffers buffers_of(const MeasureArgs& a) {
  emu::Buffers buffers = buffers_of(a.e);
  add(buffers, "measured", a.measured, a.e.start.of[kState] + last_of(kState, a.e.dims, a.e.count),
      sizeof(Measured), true);
  return buffers;
}

emu::Buffers buffers_of(const FinishArgs& a) {
  emu::Buffers buffers;
  add(buffers, "measured", a.measured, a.n - 1, sizeof(Measured), false);
  add(buffers, "squares", a.out.squares, a.n - 1, 8, true);
  add(buffers, "squared_errors", a.out.errors, a.n - 1, 8, true);
  add(buffers, "limbs", a.out.digits, 2 * kDigits * a.n - 1, 8, true);
  add(buffers, "max_error", a.out.max_error, a.n - 1, 4, true);
  add(buffers, "counts", a.out.counts, 2 * a.n - 1, 8, true);
  return buffers;
}

emu::Buffers buffers_of(const Linear& l) {
  emu::Buffers buffers;
  add(buffers, "sums", l.sums, (l.tokens - 1) * l.sums_stride + l.outputs - 1, 4, false);
  add(buffers, "x_scale", l.x_scale, l.tokens - 1, 4, false);
  add(buffers, "scale", l.scale, l.each_scale ? l.outputs - 1 : 0, 4, false);
  add(buffers, "bias", l.bias, l.outputs - 1, 4, false);
  add(buffers, "y", l.y, l.tokens * l.outputs - 1, size_of(l.y_type), true);
  return buffers;
}

// The stream of a call: every launch of it must go there.
char stream_of_call;

template <class Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int threads, void* stream,
                   const Args& args) {
  static_assert(sizeof(Args) <= 4096, "more than a kernel's arguments may be");
  if (stream != &stream_of_call) throw emu::Fault("a launch on another stream");
  // The largest of __launch_bounds__ (tests/test_cuda.py reads each kernel's).
  if (threads > (std::is_same<Args, SetArgs>::value ? kMostThreads : kThreads))
    throw emu::Fault("a block of " + std::to_string(threads) +
                     " threads, more than its launch bounds");
  emu::launch(blocks, threads, buffers_of(args), [&] { kernel(args); });
  return nullptr;
}

}  // namespace
}  // namespace quantkit

#include "../../csrc/cuda/run.cuh"

namespace quantkit {
namespace {

// One value reaches a kernel in memory or, from the host's memory, among its arguments: here by
// turns.
Elementwise by_turns(const Elementwise& elements) {
  Elementwise e = elements;
  bool scale = e.scale.data != nullptr && e.layout->offset[kScale] == 0;
  bool zero_point = e.add.data != nullptr && e.layout->offset[kZeroPoint] == 0;
  for (int k = 0; k < e.layout->count; ++k) {
    scale &= e.layout->dims[k].stride[kScale] == 0;
    zero_point &= e.layout->dims[k].stride[kZeroPoint] == 0;
  }
  ++turn;
  e.scale.on_host = scale && turn / 2 % 2 != 0;
  e.add.on_host = e.subtract.on_host = zero_point && turn / 4 % 2 != 0;
  e.seed_on_host = turn / 8 % 2 != 0;
  return e;
}
const char* run_by_turns(const Elementwise& elements, void*) {
  const Elementwise e = by_turns(elements);
  const auto run = [&] { return run_elementwise(e, &stream_of_call); };
  return recorded::record(elements, run);
}

int64_t scratch_bytes_by_turns(const Dynamic& d) {
  ++turn;
  return scratch_bytes(d);
}
const char* run_dynamic_on_stream(const Dynamic& d, void* scratch, void*) {
  const auto run = [&] { return run_dynamic(d, scratch, &stream_of_call); };
  return recorded::record(d, run);
}

const char* measure_by_turns(const Measure& m, void*) {
  const auto run = [&] { return run_measure({by_turns(m.elements), m.blocks}, &stream_of_call); };
  return recorded::record(m, run);
}
const char* finish_on_stream(const Measured* measured, int64_t count, const MeasuredOut& out,
                             void*) {
  return run_finish(measured, count, out, &stream_of_call);
}

const char* linear_on_stream(const Linear& l, void*) {
  ++turn;
  return run_linear(l, &stream_of_call);
}

}  // namespace

extern const LaunchTable cuda_emu_table;
const LaunchTable cuda_emu_table = {run_by_turns,     scratch_bytes_by_turns, run_dynamic_on_stream,
                                    measure_by_turns, finish_on_stream,       linear_on_stream};
}  // namespace quantkit
