// Kernels over elements whose parameters are there: quantize, dequantize, fake_quantize and its gradient.
//
// The elements are rows: the innermost level, and all others around it. A team of threads takes a part of a
// row with one set of parameters; where each element has its own, a team takes some columns of many rows
// and keeps their parameters in registers.
#pragma once

#include "memory.cuh"

namespace quantkit {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // vectors that a thread has under way

struct ElementwiseArgs {
  Level levels[kMaxLevels];  // of the rows, outermost first
  int32_t count;             // at least one
  int32_t team;              // threads that share a part of a row: a power of two up to kThreads
  int64_t rows, n;           // rows of n elements
  int64_t step[kOperands];   // along a row
  int64_t parts;             // of a row
  bool ragged;               // some vectors are not whole
  int64_t height;            // rows that a team takes at a time where each element has its own parameters
  const void* x;
  const void* q_in;
  void* q;
  void* y;
  Numbers scale, add, subtract;
  Type x_type, q_type, y_type;
  Type divide_type, add_type, subtract_type, scale_type;
  int32_t q_min, q_max;
};

// What becomes of x: codes, codes and their reconstruction, the reconstruction in x's type, or the gradient
// where the code is in range.
enum class Result { codes, both, fake, gradient };

// The element type of y.
template <class X, Result kResult>
struct Made {
  using type = X;
};
template <class X>
struct Made<X, Result::both> {
  using type = float;
};

// The parameters of an element.
template <class D>
struct Steps {
  Wide<D> scale, add;
  float subtract;
  float reciprocal;  // 0: divide

  __device__ __forceinline__ Steps() : scale(0), add(0), subtract(0), reciprocal(0) {}
  __device__ __forceinline__ Steps(Wide<D> scale_, Wide<D> add_, float subtract_)
      : scale(scale_), add(add_), subtract(subtract_), reciprocal(0) {
    if constexpr (sizeof(D) == 2) reciprocal = reciprocal_for_code<D>(scale, add);
  }
};

// Those that a whole row shares, of any type.
template <class D>
__device__ __forceinline__ Steps<D> shared_steps(const ElementwiseArgs& a, const Offsets& at) {
  return {number<D, false>(a.scale, at.of[kScale]), number<D, true>(a.add, at.of[kZeroPoint]),
          number<float, false>(a.subtract, at.of[kZeroPoint])};
}
// One element's own, of type D.
template <class D>
__device__ __forceinline__ Steps<D> own_steps(const ElementwiseArgs& a, const Offsets& at, int64_t i) {
  const int64_t zero_point = at.of[kZeroPoint] + i * a.step[kZeroPoint];
  return {same_number<D>(a.scale, at.of[kScale] + i * a.step[kScale]), same_number<D>(a.add, zero_point),
          same_number<D>(a.subtract, zero_point)};
}

// An element on its way to its results; kMultiply: all of its steps have a reciprocal.
template <class X, class D, bool kMultiply = false>
struct Element {
  Wide<D> v;
  bool nan;

  __device__ __forceinline__ Element(X x, const Steps<D>& s) {
    if constexpr (kMultiply) {
      const float quotient = widen(x) * s.reciprocal;
      v = affine_for_code<D, D>(quotient, s.add);
      nan = quotient != quotient;
    } else {
      v = affine<D, D>(Wide<D>(widen(x)) / s.scale, s.add);
      nan = v != v;
    }
  }

