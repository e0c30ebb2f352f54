// Kernels that choose parameters: a reduction (numerics/reductions.h), which no order of the
// threads changes, then the parameters.
//
// rows_kernel: a team of threads for each set of elements with one scale, kept in registers from
// the reduction to the codes: one read. reduce_kernel: many blocks for each of few sets, joined by
// atomics. columns_kernel: sets that lie across memory, a thread for some neighbouring ones.
#pragma once

#include "elementwise.cuh"

namespace quantkit {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMostThreads = 512;  // of a block of rows_kernel
constexpr int kHeld = 4;           // vectors that a thread of it keeps

struct SetArgs {
  Dim dims[kMaxDims];    // first from set to set, then within one; each outermost first
  Offsets start;         // of the first set
  int32_t outer, count;  // how many of the first kind, and of both; each kind has at least one
  int32_t team;          // threads that share a set, or columns
  bool gathers;          // vectors do not lie within the innermost level
  int64_t sets, n;       // sets of n elements
  int64_t vectors;       // of a set, or of a row of columns
  bool ragged;           // some vectors are not whole
  int64_t parts;         // of a set or of the rows of columns, each reduced by a block
  Scheme scheme;
  const void* x;
  void* q;  // null: only parameters
  void* y;  // null: no reconstruction
  void* scale;
  void* zero_point;
  void* stored;  // as in Dynamic
  Values global;
  bool each_global;
  void* keys;  // the states of all sets, each key in an array of its own: scratch
  Type x_type, p_type;
  int64_t code_bytes;
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

// The state of a reduction R over X in registers, in keys as wide as atomics take them.
template <class X, class R>
struct State {
  Key<X> keys[R::kKeys];

  // Before any element.
  __device__ __forceinline__ State() {
    keys[0] = R::template first<0>();
    if constexpr (R::kKeys > 1) keys[1] = R::template first<1>();
  }
  __device__ __forceinline__ void join(int k, Key<X> key) {
    keys[k] = k == 0 ? R::template join<0>(keys[k], key) : R::template join<1>(keys[k], key);
  }
  __device__ __forceinline__ void take(X x) {
    join(0, R::template take<0>(x));
    if constexpr (R::kKeys > 1) join(1, R::template take<1>(x));
  }
  template <class P>
  __device__ __forceinline__ void finalize(const Scheme& scheme, P& scale, P& zero_point) const {
    typename R::Bits own[R::kKeys];
#pragma unroll
    for (int k = 0; k < R::kKeys; ++k) own[k] = typename R::Bits(keys[k]);
    if constexpr (R::kKeys > 1)
      if (scheme.extremes) return Extremes<X>::finalize(own, scheme, scale, zero_point);
    R::finalize(own, scheme, scale, zero_point);
  }
};

template <class X, class R, int V>
__device__ __forceinline__ void take_vector(State<X, R>& state, const Vector<X, V>& v) {
#pragma unroll
  for (int k = 0; k < V; ++k) state.take(v.get(k));
}

// The state of a team of a power of two of neighbouring lanes, in each of them.
template <class X, class R>
__device__ __forceinline__ void join_lanes(State<X, R>& state, int team) {
  for (int distance = team / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < R::kKeys; ++k)
      state.join(k, __shfl_xor_sync(kAllLanes, state.keys[k], distance));
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
    return base.of[o] + i * a.dims[a.count - 1].stride[o];
  }

