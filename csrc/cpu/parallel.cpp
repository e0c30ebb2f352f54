#include "parallel.h"

#include <algorithm>
#include <memory>
#include <mutex>

#include "fpenv.h"

namespace quantkit {
namespace {

// Below this many elements a thread its start costs more than its help.
constexpr int64_t kGrain = 1 << 14;
// Borders between threads lie on multiples of this, so that none share a cache line.
constexpr int64_t kBorder = 64;
// Slabs are reduced and then quantized this many elements at a time: still in the core's own cache.
constexpr int64_t kBatch = 1 << 16;
// Up to this many parameters each thread may have states of its own.
constexpr int64_t kPrivateStates = 1 << 16;
// A thread makes and joins its states: they must be few beside the elements it reads.
constexpr int64_t kPrivateShare = 16;
// Small calls need no memory beside the stack.
constexpr int64_t kStackBytes = 1 << 12;
// Pieces of a row whose elements have parameters of their own, apart from each other in memory.
constexpr int64_t kTile = 1024;

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

// Memory for the states of several threads, none on a cache line of another's.
class Scratch {
 public:
  Scratch(int64_t bytes, int64_t threads) : stride_(divided_up(bytes, 128) * 128) {
    if (stride_ * threads > kStackBytes) heap_.reset(new char[stride_ * threads]);
  }
  void* of(int64_t thread) { return (heap_ ? heap_.get() : stack_) + stride_ * thread; }

 private:
  int64_t stride_;
  std::unique_ptr<char[]> heap_;
  alignas(64) char stack_[kStackBytes];
};

// A call in slabs, which share no parameter: one after the other, each finished while it is in
// cache.
class Slabs {
 public:
  explicit Slabs(const Dynamic& given) : d_(given), reduced_(*given.reduced) {
    states_ = reduced_.number_states();
    parameters_ = reduced_.parameters();
    d_.reduced = &reduced_;
    d_.parameters = &parameters_;
    // Without repeats more of the outer dimensions may step from parameter to parameter.
    count_ = d_.elements.layout->slabs();
    states_ /= count_;
    batch_ = std::max<int64_t>(1, kBatch / (reduced_.numel / count_));
  }
  Slabs(const Slabs&) = delete;

  int64_t count() const { return count_; }
  const Dynamic& call() const { return d_; }
  int64_t bytes() const { return std::min(batch_, count_) * states_ * kernels().state_bytes(d_); }

  void run(int64_t begin, int64_t last, void* scratch) const {
    const KernelTable& k = kernels();
    const int64_t reduced = reduced_.numel / count_, elements = d_.elements.layout->numel / count_;
    for (; begin < last; begin += batch_) {
      const int64_t end = std::min(begin + batch_, last);
      const States states{scratch, begin * states_, (end - begin) * states_};
      k.first_states(d_, states);
      k.reduce(d_, begin * reduced, end * reduced, states);
      k.finalize(d_, begin * states_, end * states_, states);
      k.elementwise(d_.elements, begin * elements, end * elements);
    }
  }

 private:
  Dynamic d_;
  Layout reduced_, parameters_;
  int64_t count_, states_, batch_;
};

// Few parameters, each met by many threads: states of their own, joined at the end.
void run_jointly(const Dynamic& d, int64_t threads, const Pool& pool) {
  const KernelTable& k = kernels();
  const int64_t parameters = d.parameters->numel, n = d.reduced->numel;
  Scratch scratch(parameters * k.state_bytes(d), threads);
  const auto states = [&](int64_t thread) { return States{scratch.of(thread), 0, parameters}; };
  parallel(threads, pool, [&](int64_t i) {
    k.first_states(d, states(i));
    k.reduce(d, border(n, i, threads, kBorder), border(n, i + 1, threads, kBorder), states(i));
  });
  for (int64_t i = 1; i < threads; ++i) k.join(d, states(0), states(i));
  parallel_range(parameters, threads_for(parameters, pool), pool,
                 [&](int64_t begin, int64_t end) { k.finalize(d, begin, end, states(0)); });
  if (d.elements.operation == Operation::choose) return;
  // Backwards: what the reduction read last is still in a cache.
  parallel_range(d.elements.layout->numel, threads, pool, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t from = std::max(begin, (end - 1) / kBatch * kBatch);
      k.elementwise(d.elements, from, end);
      end = from;
    }
  });
}

// The dimension of the most parameters: its place among those that step from parameter to
// parameter.
int32_t widest(const Layout& parameters) {
  int32_t widest = 0;
  for (int32_t k = 1; k < parameters.count; ++k)
    if (parameters.dims[k].size > parameters.dims[widest].size) widest = k;
  return widest;
}

// Only [begin, end) of that dimension.
Layout part_of(const Layout& layout, int32_t place, int64_t begin, int64_t end) {
  int32_t k = 0;
  for (;; ++k)
    if (layout.dims[k].stride[kScale] != 0 && place-- == 0) return layout.part(k, begin, end);
}