  __device__ __forceinline__ bool inside(const ElementwiseArgs& a) const {
    return in_range(v, Wide<D>(a.q_min), Wide<D>(a.q_max)) & !nan;
  }
  __device__ __forceinline__ int16_t code(const ElementwiseArgs& a) const {
    const Wide<D> shifted = shifted_code(v, Wide<D>(a.q_min), Wide<D>(a.q_max));
    return nan ? 0 : int16_t(bit_cast<typename Traits<Wide<D>>::Bits>(shifted));
  }
  __device__ __forceinline__ float back(const ElementwiseArgs& a, const Steps<D>& s) const {
    const Wide<D> shifted = shifted_code(v, Wide<D>(a.q_min), Wide<D>(a.q_max));
    return dequantized<float, float>(nan ? 0.0f : float(shifted - Shifter<Wide<D>>::value), s.subtract,
                                     s.scale);
  }
};

template <class Y>
__device__ __forceinline__ Y select(bool inside, Y y) {
  return inside ? y : bit_cast<Y>(typename Traits<Y>::Bits(0));
}

// Codes as int16, or the low byte of each as int8 or uint8.
__device__ __forceinline__ void store_code(void* q, Type type, int64_t i, int16_t code) {
  if (type == Type::i16)
    store(static_cast<int16_t*>(q) + i, code);
  else
    store(static_cast<int8_t*>(q) + i, int8_t(code));
}
template <int V>
__device__ __forceinline__ void store_codes(void* q, Type type, int64_t first, int64_t step,
                                            const Vector<int16_t, V>& codes) {
  if (type == Type::i16) {
    store_vector<int16_t, V>(static_cast<int16_t*>(q) + first, step, codes);
  } else {
    Vector<int8_t, V> bytes;
#pragma unroll
    for (int k = 0; k < V; ++k) bytes.put(k, int8_t(codes.get(k)));
    store_vector<int8_t, V>(static_cast<int8_t*>(q) + first, step, bytes);
  }
}

// What is done with a row: an operand's address decides where its vectors begin (kLead, that of the most
// bytes), and vector(steps) and element() make results of V elements and of one; steps(k) gives each its own.

template <class X, class D, Result kResult>
struct Quantize {
  using Lead = X;
  using Step = D;
  using Y = typename Made<X, kResult>::type;
  static constexpr Operand kLead = kX;
  static constexpr int V = kVectorBytes / sizeof(X);
  static constexpr bool kCodes = kResult == Result::codes || kResult == Result::both;
  static constexpr bool kBack = kResult == Result::both || kResult == Result::fake;
  static constexpr bool kMayMultiply = sizeof(X) == 2 && sizeof(D) == 2 && kResult != Result::gradient;
  using Held = Vector<X, V>;

  __device__ static __forceinline__ const X* lead(const ElementwiseArgs& a) {
    return static_cast<const X*>(a.x);
  }
  __device__ static __forceinline__ Held load_at(const ElementwiseArgs& a, const Offsets& at, int64_t first) {
    return load_vector<X, V>(lead(a) + at.of[kX] + first);
  }

  template <bool kMultiply, class S>
  __device__ static __forceinline__ void vector(const ElementwiseArgs& a, const Held& x, S steps,
                                                const Offsets& at, int64_t first) {
    const int64_t q = at.of[kQ] + first * a.step[kQ];
    Vector<int16_t, V> shorts;
    Vector<Y, V> result, grad;
    if constexpr (kResult == Result::gradient)
      grad = load_vector<Y, V>(static_cast<const Y*>(a.q_in) + q, a.step[kQ]);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Steps<D> s = steps(k);
      const Element<X, D, kMultiply> e(x.get(k), s);
      if constexpr (kCodes) shorts.put(k, e.code(a));
      if constexpr (kBack) result.put(k, narrow<Y>(e.back(a, s)));
      if constexpr (kResult == Result::gradient) result.put(k, select(e.inside(a), grad.get(k)));
    }
    if constexpr (kCodes) store_codes<V>(a.q, a.q_type, q, a.step[kQ], shorts);
    if constexpr (kResult != Result::codes)
      store_vector<Y, V>(static_cast<Y*>(a.y) + at.of[kY] + first * a.step[kY], a.step[kY], result);
  }

  __device__ static __forceinline__ void element(const ElementwiseArgs& a, const Steps<D>& s,
                                                 const Offsets& at, int64_t i) {
    const Element<X, D> e(load(lead(a) + at.of[kX] + i * a.step[kX]), s);
    const int64_t q = at.of[kQ] + i * a.step[kQ];
    Y* const y = static_cast<Y*>(a.y) + at.of[kY] + i * a.step[kY];
    if constexpr (kCodes) store_code(a.q, a.q_type, q, e.code(a));
    if constexpr (kBack) store(y, narrow<Y>(e.back(a, s)));
    if constexpr (kResult == Result::gradient)
      store(y, select(e.inside(a), load(static_cast<const Y*>(a.q_in) + q)));
  }
};

// Of the steps only those back count.
template <class Q>
struct Dequantize {
  using Lead = float;
  using Step = float;
  static constexpr Operand kLead = kY;
  static constexpr int V = kVectorBytes / sizeof(float);
  static constexpr bool kMayMultiply = false;
  using Held = Vector<Q, V>;

  __device__ static __forceinline__ const float* lead(const ElementwiseArgs& a) {
    return static_cast<const float*>(a.y);
  }
  __device__ static __forceinline__ Held load_at(const ElementwiseArgs& a, const Offsets& at, int64_t first) {
    return load_vector<Q, V>(static_cast<const Q*>(a.q_in) + at.of[kQ] + first * a.step[kQ], a.step[kQ]);
  }