 private:
  __device__ __forceinline__ Set(const SetArgs& a, int64_t n, const Offsets& base_)
      : Row<X, V>(static_cast<const X*>(a.x) + base_.of[kX], a.dims[a.count - 1].stride[kX], n),
        base(base_) {}
  __device__ static __forceinline__ Offsets offsets(const SetArgs& a, int64_t set) {
    Offsets at = a.start;
    if (set < a.sets) move(at, a.dims, 0, a.outer, set);
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
__device__ __forceinline__ Encoded<Wide<X>> chosen_code(const SetArgs& a, X x, const Chosen<X>& p) {
  using W = Wide<X>;
  const W quotient = kMultiply ? W(widen(x)) * W(p.reciprocal) : W(widen(x)) / p.scale;
  const W v =
      kSymmetric ? rounded_for_code<X>(quotient) : affine_for_code<X, X>(quotient, p.zero_point);
  const W judged = p.zero_point != p.zero_point ? p.zero_point : quotient;
  return IntegerEncoder::encode(v, W(a.scheme.q_min), W(a.scheme.q_max), judged);
}

template <class X, int V, bool kSymmetric, bool kMultiply>
__device__ __forceinline__ void quantize_of_set(const SetArgs& a, const Set<X, V>& set,
                                                int64_t first, const Vector<X, V>& x,
                                                const Chosen<X>& p) {
  const Dim& inner = a.dims[a.count - 1];
  Vector<int16_t, V> shorts;
  Vector<float, V> y;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Encoded<Wide<X>> made = chosen_code<X, kSymmetric, kMultiply>(a, x.get(k), p);
    shorts.put(k, int16_t(made.code));
    y.put(k, dequantized<float, float>(made.number, kSymmetric ? 0.0f : p.zero_point, p.scale));
  }
  store_codes<V>(a.q, a.code_bytes, set.at(a, kQ, first), inner.stride[kQ], shorts);
  if (a.y == nullptr) return;
  store_vector<float, V>(static_cast<float*>(a.y) + set.at(a, kY, first), inner.stride[kY], y);
}

template <class X, int V, bool kSymmetric>
__device__ __forceinline__ void quantize_of_set(const SetArgs& a, const Set<X, V>& set, int64_t i,
                                                const Chosen<X>& p) {
  const X x = load(static_cast<const X*>(a.x) + set.at(a, kX, i));
  const Encoded<Wide<X>> made = chosen_code<X, kSymmetric, false>(a, x, p);
  store_code(a.q, a.code_bytes, set.at(a, kQ, i), int16_t(made.code));
  if (a.y != nullptr)
    store(static_cast<float*>(a.y) + set.at(a, kY, i),
          dequantized<float, float>(made.number, kSymmetric ? 0.0f : p.zero_point, p.scale));
}

// The state of a block, in its first warp at least.
template <class X, class R>
__device__ __forceinline__ void join_block(State<X, R>& state, int threads) {
  QK_SHARED(Key<X>, shared, kWarp * R::kKeys);
  const int thread = threadIdx.x, warps = threads / kWarp;
  join_lanes(state, kWarp);
  if (thread % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < R::kKeys; ++k) shared[k * kWarp + thread / kWarp] = state.keys[k];
  }
  __syncthreads();
  if (thread < kWarp) {
    state = State<X, R>();
    if (thread < warps) {
#pragma unroll
      for (int k = 0; k < R::kKeys; ++k) state.keys[k] = shared[k * kWarp + thread];
    }
    join_lanes(state, kWarp);
  }
}

template <class X, class R>
__global__ void __launch_bounds__(kMostThreads, 1) rows_kernel(const __grid_constant__ SetArgs a) {
  constexpr int V = kVectorBytes / sizeof(X);
  constexpr bool kSymmetric = R::kKeys == 1;
  QK_SHARED(X, chosen, 2);
  const int team = a.team, lane = int(threadIdx.x) % team, per_block = blockDim.x / team;
  const int64_t tile = int64_t(team) * kHeld * V, tiles = divided(a.vectors * V + tile - 1, tile);
  // The same number of turns for all threads of a block: they meet at barriers and in shuffles.
  for (int64_t top = int64_t(blockIdx.x) * per_block; top < a.sets;
       top += int64_t(gridDim.x) * per_block) {
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
    State<X, R> state;
#pragma unroll 1
    for (int64_t t = 0; t < tiles; ++t) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if (set.is_whole(first_of(t, u))) held[u] = load_vector<X, V>(set.data + first_of(t, u));
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if (set.is_whole(first_of(t, u))) take_vector<X, R, V>(state, held[u]);
      for_rest(t, [&](int64_t i) { state.take(load(set.data + i * set.step)); });
    }

    X scale = {}, zero_point = {};
    if (team <= kWarp)
      join_lanes(state, team);
    else
      join_block(state, team);
    if (team <= kWarp || threadIdx.x == 0) state.finalize(a.scheme, scale, zero_point);
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
      store(static_cast<X*>(a.zero_point) + set.base.of[kZeroPoint], zero_point);
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
        if (sizeof(X) > 2 || p.reciprocal != 0)
          quantize_of_set<X, V, kSymmetric, (sizeof(X) == 2)>(a, set, first_of(t, u), held[u], p);
        else  // a scale so large, small or broken that vectors of divisions do not pay
          for_inside<V>(first_of(t, u), set.n,
                        [&](int64_t i) { quantize_of_set<X, V, kSymmetric>(a, set, i, p); });
      }
      for_rest(t, [&](int64_t i) { quantize_of_set<X, V, kSymmetric>(a, set, i, p); });
    }
  }
}

