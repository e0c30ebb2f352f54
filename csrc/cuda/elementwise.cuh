// Kernels over elements whose parameters are there: quantize, dequantize, fake_quantize and its
// gradient.
//
// The elements are rows: the innermost level, and all others around it. A team of threads takes a
// part of a row with one set of parameters; where each element has its own, a team takes some
// columns of many rows and keeps their parameters in registers.
#pragma once

#include "memory.cuh"

namespace quantkit {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // vectors that a thread has under way

struct ElementwiseArgs {
  Dim dims[kMaxDims];         // of the rows, outermost first
  int32_t count;              // at least one
  int32_t team;               // threads that share a part of a row: a power of two up to kThreads
  int64_t rows, n;            // rows of n elements
  Offsets start;              // of the first row
  int64_t stride[kOperands];  // along a row
  int64_t parts;              // of a row
  bool ragged;                // some vectors are not whole
  int64_t height;  // rows that a team takes at a time where each element has its own parameters
  const void* x;
  const void* q_in;  // codes, a gradient or a mask
  void* q;           // codes or a mask
  void* y;
  Values scale, add, subtract;
  Operation operation;
  Type x_type, y_type;
  Format format;
  int64_t code_bytes;
  Steps steps;
  int32_t q_min, q_max;
  // As in Elementwise; a seed in the host's memory is among the arguments.
  const int64_t* seed;
  Draws draws;
  bool draws_randomly;
  int64_t first_index;
};

// What becomes of x: codes, and their reconstruction if `y` is given; or the reconstruction in x's
// type, and the mask of codes in range if `q` is given.
enum class Result { codes, fake };

// The float formats, which a kernel tells apart at run time.
struct FloatEncoder {
  static constexpr bool kInteger = false;
};

template <class E, class V>
__device__ __forceinline__ Encoded<V> encoded(Format format, V v, V low, V high, V from) {
  if constexpr (E::kInteger) {
    return E::encode(v, low, high, from);
  } else {
    return with_floats(format, [&](auto tag) -> Encoded<V> {
      using F = typename decltype(tag)::type;
      const Encoded<float> e = F::encode(float(v), float(low), float(high), float(from));
      return {e.code, e.number};
    });
  }
}
// Rounded randomly by u.
template <class E>
__device__ __forceinline__ Encoded<double> encoded_randomly(Format format, float v, float low,
                                                            float high, float u) {
  const auto made = [&](auto tag) -> Encoded<double> {
    const Encoded<float> e = decltype(tag)::type::encode_randomly(v, low, high, v, u);
    return {e.code, e.number};
  };
  if constexpr (E::kInteger)
    return made(Tag<E>());
  else
    return with_floats(format, made);
}
template <class E, class V>
__device__ __forceinline__ bool is_inside(V v, V low, V high) {
  if constexpr (E::kInteger)
    return E::inside(v, low, high) != 0;
  else
    return between(v, low, high) != 0;
}

// The element type of y.
template <class X, Result kResult>
struct Made {
  using type = X;
};
template <class X>
struct Made<X, Result::codes> {
  using type = float;
};

// The parameters of an element.
template <class D>
struct Own {
  Wide<D> scale, add;
  float subtract;
  float reciprocal;  // 0: divide

  __device__ __forceinline__ Own() : scale(0), add(0), subtract(0), reciprocal(0) {}
  __device__ __forceinline__ Own(Wide<D> scale_, Wide<D> add_, float subtract_)
      : scale(scale_), add(add_), subtract(subtract_), reciprocal(0) {
    if constexpr (sizeof(D) == 2) reciprocal = reciprocal_for_code<D>(scale, add);
  }
};

// Those that a whole row shares, of any type.
template <class D>
__device__ __forceinline__ Own<D> shared_steps(const ElementwiseArgs& a, const Offsets& at) {
  return {number<D, false>(a.scale, at.of[kScale]), number<D, true>(a.add, at.of[kZeroPoint]),
          number<float, false>(a.subtract, at.of[kZeroPoint])};
}
// One element's own, of type D.
template <class D>
__device__ __forceinline__ Own<D> own_steps(const ElementwiseArgs& a, const Offsets& at,
                                            int64_t i) {
  const int64_t zero_point = at.of[kZeroPoint] + i * a.stride[kZeroPoint];
  return {same_number<D>(a.scale, at.of[kScale] + i * a.stride[kScale]),
          same_number<D>(a.add, zero_point), same_number<D>(a.subtract, zero_point)};
}

// An element on its way to its results; kMultiply: all of its steps have a reciprocal.
template <class X, class D, class E, bool kMultiply = false>
struct Element {
  Wide<D> v, judged;  // judged: NaN where the quotient is