  template <bool, class S>
  __device__ static __forceinline__ void vector(const ElementwiseArgs& a, const Held& q, S steps,
                                                const Offsets& at, int64_t first) {
    Vector<float, V> y;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Steps<float> s = steps(k);
      y.put(k, dequantized<float, float>(static_cast<float>(q.get(k)), s.subtract, s.scale));
    }
    store_vector<float, V>(static_cast<float*>(a.y) + at.of[kY] + first, y);
  }

  __device__ static __forceinline__ void element(const ElementwiseArgs& a, const Steps<float>& s,
                                                 const Offsets& at, int64_t i) {
    const Q q = load(static_cast<const Q*>(a.q_in) + at.of[kQ] + i * a.step[kQ]);
    store(static_cast<float*>(a.y) + at.of[kY] + i * a.step[kY],
          dequantized<float, float>(static_cast<float>(q), s.subtract, s.scale));
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
    Offsets at = {};
    move(at, a.levels, 0, a.count, row);
    body(at, item - row * a.parts);
  }
}

// Calls body(offsets, part, height) for each block of rows and part of them; rows of a block lie one step of
// the innermost level around them apart.
template <class Body>
__device__ __forceinline__ void for_columns(const ElementwiseArgs& a, const Teams& t, Body body) {
  const int64_t size = a.levels[a.count - 1].size;
  const int64_t blocks = divided(size + a.height - 1, a.height);
  const int64_t items = divided(a.rows, size) * blocks * a.parts;
  for (int64_t item = t.first; item < items; item += t.stride) {
    const int64_t block = divided(item, a.parts), outer = divided(block, blocks);
    const int64_t top = (block - outer * blocks) * a.height;
    Offsets at = {};
    move(at, a.levels, 0, a.count, outer * size + top);
    body(at, item - block * a.parts, size - top < a.height ? size - top : a.height);
  }
}

__device__ __forceinline__ void step_row(const ElementwiseArgs& a, Offsets& at) {
#pragma unroll
  for (int o = kX; o <= kY; ++o) at.of[o] += a.levels[a.count - 1].step[o];
}

