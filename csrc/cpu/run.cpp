#include "run.h"

#include <algorithm>
#include <memory>

#include "fpenv.h"

namespace quantkit {
namespace {

// Below this many elements a thread its start costs more than its help.
constexpr int64_t kGrain = 1 << 14;
// Borders between threads lie on multiples of this, so that none share a cache line.
constexpr int64_t kBorder = 64;
// Slabs are reduced and then quantized this many elements at a time: still in the core's own cache.
constexpr int64_t kBatch = 1 << 16;
// Up to this many parameters each thread may have keys of its own.
constexpr int64_t kPrivateKeys = 1 << 16;
// A thread clears and joins its keys: they must be few beside the elements it reads.
constexpr int64_t kPrivateShare = 16;

int64_t threads_for(int64_t elements, const Pool& pool) {
  if (forked_from_threads()) return 1;
  return std::max<int64_t>(1, std::min(pool.threads, elements / kGrain));
}

// Calls body(i) for every i below tasks, each in the contract's floating-point environment.
template <class Body>
void parallel(int64_t tasks, const Pool& pool, const Body& body) {
  if (tasks == 1) {
    FloatingPointGuard guard;
    body(int64_t(0));
    return;
  }
  use_threads();
  pool.run(
      tasks,
      [](int64_t i, void* context) {
        FloatingPointGuard guard;
        (*static_cast<const Body*>(context))(i);
      },
      const_cast<Body*>(&body));
}

// Where part i of `parts` of [0, n) begins.
int64_t border(int64_t n, int64_t i, int64_t parts, int64_t multiple) {
  if (i >= parts) return n;
  const int64_t at = static_cast<int64_t>(static_cast<__int128>(n) * i / parts);
  return at - at % multiple;
}

template <class Body>
void parallel_range(int64_t n, int64_t threads, const Pool& pool, const Body& body) {
  parallel(threads, pool, [&](int64_t i) {
    const int64_t begin = border(n, i, threads, kBorder), end = border(n, i + 1, threads, kBorder);
    if (begin < end) body(begin, end);
  });
}

// Parameters that no two slabs share: a slab after the other, each finished while it is in cache.
void run_slabs(const Dynamic& d, Range fused, int64_t slabs, int64_t threads, const Pool& pool) {
  const KernelTable& k = kernels();
  const int64_t elements = d.elements.shape.numel / slabs, parameters = d.parameters.numel / slabs;
  const int64_t batch = std::max<int64_t>(1, kBatch / elements);
  parallel(threads, pool, [&](int64_t i) {
    const int64_t last = border(slabs, i + 1, threads, 1);
    for (int64_t begin = border(slabs, i, threads, 1); begin < last; begin += batch) {
      const int64_t end = std::min(begin + batch, last);
      k.clear_keys(d, begin * parameters, end * parameters, d.zero_point, d.scale);
      k.reduce(d, Part{-1, 0, 0}, begin * elements, end * elements, d.zero_point, d.scale);
      k.finish(d, begin * parameters, end * parameters);
      if (fused != nullptr) fused(d.elements, begin * elements, end * elements);
    }
  });
}

// Each thread takes a part of a level that steps from parameter to parameter: no two meet.
void reduce_parts(const Dynamic& d, int32_t level, int64_t threads, const Pool& pool) {
  const Shape& shape = d.elements.shape;
  const int64_t size = shape.levels[level].size;
  kernels().clear_keys(d, 0, d.parameters.numel, d.zero_point, d.scale);
  const int64_t multiple = size >= threads * kBorder * 2 ? kBorder : 1;
  parallel(threads, pool, [&](int64_t i) {
    const Part part{level, border(size, i, threads, multiple), border(size, i + 1, threads, multiple)};
    const int64_t elements = shape.numel / size * (part.end - part.begin);
    kernels().reduce(d, part, 0, elements, d.zero_point, d.scale);
  });
}

// Few parameters, each met by many threads: keys of their own, joined at the end.
void reduce_privately(const Dynamic& d, int64_t threads, const Pool& pool) {
  const int64_t bytes = d.parameters.numel * size_of(d.p_type);
  const int64_t stride = (2 * bytes + 127) / 128 * 128;
  const std::unique_ptr<char[]> keys(new char[stride * threads]);
  const auto low = [&](int64_t i) { return keys.get() + i * stride; };
  const int64_t n = d.elements.shape.numel;
  parallel(threads, pool, [&](int64_t i) {
    const int64_t begin = border(n, i, threads, kBorder), end = border(n, i + 1, threads, kBorder);
    kernels().clear_keys(d, 0, d.parameters.numel, low(i), low(i) + bytes);
    kernels().reduce(d, Part{-1, 0, 0}, begin, end, low(i), low(i) + bytes);
  });
  kernels().clear_keys(d, 0, d.parameters.numel, d.zero_point, d.scale);
  for (int64_t i = 0; i < threads; ++i) kernels().join_keys(d, low(i), low(i) + bytes);
}

}  // namespace

Range range_of(Operation operation) {
  const KernelTable& k = kernels();
  switch (operation) {
    case Operation::none: return nullptr;
    case Operation::quantize: return k.quantize;
    case Operation::dequantize: return k.dequantize;
    case Operation::quantize_dequantize: return k.quantize_dequantize;
    case Operation::fake_quantize: return k.fake_quantize;
    default: return k.fake_quantize_backward;
  }
}

void run(Range function, const Elementwise& e, const Pool& pool) {
  const int64_t n = e.shape.numel;
  parallel_range(n, threads_for(n, pool), pool,
                 [&](int64_t begin, int64_t end) { function(e, begin, end); });
}

void run(const Conversion& c, const Pool& pool) {
  const int64_t n = c.shape.numel;
  parallel_range(n, threads_for(n, pool), pool,
                 [&](int64_t begin, int64_t end) { kernels().convert(c, begin, end); });
}

void run(const Dynamic& d, Range fused, const Pool& pool) {
  const Shape& shape = d.elements.shape;
  const int64_t threads = threads_for(shape.numel, pool);

  int64_t slabs = 1;
  for (int32_t k = 0; k < shape.count && shape.levels[k].step[kScale] != 0; ++k)
    slabs *= shape.levels[k].size;
  if (threads == 1 || slabs >= 4 * threads) return run_slabs(d, fused, slabs, threads, pool);

  int32_t widest = -1;
  for (int32_t k = 0; k < shape.count; ++k)
    if (shape.levels[k].step[kScale] != 0 &&
        (widest < 0 || shape.levels[k].size > shape.levels[widest].size))
      widest = k;
  // Keys of their own let threads read memory in one piece each.
  const bool few = d.parameters.numel <= kPrivateKeys &&
                   d.parameters.numel * threads * kPrivateShare <= shape.numel;
  if (few || widest < 0)
    reduce_privately(d, threads, pool);
  else
    reduce_parts(d, widest, threads, pool);
  const int64_t parameters = d.parameters.numel;
  parallel_range(parameters, threads_for(parameters, pool), pool,
                 [&](int64_t begin, int64_t end) { kernels().finish(d, begin, end); });
  if (fused == nullptr) return;
  // Backwards: what the reduction read last is still in a cache.
  const int64_t n = shape.numel;
  parallel_range(n, threads, pool, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t from = std::max(begin, (end - 1) / kBatch * kBatch);
      fused(d.elements, from, end);
      end = from;
    }
  });
}

}  // namespace quantkit
