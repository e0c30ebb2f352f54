// Kernels that choose parameters: extrema of integer keys (see numerics.h), which no order of the threads
// changes, then the parameters.
//
// rows_kernel: a team of threads for each set of elements with one scale, kept in registers from the
// reduction to the codes: one read. reduce_kernel: many blocks for each of few sets, joined by atomics.
// columns_kernel: sets that lie across memory, a thread for some neighbouring ones.
#pragma once

#include "elementwise.cuh"

namespace quantkit {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMostThreads = 512;  // of a block of rows_kernel
constexpr int kHeld = 4;           // vectors that a thread of it keeps

struct SetArgs {
  Level levels[kMaxLevels];  // first from set to set, then within one; each outermost first
  int32_t outer, count;      // levels of the first kind, and of both; each kind has at least one
  int32_t team;              // threads that share a set, or columns
  bool gathers;              // vectors do not lie within the innermost level
  int64_t sets, n;           // sets of n elements
  int64_t vectors;           // of a set, or of a row of columns
  bool ragged;               // some vectors are not whole
  int64_t parts;             // of a set or of the rows of columns, each reduced by a block
  Scheme scheme;
  const void* x;
  void* q;  // null: only parameters
  void* y;  // null: no reconstruction
  void* scale;
  void* zero_point;
  void* low;  // keys of each set: scratch
  void* high;
  Type x_type, p_type, q_type;
};

// 32 bits for types of up to 32: what atomics and shuffles take.
template <class X>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = long long;
};
template <class X>
using Key = typename KeyOf<X>::type;

template <class K>
constexpr K kGreatest = static_cast<K>(~(1ull << (sizeof(K) * 8 - 1)));

// The extrema of some elements: of magnitudes only `high`.
template <class X>
struct Keys {
  Key<X> low = kGreatest<Key<X>>, high = -kGreatest<Key<X>> - 1;

  template <bool kSymmetric>
  __device__ __forceinline__ void join(const Keys& other) {
    high = other.high > high ? other.high : high;
    if constexpr (!kSymmetric) low = other.low < low ? other.low : low;
  }
  template <bool kSymmetric>
  __device__ __forceinline__ void take(X x) {
    const Key<X> key = kSymmetric ? magnitude_key(x) : order_key(x);
    join<kSymmetric>({key, key});
  }
};

template <class X, int V, bool kSymmetric>
__device__ __forceinline__ void take_vector(Keys<X>& keys, const Vector<X, V>& v) {
#pragma unroll
  for (int k = 0; k < V; ++k) keys.template take<kSymmetric>(v.get(k));
}

// The extrema of a team of a power of two of neighbouring lanes, in each of them.
template <class X, bool kSymmetric>
__device__ __forceinline__ void join_lanes(Keys<X>& keys, int team) {
  for (int distance = team / 2; distance > 0; distance /= 2) {
    Keys<X> other;
    other.high = __shfl_xor_sync(kAllLanes, keys.high, distance);
    if constexpr (!kSymmetric) other.low = __shfl_xor_sync(kAllLanes, keys.low, distance);
    keys.template join<kSymmetric>(other);
  }
}

// What lies where in a set of one level: a row of all operands.
template <class X, int V>
struct Set : Row<X, V> {
  Offsets base;

  __device__ __forceinline__ Set(const SetArgs& a, int64_t set)
      : Set(a, set < a.sets ? a.n : 0, offsets(a, set)) {}
  // Element i of an operand.
  __device__ __forceinline__ int64_t at(const SetArgs& a, Operand o, int64_t i) const {
    return base.of[o] + i * a.levels[a.count - 1].step[o];
  }

 private:
  __device__ __forceinline__ Set(const SetArgs& a, int64_t n, const Offsets& base_)
      : Row<X, V>(static_cast<const X*>(a.x) + base_.of[kX], a.levels[a.count - 1].step[kX], n),
        base(base_) {}
  __device__ static __forceinline__ Offsets offsets(const SetArgs& a, int64_t set) {
    Offsets at = {};
    if (set < a.sets) move(at, a.levels, 0, a.outer, set);
    return at;
  }
};