// Each thread takes a part of a dimension that steps from parameter to parameter: no two meet.
void run_apart(const Dynamic& d, int64_t threads, const Pool& pool) {
  const int32_t place = widest(*d.parameters);
  const int64_t size = d.parameters->dims[place].size,
                multiple = size >= threads * kBorder * 2 ? kBorder : 1;
  const int64_t parameters = divided_up(size, threads) + multiple;
  Scratch scratch(d.parameters->numel / size * parameters * kernels().state_bytes(d), threads);
  parallel(threads, pool, [&](int64_t i) {
    const int64_t begin = border(size, i, threads, multiple),
                  end = border(size, i + 1, threads, multiple);
    if (begin == end) return;
    const Layout elements = part_of(*d.elements.layout, place, begin, end);
    const Layout reduced = part_of(*d.reduced, place, begin, end);
    Dynamic own = d;
    own.elements.layout = &elements;
    own.reduced = &reduced;
    const Slabs slabs(own);
    slabs.run(0, slabs.count(), scratch.of(i));
  });
}

}  // namespace

void run_on_cpu(const Elementwise& given, const Pool& pool) {
  Elementwise e = given;
  Layout layout = *given.layout;
  layout.tile(kTile);
  e.layout = &layout;
  const int64_t n = layout.numel;
  parallel_range(n, threads_for(n, pool), pool,
                 [&](int64_t begin, int64_t end) { kernels().elementwise(e, begin, end); });
}

void run_on_cpu(const Dynamic& given, const Pool& pool) {
  Dynamic d = given;
  Layout elements = *given.elements.layout;
  elements.tile(kTile);
  const Layout reduced = elements.without_repeats();
  d.elements.layout = &elements;
  d.reduced = &reduced;
  const Slabs slabs(d);
  const int64_t threads = threads_for(elements.numel, pool);
  if (threads == 1 || slabs.count() >= 4 * threads) {
    Scratch scratch(slabs.bytes(), threads);
    return parallel(threads, pool, [&](int64_t i) {
      slabs.run(border(slabs.count(), i, threads, 1), border(slabs.count(), i + 1, threads, 1),
                scratch.of(i));
    });
  }
  const int64_t parameters = slabs.call().parameters->numel;
  const bool few =
      parameters <= kPrivateStates && parameters * threads * kPrivateShare <= reduced.numel;
  if (few || parameters == 1)
    run_jointly(slabs.call(), threads, pool);
  else
    run_apart(slabs.call(), threads, pool);
}

// Each thread takes a run of elements, block after block, and adds what it measured to the block's.
void run_on_cpu(const Measure& m, const Pool& pool) {
  constexpr int64_t kMost = int64_t(1) << 28;  // elements between two carries
  const Layout& layout = *m.elements.layout;
  const Layout states = layout.states(), within = layout.within_state();
  const int64_t n = within.numel;
  std::mutex adding;
  parallel_range(layout.numel, threads_for(layout.numel, pool), pool,
                 [&](int64_t begin, int64_t end) {
                   for (; begin < end;) {
                     const int64_t state = begin / n, first = begin % n;
                     const int64_t count = std::min({end - begin, n - first, kMost});
                     Layout block = within;
                     int64_t rest = state;
                     for (int32_t k = states.count - 1; k >= 0; --k) {
                       for (int o = 0; o < kOperands; ++o)
                         block.offset[o] += rest % states.dims[k].size * states.dims[k].stride[o];
                       rest /= states.dims[k].size;
                     }
                     Elementwise e = m.elements;
                     e.layout = &block;
                     Measured own{};
                     kernels().measure(e, first, first + count, own);
                     carry(own.squares);
                     carry(own.errors);
                     const std::lock_guard<std::mutex> guard(adding);
                     join(m.blocks[block.offset[kState]], own);
                     begin += count;
                   }
                 });
}

void run_on_cpu(const Linear& l, const Pool& pool) {
  constexpr int64_t kProducts = 16;  // take as long as an element of other calls
  const LinearTable& kernel = linear_kernels();
  const int64_t tasks = kernel.tasks(l);
  const int64_t work = l.tokens * l.outputs / kProducts * l.depth;
  const int64_t threads = std::min(tasks, threads_for(work, pool));
  parallel(threads, pool, [&](int64_t i) {
    kernel.run(l, border(tasks, i, threads, 1), border(tasks, i + 1, threads, 1));
  });
}

void finish_on_cpu(const Measured* measured, int64_t count, const MeasuredOut& out) {
  FloatingPointGuard guard;
  for (int64_t i = 0; i < count; ++i)
    finish(
        measured[i], out, i, [](const auto* from) { return *from; },
        [](auto* to, auto v) { *to = v; });
}

}  // namespace quantkit