template <class X, class R>
__device__ __forceinline__ void join_memory(const SetArgs& a, int64_t place,
                                            const State<X, R>& state) {
#pragma unroll
  for (int k = 0; k < R::kKeys; ++k) {
    Key<X>* const key = static_cast<Key<X>*>(a.keys) + k * a.sets + place;
    check_write(key, sizeof(*key));
    if (k == 0)
      atomicMax(key, state.keys[k]);
    else
      atomicMin(key, state.keys[k]);
  }
}

// Of a set with several dims, elements in vectors within the innermost one where they fit it, else
// one by one.
template <class X, class R>
__device__ __forceinline__ void reduce_scattered(const SetArgs& a, const Offsets& base,
                                                 int64_t part, State<X, R>& state) {
  constexpr int V = kVectorBytes / sizeof(X);
  const int width = a.gathers ? 1 : V;
  const int64_t step = a.dims[a.count - 1].stride[kX], vectors = a.n / width;
  const int64_t each = divided(vectors + a.parts - 1, a.parts);
  const int64_t end = (part + 1) * each < vectors ? (part + 1) * each : vectors;
#pragma unroll 1
  for (int64_t j = part * each + int(threadIdx.x); j < end; j += kThreads) {
    const X* const x = static_cast<const X*>(a.x) + base.of[kX] +
                       offset_of(kX, a.dims, a.outer, a.count, j * width);
    if (!a.gathers && is_aligned<X, V>(x, step)) {
      take_vector<X, R, V>(state, load_vector<X, V>(x));
    } else {
#pragma unroll 1
      for (int k = 0; k < width; ++k) state.take(load(x + k * step));
    }
  }
}

template <class X, class R>
__device__ __forceinline__ void reduce_row(const SetArgs& a,
                                           const Set<X, kVectorBytes / sizeof(X)>& set,
                                           int64_t part, State<X, R>& state) {
  constexpr int V = kVectorBytes / sizeof(X);
  const int64_t vectors = (a.n + set.lead + V - 1) / V,
                each = divided(vectors + a.parts - 1, a.parts);
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
      if (whole(u)) take_vector<X, R, V>(state, held[u]);
#pragma unroll 1
    for (int u = 0; u < kHeld && j + u * kThreads < end; ++u) {
      if (set.is_whole(first_of(u))) continue;
      for_inside<V>(first_of(u), a.n,
                    [&](int64_t i) { state.take(load(set.data + i * set.step)); });
    }
  }
}

template <class X, class R>
__global__ void __launch_bounds__(kThreads, 2) reduce_kernel(const __grid_constant__ SetArgs a) {
  for (int64_t item = blockIdx.x; item < a.sets * a.parts; item += gridDim.x) {
    const int64_t index = divided(item, a.parts), part = item - index * a.parts;
    const Set<X, kVectorBytes / sizeof(X)> set(a, index);
    State<X, R> state;
    if (a.count - a.outer == 1)
      reduce_row(a, set, part, state);
    else
      reduce_scattered(a, set.base, part, state);
    join_block(state, kThreads);
    if (threadIdx.x == 0) join_memory(a, set.base.of[kState], state);
    __syncthreads();  // the next turn writes what this one's first warp reads
  }
}