// Parameters chosen from a set, of one type; the zero point is an integer or NaN.
template <class X>
struct Chosen {
  Wide<X> scale, zero_point;
  float reciprocal = 0;  // 0: divide

  __device__ __forceinline__ Chosen(X scale_, X zero_point_)
      : scale(widen(scale_)), zero_point(widen(zero_point_)) {
    if constexpr (sizeof(X) == 2) reciprocal = reciprocal_for_code<X>(scale, zero_point);
  }
};

template <class X, bool kSymmetric, bool kMultiply>
__device__ __forceinline__ int16_t chosen_code(const SetArgs& a, X x, const Chosen<X>& p) {
  using W = Wide<X>;
  const W quotient = kMultiply ? W(widen(x)) * W(p.reciprocal) : W(widen(x)) / p.scale;
  const W v = kSymmetric ? rounded_for_code<X>(quotient) : affine_for_code<X, X>(quotient, p.zero_point);
  const bool nan = (quotient != quotient) | (p.zero_point != p.zero_point);
  const auto bits = bit_cast<typename Traits<W>::Bits>(shifted_code(v, W(a.scheme.q_min), W(a.scheme.q_max)));
  return nan ? 0 : int16_t(bits);
}

template <class X, int V, bool kSymmetric, bool kMultiply>
__device__ __forceinline__ void quantize_of_set(const SetArgs& a, const Set<X, V>& set, int64_t first,
                                                const Vector<X, V>& x, const Chosen<X>& p) {
  const Level& inner = a.levels[a.count - 1];
  Vector<int16_t, V> shorts;
#pragma unroll
  for (int k = 0; k < V; ++k) shorts.put(k, chosen_code<X, kSymmetric, kMultiply>(a, x.get(k), p));
  store_codes<V>(a.q, a.q_type, set.at(a, kQ, first), inner.step[kQ], shorts);
  if (a.y == nullptr) return;
  Vector<float, V> y;
#pragma unroll
  for (int k = 0; k < V; ++k)
    y.put(k, dequantized<float, float>(float(shorts.get(k)), kSymmetric ? 0.0f : p.zero_point, p.scale));
  store_vector<float, V>(static_cast<float*>(a.y) + set.at(a, kY, first), inner.step[kY], y);
}

template <class X, int V, bool kSymmetric>
__device__ __forceinline__ void quantize_of_set(const SetArgs& a, const Set<X, V>& set, int64_t i,
                                                const Chosen<X>& p) {
  const X x = load(static_cast<const X*>(a.x) + set.at(a, kX, i));
  const int16_t code = chosen_code<X, kSymmetric, false>(a, x, p);
  store_code(a.q, a.q_type, set.at(a, kQ, i), code);
  if (a.y != nullptr)
    store(static_cast<float*>(a.y) + set.at(a, kY, i),
          dequantized<float, float>(float(code), kSymmetric ? 0.0f : p.zero_point, p.scale));
}

// The extrema of a block, in its first warp at least.
template <class X, bool kSymmetric>
__device__ __forceinline__ void join_block(Keys<X>& keys, int threads) {
  QK_SHARED(Key<X>, lows, kWarp);
  QK_SHARED(Key<X>, highs, kWarp);
  const int thread = threadIdx.x, warps = threads / kWarp;
  join_lanes<X, kSymmetric>(keys, kWarp);
  if (thread % kWarp == 0) {
    highs[thread / kWarp] = keys.high;
    if constexpr (!kSymmetric) lows[thread / kWarp] = keys.low;
  }
  __syncthreads();
  if (thread < kWarp) {
    keys = Keys<X>();
    if (thread < warps) {
      keys.high = highs[thread];
      if constexpr (!kSymmetric) keys.low = lows[thread];
    }
    join_lanes<X, kSymmetric>(keys, kWarp);
  }
}