  __device__ __forceinline__ Element(X x, const Own<D>& s) {
    if constexpr (kMultiply) {
      const float quotient = widen(x) * s.reciprocal;
      v = affine_for_code<D, D>(quotient, s.add);
      judged = quotient;
    } else {
      const Wide<D> quotient = Wide<D>(widen(x)) / s.scale;
      v = E::kInteger ? affine<D, D>(quotient, s.add) : quotient;
      judged = v;
    }
  }

  __device__ __forceinline__ bool inside(const ElementwiseArgs& a) const {
    return is_inside<E>(v, Wide<D>(a.q_min), Wide<D>(a.q_max)) & (judged == judged);
  }
  __device__ __forceinline__ Encoded<Wide<D>> made(const ElementwiseArgs& a) const {
    return encoded<E>(a.format, v, Wide<D>(a.q_min), Wide<D>(a.q_max), judged);
  }
  __device__ __forceinline__ float back(const ElementwiseArgs& a, const Own<D>& s) const {
    return dequantized<float, float>(made(a).number, s.subtract, s.scale);
  }
};

// Calls f with the tag of the integer that holds a code.
template <class F>
__device__ __forceinline__ void with_stored(int64_t code_bytes, F f) {
  if (code_bytes == 1)
    f(Tag<int8_t>());
  else
    f(Tag<int16_t>());
}

// Codes, which are registers of 16 bits until here, in their format.
__device__ __forceinline__ void store_code(void* q, int64_t code_bytes, int64_t i, int16_t code) {
  with_stored(code_bytes, [&](auto tag) {
    using Q = typename decltype(tag)::type;
    store(static_cast<Q*>(q) + i, Q(code));
  });
}
template <int V>
__device__ __forceinline__ void store_codes(void* q, int64_t code_bytes, int64_t first,
                                            int64_t step, const Vector<int16_t, V>& codes) {
  with_stored(code_bytes, [&](auto tag) {
    using Q = typename decltype(tag)::type;
    Vector<Q, V> stored;
#pragma unroll
    for (int k = 0; k < V; ++k) stored.put(k, Q(codes.get(k)));
    store_vector<Q, V>(static_cast<Q*>(q) + first, step, stored);
  });
}

// What is done with a row: an operand's address decides where its vectors begin (kLead, that of the
// most bytes), and vector(steps) and element() make results of V elements and of one; steps(k)
// gives each its own.

template <class X, class D, class E, Result kResult>
struct Quantize {
  using Lead = X;
  using Step = D;
  using Y = typename Made<X, kResult>::type;
  static constexpr Operand kLead = kX;
  static constexpr int V = kVectorBytes / sizeof(X);
  static constexpr bool kCodes = kResult == Result::codes;
  static constexpr bool kMayMultiply = sizeof(X) == 2 && sizeof(D) == 2;
  using Held = Vector<X, V>;

  __device__ static __forceinline__ const X* lead(const ElementwiseArgs& a) {
    return static_cast<const X*>(a.x);
  }
  __device__ static __forceinline__ Held load_at(const ElementwiseArgs& a, const Offsets& at,
                                                 int64_t first) {
    return load_vector<X, V>(lead(a) + at.of[kX] + first);
  }