template <class Work, bool kEach>
__device__ __forceinline__ void walk(const ElementwiseArgs& a) {
  using Lead = typename Work::Lead;
  using Step = typename Work::Step;
  constexpr int V = Work::V;
  const Teams t = teams_of(a.team);
  const Lead* const lead = Work::lead(a);
  const int64_t step = a.step[Work::kLead];
  if constexpr (kEach) {
    for_columns(a, t, [&](Offsets at, int64_t part, int64_t height) {
      const Row<Lead, V> row(lead + at.of[Work::kLead], step, a.n);
      const int64_t first = (part * a.team + t.lane) * V - row.lead;
      if (first >= a.n) return;
      Steps<Step> steps[V];
#pragma unroll
      for (int k = 0; k < V; ++k)
        if (first + k >= 0 && first + k < a.n) steps[k] = own_steps<Step>(a, at, first + k);
      for (int64_t i = 0; i < height; ++i, step_row(a, at)) {
        if (first >= 0 && first + V <= a.n && is_aligned<Lead, V>(lead + at.of[Work::kLead] + first, step))
          Work::template vector<false>(a, Work::load_at(a, at, first), [&](int k) { return steps[k]; }, at,
                                       first);
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
      const Steps<Step> steps = shared_steps<Step>(a, at);  // while the elements are on their way
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

template <class X, class D, Result kResult, bool kEach>
__global__ void __launch_bounds__(kThreads, 2) quantize_kernel(const __grid_constant__ ElementwiseArgs a) {
  walk<Quantize<X, D, kResult>, kEach>(a);
}

template <class Q, bool kEach>
__global__ void __launch_bounds__(kThreads, 2) dequantize_kernel(const __grid_constant__ ElementwiseArgs a) {
  walk<Dequantize<Q>, kEach>(a);
}

// ---- steps of any types: an element at a time -----------------------------------------------------

constexpr int kMixedRun = 8;  // elements of a row that a thread takes

// Calls body(offsets, element) for each element that this thread takes.
template <class Body>
__device__ __forceinline__ void for_elements(const ElementwiseArgs& a, Body body) {
  const Teams t = teams_of(a.team);
  for_parts(a, t, [&](const Offsets& row, int64_t part) {
    for (int i = 0; i < kMixedRun; ++i) {
      const int64_t element = (part * kMixedRun + i) * a.team + t.lane;
      if (element >= a.n) return;
      Offsets at;
#pragma unroll
      for (int o = 0; o < kOperands; ++o) at.of[o] = row.of[o] + element * a.step[o];
      body(at);
    }
  });
}

// affine() for types known at run time; every type's values are exact in double.
__device__ __forceinline__ double mixed_affine(Type divide_type, Type add_type, double x, double scale,
                                               double zero_point) {
  return with_float(divide_type, [&](auto tag) -> double {
    using D = typename decltype(tag)::type;
    const Wide<D> quotient = Wide<D>(x) / Wide<D>(scale);
    if constexpr (sizeof(D) < 8)
      if (add_type == Type::f64) return affine<D, double>(quotient, zero_point);
    if constexpr (sizeof(D) < 4)
      if (add_type == Type::f32) return affine<D, float>(quotient, float(zero_point));
    return affine<D, D>(quotient, rounded<D>(Wide<D>(zero_point)));
  });
}

__device__ __forceinline__ double mixed_dequantized(Type subtract_type, Type scale_type, float q,
                                                    double zero_point, double scale) {
  if (subtract_type == Type::f64) return dequantized<double, double>(q, zero_point, scale);
  if (scale_type == Type::f64) return dequantized<float, double>(q, float(zero_point), scale);
  return dequantized<float, float>(q, float(zero_point), float(scale));
}

__device__ __forceinline__ double load_float(const void* data, Type type, int64_t i) {
  return with_float(type, [&](auto tag) -> double {
    return widen(load(static_cast<const typename decltype(tag)::type*>(data) + i));
  });
}
// float64 reaches half precision through float32.
__device__ __forceinline__ void store_float(void* data, Type type, int64_t i, double v) {
  with_float(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store(static_cast<T*>(data) + i, narrow<T>(static_cast<Wide<T>>(v)));
  });
}

template <Result kResult>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_mixed_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    const double scale = exact_number(a.scale, at.of[kScale]);
    const double v = mixed_affine(a.divide_type, a.add_type, load_float(a.x, a.x_type, at.of[kX]), scale,
                                  exact_number(a.add, at.of[kZeroPoint]));
    const bool nan = v != v;
    if constexpr (kResult == Result::gradient) {
      const bool inside = in_range<double>(v, a.q_min, a.q_max) & !nan;
      // Bits, whatever they mean: a NaN keeps its own.
      if (a.y_type == Type::f64)
        store(static_cast<int64_t*>(a.y) + at.of[kY],
              inside ? load(static_cast<const int64_t*>(a.q_in) + at.of[kQ]) : 0);
      else if (a.y_type == Type::f32)
        store(static_cast<int32_t*>(a.y) + at.of[kY],
              inside ? load(static_cast<const int32_t*>(a.q_in) + at.of[kQ]) : 0);
      else
        store(static_cast<int16_t*>(a.y) + at.of[kY],
              inside ? load(static_cast<const int16_t*>(a.q_in) + at.of[kQ]) : int16_t(0));
      return;
    }
    const double code = shifted_code<double>(v, a.q_min, a.q_max);
    if constexpr (kResult == Result::codes || kResult == Result::both) {
      store_code(a.q, a.q_type, at.of[kQ], int16_t(nan ? 0 : bit_cast<int64_t>(code)));
    }
    if constexpr (kResult == Result::both || kResult == Result::fake) {
      const float q = nan ? 0.0f : float(code - Shifter<double>::value);
      const double y = mixed_dequantized(a.subtract_type, a.scale_type, q,
                                         exact_number(a.subtract, at.of[kZeroPoint]), scale);
      store_float(a.y, kResult == Result::fake ? a.y_type : a.scale_type, at.of[kY], y);
    }
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    dequantize_mixed_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    float q;
    switch (a.q_type) {
      case Type::i8: q = load(static_cast<const int8_t*>(a.q_in) + at.of[kQ]); break;
      case Type::u8: q = load(static_cast<const uint8_t*>(a.q_in) + at.of[kQ]); break;
      case Type::i16: q = load(static_cast<const int16_t*>(a.q_in) + at.of[kQ]); break;
      default: q = load(static_cast<const float*>(a.q_in) + at.of[kQ]);
    }
    const double y = mixed_dequantized(a.subtract_type, a.scale_type, q,
                                       exact_number(a.subtract, at.of[kZeroPoint]),
                                       exact_number(a.scale, at.of[kScale]));
    store_float(a.y, a.scale_type, at.of[kY], y);
  });
}

template <class To>
__global__ void __launch_bounds__(kThreads, 2) convert_kernel(const __grid_constant__ ElementwiseArgs a) {
  for_elements(a, [&](const Offsets& at) {
    with_real(a.x_type, [&](auto tag) {
      using From = typename decltype(tag)::type;
      const From x = load(static_cast<const From*>(a.x) + at.of[kX]);
      store(static_cast<To*>(a.y) + at.of[kY], narrow<To>(static_cast<Wide<To>>(widen(x))));
    });
  });
}

}  // namespace
}  // namespace quantkit