template <class X, bool kSymmetric>
__global__ void __launch_bounds__(kMostThreads, 1) rows_kernel(const __grid_constant__ SetArgs a) {
  constexpr int V = kVectorBytes / sizeof(X);
  using Bits = typename Traits<X>::Bits;
  QK_SHARED(X, chosen, 2);
  const int team = a.team, lane = int(threadIdx.x) % team, per_block = blockDim.x / team;
  const int64_t tile = int64_t(team) * kHeld * V, tiles = divided(a.vectors * V + tile - 1, tile);
  // The same number of turns for all threads of a block: they meet at barriers and in shuffles.
  for (int64_t top = int64_t(blockIdx.x) * per_block; top < a.sets; top += int64_t(gridDim.x) * per_block) {
    const Set<X, V> set(a, top + int(threadIdx.x) / team);
    const auto first_of = [&](int64_t t, int u) {
      return ((t * kHeld + u) * team + lane) * V - set.lead;
    };
    // Calls body(i) for the elements of this thread's vectors of a tile that are not whole.
    const auto for_rest = [&](int64_t t, auto body) {
      if (!a.ragged) return;
#pragma unroll 1
      for (int u = 0; u < kHeld; ++u)
        if (!set.is_whole(first_of(t, u))) for_inside<V>(first_of(t, u), set.n, body);
    };

    Vector<X, V> held[kHeld];
    Keys<X> keys;
#pragma unroll 1
    for (int64_t t = 0; t < tiles; ++t) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if (set.is_whole(first_of(t, u))) held[u] = load_vector<X, V>(set.data + first_of(t, u));
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if (set.is_whole(first_of(t, u))) take_vector<X, V, kSymmetric>(keys, held[u]);
      for_rest(t, [&](int64_t i) { keys.template take<kSymmetric>(load(set.data + i * set.step)); });
    }

    X scale = {}, zero_point = {};
    if (team <= kWarp)
      join_lanes<X, kSymmetric>(keys, team);
    else
      join_block<X, kSymmetric>(keys, team);
    if (team <= kWarp || threadIdx.x == 0)
      parameters_of<X, X, kSymmetric>(Bits(keys.low), Bits(keys.high), a.scheme, scale, zero_point);
    if (team > kWarp) {
      if (threadIdx.x == 0) {
        chosen[0] = scale;
        chosen[1] = zero_point;
      }
      __syncthreads();
      scale = chosen[0];
      zero_point = chosen[1];
    }
    if (lane == 0 && set.n > 0) {
      store(static_cast<X*>(a.scale) + set.base.of[kScale], scale);
      store(static_cast<X*>(a.zero_point) + set.base.of[kScale], zero_point);
    }
    if (a.q == nullptr) continue;
    const Chosen<X> p(scale, zero_point);
    // Backwards: the last tile is still held.
#pragma unroll 1
    for (int64_t t = tiles - 1; t >= 0; --t) {
      if (t != tiles - 1) {
#pragma unroll
        for (int u = 0; u < kHeld; ++u)
          if (set.is_whole(first_of(t, u))) held[u] = load_vector<X, V>(set.data + first_of(t, u));
      }
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        if (!set.is_whole(first_of(t, u))) continue;
        if (sizeof(X) == 2 && p.reciprocal != 0)
          quantize_of_set<X, V, kSymmetric, true>(a, set, first_of(t, u), held[u], p);
        else
          quantize_of_set<X, V, kSymmetric, false>(a, set, first_of(t, u), held[u], p);
      }
      for_rest(t, [&](int64_t i) { quantize_of_set<X, V, kSymmetric>(a, set, i, p); });
    }
  }
}

template <class X, bool kSymmetric>
__device__ __forceinline__ void join_memory(const SetArgs& a, int64_t parameter, const Keys<X>& keys) {
  Key<X>* high = static_cast<Key<X>*>(a.high) + parameter;
  check_write(high, sizeof(*high));
  atomicMax(high, keys.high);
  if constexpr (!kSymmetric) {
    Key<X>* low = static_cast<Key<X>*>(a.low) + parameter;
    check_write(low, sizeof(*low));
    atomicMin(low, keys.low);
  }
}