  template <bool kMultiply, class S>
  __device__ static __forceinline__ void vector(const ElementwiseArgs& a, const Held& x, S steps,
                                                const Offsets& at, int64_t first) {
    const int64_t q = at.of[kQ] + first * a.stride[kQ];
    Vector<int16_t, V> shorts;
    Vector<uint8_t, V> mask;
    Vector<Y, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Own<D> s = steps(k);
      const Element<X, D, E, kMultiply> e(x.get(k), s);
      if constexpr (kCodes)
        shorts.put(k, int16_t(e.made(a).code));
      else if (a.q != nullptr)
        mask.put(k, e.inside(a));
      if (a.y != nullptr) result.put(k, narrow<Y>(e.back(a, s)));
    }
    if constexpr (kCodes)
      store_codes<V>(a.q, a.code_bytes, q, a.stride[kQ], shorts);
    else if (a.q != nullptr)
      store_vector<uint8_t, V>(static_cast<uint8_t*>(a.q) + q, a.stride[kQ], mask);
    if (a.y != nullptr)
      store_vector<Y, V>(static_cast<Y*>(a.y) + at.of[kY] + first * a.stride[kY], a.stride[kY],
                         result);
  }

  __device__ static __forceinline__ void element(const ElementwiseArgs& a, const Own<D>& s,
                                                 const Offsets& at, int64_t i) {
    const Element<X, D, E> e(load(lead(a) + at.of[kX] + i * a.stride[kX]), s);
    const int64_t q = at.of[kQ] + i * a.stride[kQ];
    if constexpr (kCodes)
      store_code(a.q, a.code_bytes, q, int16_t(e.made(a).code));
    else if (a.q != nullptr)
      store(static_cast<uint8_t*>(a.q) + q, uint8_t(e.inside(a)));
    if (a.y != nullptr)
      store(static_cast<Y*>(a.y) + at.of[kY] + i * a.stride[kY], narrow<Y>(e.back(a, s)));
  }
};

// Of the steps only those back count.
template <class F>
struct Dequantize {
  using Q = typename F::Storage;
  using Lead = float;
  using Step = float;
  static constexpr Operand kLead = kY;
  static constexpr int V = kVectorBytes / sizeof(float);
  static constexpr bool kMayMultiply = false;
  using Held = Vector<Q, V>;

  __device__ static __forceinline__ const float* lead(const ElementwiseArgs& a) {
    return static_cast<const float*>(a.y);
  }
  __device__ static __forceinline__ Held load_at(const ElementwiseArgs& a, const Offsets& at,
                                                 int64_t first) {
    return load_vector<Q, V>(static_cast<const Q*>(a.q_in) + at.of[kQ] + first * a.stride[kQ],
                             a.stride[kQ]);
  }

  template <bool, class S>
  __device__ static __forceinline__ void vector(const ElementwiseArgs& a, const Held& q, S steps,
                                                const Offsets& at, int64_t first) {
    Vector<float, V> y;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Own<float> s = steps(k);
      y.put(k, dequantized<float, float>(F::number(q.get(k)), s.subtract, s.scale));
    }
    store_vector<float, V>(static_cast<float*>(a.y) + at.of[kY] + first, y);
  }

  __device__ static __forceinline__ void element(const ElementwiseArgs& a, const Own<float>& s,
                                                 const Offsets& at, int64_t i) {
    const Q q = load(static_cast<const Q*>(a.q_in) + at.of[kQ] + i * a.stride[kQ]);
    store(static_cast<float*>(a.y) + at.of[kY] + i * a.stride[kY],
          dequantized<float, float>(F::number(q), s.subtract, s.scale));
  }
};

struct Teams {
  int lane;
  int64_t first, stride;  // of the parts that this team takes
};
__device__ __forceinline__ Teams teams_of(int team) {
  const int64_t per_block = kThreads / team;
  return {int(threadIdx.x) % team, blockIdx.x * per_block + int(threadIdx.x) / team,
          gridDim.x * per_block};
}

// Calls body(offsets, part) for each part of a row that this team takes.
template <class Body>
__device__ __forceinline__ void for_parts(const ElementwiseArgs& a, const Teams& t, Body body) {
  for (int64_t item = t.first; item < a.rows * a.parts; item += t.stride) {
    const int64_t row = divided(item, a.parts);
    Offsets at = a.start;
    move(at, a.dims, 0, a.count, row);
    body(at, item - row * a.parts);
  }
}