// Here the innermost level of the first kind is the row of columns, and the dims of the second kind
// step from row to row: n rows.
template <class X, class R>
__global__ void __launch_bounds__(kThreads, 2) columns_kernel(const __grid_constant__ SetArgs a) {
  constexpr int V = kVectorBytes / sizeof(X);
  constexpr int kAll = kThreads * V;
  QK_SHARED(Key<X>, shared, kAll * R::kKeys);
  const X* const x = static_cast<const X*>(a.x);
  const Dim& inner = a.dims[a.outer - 1];
  const int lane = int(threadIdx.x) % a.team, place = int(threadIdx.x) / a.team,
            high = kThreads / a.team;
  const int64_t pieces = divided(a.vectors + a.team - 1, a.team);
  const int64_t each = divided(a.n + a.parts - 1, a.parts), rows = divided(a.sets, inner.size);
  for (int64_t item = blockIdx.x; item < rows * pieces * a.parts; item += gridDim.x) {
    const int64_t piece = divided(item, a.parts), part = item - piece * a.parts;
    const int64_t row = divided(piece, pieces);
    Offsets base = a.start;
    move(base, a.dims, 0, a.outer, row * inner.size);
    const int lead = Row<X, V>(x + base.of[kX], inner.stride[kX], inner.size).lead;
    const int64_t first = ((piece - row * pieces) * a.team + lane) * V - lead;
    const bool whole = first >= 0 && first + V <= inner.size;
    const int64_t end = (part + 1) * each < a.n ? (part + 1) * each : a.n;
    State<X, R> states[V];
    if (first < inner.size) {
#pragma unroll 1
      for (int64_t i = part * each + place; i < end; i += high) {
        const X* const from =
            x + base.of[kX] + offset_of(kX, a.dims, a.outer, a.count, i) + first * inner.stride[kX];
        if (whole && is_aligned<X, V>(from, inner.stride[kX])) {
          const Vector<X, V> v = load_vector<X, V>(from);
#pragma unroll
          for (int k = 0; k < V; ++k) states[k].take(v.get(k));
        } else {
#pragma unroll
          for (int k = 0; k < V; ++k)
            if (first + k >= 0 && first + k < inner.size)
              states[k].take(load(from + k * inner.stride[kX]));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
#pragma unroll
      for (int key = 0; key < R::kKeys; ++key)
        shared[key * kAll + (place * V + k) * a.team + lane] = states[k].keys[key];
    }
    __syncthreads();
    // Each thread joins some columns.
    for (int c = threadIdx.x; c < a.team * V; c += kThreads) {
      const int64_t column = first - int64_t(lane) * V + (c % a.team) * V + c / a.team;
      State<X, R> joined;
      for (int p = 0; p < high; ++p) {
#pragma unroll
        for (int key = 0; key < R::kKeys; ++key)
          joined.join(key, shared[key * kAll + p * V * a.team + c]);
      }
      if (column >= 0 && column < inner.size)
        join_memory(a, base.of[kState] + column * inner.stride[kState], joined);
    }
    __syncthreads();
  }
}

// Scratch: before the first element, and from states to parameters.
template <class X, class R>
__global__ void __launch_bounds__(kThreads, 2) clear_kernel(const __grid_constant__ SetArgs a) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const State<X, R> first;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x); i < a.sets; i += stride) {
#pragma unroll
    for (int k = 0; k < R::kKeys; ++k)
      store(static_cast<Key<X>*>(a.keys) + k * a.sets + i, first.keys[k]);
  }
}

// A symmetric scale that is stored as another number than the steps use.
template <class X>
__device__ __forceinline__ void store_scale(const SetArgs& a, int64_t at,
                                            const State<X, AbsMax<X>>& state) {
  const typename AbsMax<X>::Bits key = state.keys[0];
  const float max_abs = AbsMax<X>::template extreme<float>(&key),
              global = number<float, false>(a.global, a.each_global ? at : 0);
  const StoredScale made = with_stored(
      a.scheme, [&](auto tag) { return decltype(tag)::type::of(max_abs, global, a.scheme); });
  if (a.scheme.stored == Stored::number)
    store(static_cast<int32_t*>(a.stored) + at, made.bits);
  else
    store(static_cast<uint8_t*>(a.stored) + at, uint8_t(made.bits));
  if (a.scale != nullptr) store(static_cast<float*>(a.scale) + at, made.used);
}

template <class X, class P, class R>
__global__ void __launch_bounds__(kThreads, 2) finalize_kernel(const __grid_constant__ SetArgs a) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x); i < a.sets; i += stride) {
    Offsets at = a.start;
    move(at, a.dims, 0, a.outer, i);
    State<X, R> state;
#pragma unroll
    for (int k = 0; k < R::kKeys; ++k)
      state.keys[k] = load(static_cast<const Key<X>*>(a.keys) + k * a.sets + at.of[kState]);
    if constexpr (sizeof(P) == 4 && R::kKeys == 1) {
      if (a.stored != nullptr) {
        store_scale<X>(a, at.of[kScale], state);
        continue;
      }
    }
    P scale, zero_point;
    state.finalize(a.scheme, scale, zero_point);
    store(static_cast<P*>(a.scale) + at.of[kScale], scale);
    if (a.zero_point != nullptr)
      store(static_cast<P*>(a.zero_point) + at.of[kZeroPoint], zero_point);
  }
}

}  // namespace
}  // namespace quantkit