// Of a set with several levels, elements in vectors within the innermost one where they fit it, else one by one.
template <class X, bool kSymmetric>
__device__ __forceinline__ void reduce_scattered(const SetArgs& a, const Offsets& base, int64_t part,
                                                 Keys<X>& keys) {
  constexpr int V = kVectorBytes / sizeof(X);
  const int width = a.gathers ? 1 : V;
  const int64_t step = a.levels[a.count - 1].step[kX], vectors = a.n / width;
  const int64_t each = divided(vectors + a.parts - 1, a.parts);
  const int64_t end = (part + 1) * each < vectors ? (part + 1) * each : vectors;
#pragma unroll 1
  for (int64_t j = part * each + int(threadIdx.x); j < end; j += kThreads) {
    const X* const x = static_cast<const X*>(a.x) + base.of[kX] +
                       offset_of(kX, a.levels, a.outer, a.count, j * width);
    if (!a.gathers && is_aligned<X, V>(x, step)) {
      take_vector<X, V, kSymmetric>(keys, load_vector<X, V>(x));
    } else {
#pragma unroll 1
      for (int k = 0; k < width; ++k) keys.template take<kSymmetric>(load(x + k * step));
    }
  }
}

template <class X, bool kSymmetric>
__device__ __forceinline__ void reduce_row(const SetArgs& a, const Set<X, kVectorBytes / sizeof(X)>& set,
                                           int64_t part, Keys<X>& keys) {
  constexpr int V = kVectorBytes / sizeof(X);
  const int64_t vectors = (a.n + set.lead + V - 1) / V, each = divided(vectors + a.parts - 1, a.parts);
  const int64_t end = (part + 1) * each < vectors ? (part + 1) * each : vectors;
#pragma unroll 1
  for (int64_t j = part * each + int(threadIdx.x); j < end; j += kHeld * kThreads) {
    Vector<X, V> held[kHeld];
    const auto first_of = [&](int u) { return (j + u * kThreads) * V - set.lead; };
    const auto whole = [&](int u) { return j + u * kThreads < end && set.is_whole(first_of(u)); };
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (whole(u)) held[u] = load_vector<X, V>(set.data + first_of(u));
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (whole(u)) take_vector<X, V, kSymmetric>(keys, held[u]);
#pragma unroll 1
    for (int u = 0; u < kHeld && j + u * kThreads < end; ++u) {
      if (set.is_whole(first_of(u))) continue;
      for_inside<V>(first_of(u), a.n,
                    [&](int64_t i) { keys.template take<kSymmetric>(load(set.data + i * set.step)); });
    }
  }
}

template <class X, bool kSymmetric>
__global__ void __launch_bounds__(kThreads, 2) reduce_kernel(const __grid_constant__ SetArgs a) {
  for (int64_t item = blockIdx.x; item < a.sets * a.parts; item += gridDim.x) {
    const int64_t index = divided(item, a.parts), part = item - index * a.parts;
    const Set<X, kVectorBytes / sizeof(X)> set(a, index);
    Keys<X> keys;
    if (a.count - a.outer == 1)
      reduce_row<X, kSymmetric>(a, set, part, keys);
    else
      reduce_scattered<X, kSymmetric>(a, set.base, part, keys);
    join_block<X, kSymmetric>(keys, kThreads);
    if (threadIdx.x == 0) join_memory<X, kSymmetric>(a, set.base.of[kScale], keys);
    __syncthreads();  // the next turn writes what this one's first warp reads
  }
}