// Calls body(offsets, part, height) for each block of rows and part of them; rows of a block lie
// one step of the innermost level around them apart.
template <class Body>
__device__ __forceinline__ void for_columns(const ElementwiseArgs& a, const Teams& t, Body body) {
  const int64_t size = a.dims[a.count - 1].size;
  const int64_t blocks = divided(size + a.height - 1, a.height);
  const int64_t items = divided(a.rows, size) * blocks * a.parts;
  for (int64_t item = t.first; item < items; item += t.stride) {
    const int64_t block = divided(item, a.parts), outer = divided(block, blocks);
    const int64_t top = (block - outer * blocks) * a.height;
    Offsets at = a.start;
    move(at, a.dims, 0, a.count, outer * size + top);
    body(at, item - block * a.parts, size - top < a.height ? size - top : a.height);
  }
}

__device__ __forceinline__ void step_row(const ElementwiseArgs& a, Offsets& at) {
#pragma unroll
  for (int o = kX; o <= kY; ++o) at.of[o] += a.dims[a.count - 1].stride[o];
}

template <class Work, bool kEach>
__device__ __forceinline__ void walk(const ElementwiseArgs& a) {
  using Lead = typename Work::Lead;
  using Step = typename Work::Step;
  constexpr int V = Work::V;
  const Teams t = teams_of(a.team);
  const Lead* const lead = Work::lead(a);
  const int64_t step = a.stride[Work::kLead];
  if constexpr (kEach) {
    for_columns(a, t, [&](Offsets at, int64_t part, int64_t height) {
      const Row<Lead, V> row(lead + at.of[Work::kLead], step, a.n);
      const int64_t first = (part * a.team + t.lane) * V - row.lead;
      if (first >= a.n) return;
      Own<Step> steps[V];
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (first + k >= 0 && first + k < a.n) steps[k] = own_steps<Step>(a, at, first + k);
      for (int64_t i = 0; i < height; ++i, step_row(a, at)) {
        if (first >= 0 && first + V <= a.n &&
            is_aligned<Lead, V>(lead + at.of[Work::kLead] + first, step))
          Work::template vector<false>(
              a, Work::load_at(a, at, first), [&](int k) { return steps[k]; }, at, first);
        else
          for_inside<V>(first, a.n,
                        [&](int64_t k) { Work::element(a, own_steps<Step>(a, at, k), at, k); });
      }
    });
  } else {
    for_parts(a, t, [&](const Offsets& at, int64_t part) {
      const Row<Lead, V> row(lead + at.of[Work::kLead], step, a.n);
      const auto first_of = [&](int u) {
        return ((part * kUnroll + u) * a.team + t.lane) * V - row.lead;
      };
      typename Work::Held held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (row.is_whole(first_of(u))) held[u] = Work::load_at(a, at, first_of(u));
      const Own<Step> steps = shared_steps<Step>(a, at);  // while the elements are on their way
      const auto same = [&](int) { return steps; };
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!row.is_whole(first_of(u))) continue;
        if (Work::kMayMultiply && steps.reciprocal != 0)
          Work::template vector<Work::kMayMultiply>(a, held[u], same, at, first_of(u));
        else
          Work::template vector<false>(a, held[u], same, at, first_of(u));
      }
      if (!a.ragged) return;
#pragma unroll 1
      for (int u = 0; u < kUnroll; ++u)
        if (!row.is_whole(first_of(u)))
          for_inside<V>(first_of(u), a.n, [&](int64_t i) { Work::element(a, steps, at, i); });
    });
  }
}

template <class X, class D, class E, Result kResult, bool kEach>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_kernel(const __grid_constant__ ElementwiseArgs a) {
  walk<Quantize<X, D, E, kResult>, kEach>(a);
}

template <class F, bool kEach>
__global__ void __launch_bounds__(kThreads, 2)
    dequantize_kernel(const __grid_constant__ ElementwiseArgs a) {
  walk<Dequantize<F>, kEach>(a);
}

}  // namespace
}  // namespace quantkit