// Here the innermost level of the first kind is the row of columns, and the levels of the second kind step
// from row to row: n rows.
template <class X, bool kSymmetric>
__global__ void __launch_bounds__(kThreads, 2) columns_kernel(const __grid_constant__ SetArgs a) {
  constexpr int V = kVectorBytes / sizeof(X);
  QK_SHARED(Key<X>, lows, kThreads * V);
  QK_SHARED(Key<X>, highs, kThreads * V);
  const X* const x = static_cast<const X*>(a.x);
  const Level& inner = a.levels[a.outer - 1];
  const int lane = int(threadIdx.x) % a.team, place = int(threadIdx.x) / a.team, high = kThreads / a.team;
  const int64_t pieces = divided(a.vectors + a.team - 1, a.team);
  const int64_t each = divided(a.n + a.parts - 1, a.parts), rows = divided(a.sets, inner.size);
  for (int64_t item = blockIdx.x; item < rows * pieces * a.parts; item += gridDim.x) {
    const int64_t piece = divided(item, a.parts), part = item - piece * a.parts;
    const int64_t row = divided(piece, pieces);
    Offsets base = {};
    move(base, a.levels, 0, a.outer, row * inner.size);
    const int lead = Row<X, V>(x + base.of[kX], inner.step[kX], inner.size).lead;
    const int64_t first = ((piece - row * pieces) * a.team + lane) * V - lead;
    const bool whole = first >= 0 && first + V <= inner.size;
    const int64_t end = (part + 1) * each < a.n ? (part + 1) * each : a.n;
    Keys<X> keys[V];
    if (first < inner.size) {
#pragma unroll 1
      for (int64_t i = part * each + place; i < end; i += high) {
        const X* const from = x + base.of[kX] + offset_of(kX, a.levels, a.outer, a.count, i) +
                              first * inner.step[kX];
        if (whole && is_aligned<X, V>(from, inner.step[kX])) {
          const Vector<X, V> v = load_vector<X, V>(from);
#pragma unroll
          for (int k = 0; k < V; ++k) keys[k].template take<kSymmetric>(v.get(k));
        } else {
#pragma unroll
          for (int k = 0; k < V; ++k)
            if (first + k >= 0 && first + k < inner.size)
              keys[k].template take<kSymmetric>(load(from + k * inner.step[kX]));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      highs[(place * V + k) * a.team + lane] = keys[k].high;
      if constexpr (!kSymmetric) lows[(place * V + k) * a.team + lane] = keys[k].low;
    }
    __syncthreads();
    // Each thread joins some columns.
    for (int c = threadIdx.x; c < a.team * V; c += kThreads) {
      const int64_t column = first - int64_t(lane) * V + (c % a.team) * V + c / a.team;
      Keys<X> joined;
      for (int p = 0; p < high; ++p) {
        Keys<X> other;
        other.high = highs[p * V * a.team + c];
        if constexpr (!kSymmetric) other.low = lows[p * V * a.team + c];
        joined.template join<kSymmetric>(other);
      }
      if (column >= 0 && column < inner.size)
        join_memory<X, kSymmetric>(a, base.of[kScale] + column * inner.step[kScale], joined);
    }
    __syncthreads();
  }
}

// Scratch: before the first element, and from keys to parameters.
template <class X>
__global__ void __launch_bounds__(kThreads, 2) clear_kernel(const __grid_constant__ SetArgs a) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x); i < a.sets; i += stride) {
    store(static_cast<Key<X>*>(a.low) + i, Keys<X>().low);
    store(static_cast<Key<X>*>(a.high) + i, Keys<X>().high);
  }
}

template <class X, class P>
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(const __grid_constant__ SetArgs a) {
  using Bits = typename Traits<X>::Bits;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x); i < a.sets; i += stride) {
    const Bits low = Bits(load(static_cast<const Key<X>*>(a.low) + i));
    const Bits high = Bits(load(static_cast<const Key<X>*>(a.high) + i));
    P scale, zero_point;
    if (a.scheme.symmetric)
      parameters_of<X, P, true>(low, high, a.scheme, scale, zero_point);
    else
      parameters_of<X, P, false>(low, high, a.scheme, scale, zero_point);
    store(static_cast<P*>(a.scale) + i, scale);
    store(static_cast<P*>(a.zero_point) + i, zero_point);
  }
}

}  // namespace
}  // namespace quantkit
