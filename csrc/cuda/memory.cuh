// How kernels reach memory: vectors of up to 16 bytes where the address allows, elements elsewhere;
// every access goes through here, so that the emulator (proof/emu) sees each one.
#pragma once

#include "../calls.h"
#include "../numerics/division.h"
#include "../numerics/reductions.h"

#ifdef QUANTKIT_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>

#define QK_SHARED(T, name, n) __shared__ T name[n]

namespace quantkit {
namespace {
__device__ __forceinline__ void check_read(const void*, int) {}
__device__ __forceinline__ void check_write(void*, int) {}
}  // namespace
}  // namespace quantkit
#endif

namespace quantkit {
namespace {

constexpr int kVectorBytes = 16;  // the widest access of a GPU

template <class T>
__device__ __forceinline__ T load(const T* p) {
  check_read(p, sizeof(T));
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T v) {
  check_write(p, sizeof(T));
  *p = v;
}

template <int kBytes>
struct alignas(kBytes) Piece {
  uint32_t words[kBytes / 4];
};

#ifdef __CUDA_ARCH__
// In words of PTX: the compiler makes four stores of some of these.
__device__ __forceinline__ void store(Piece<16>* p, Piece<16> v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}
#endif

// V elements in registers, as they lie in memory.
template <class T, int V>
struct Vector {
  static constexpr int kWords = V * sizeof(T) / 4, kBytes = kWords * 4;
  static constexpr int kPiece = kBytes < kVectorBytes ? kBytes : kVectorBytes;
  static_assert(V * sizeof(T) == kBytes, "whole words");
  uint32_t words[kWords] = {};

  __device__ __forceinline__ T get(int k) const {
    if constexpr (sizeof(T) == 8)
      return bit_cast<T>(uint64_t(words[2 * k]) | uint64_t(words[2 * k + 1]) << 32);
    else if constexpr (sizeof(T) == 4)
      return bit_cast<T>(words[k]);
    else if constexpr (sizeof(T) == 2)
      return bit_cast<T>(uint16_t(words[k / 2] >> 16 * (k % 2)));
    else
      return bit_cast<T>(uint8_t(words[k / 4] >> 8 * (k % 4)));
  }
  // Into a place that is still 0.
  __device__ __forceinline__ void put(int k, T v) {
    if constexpr (sizeof(T) == 4)
      words[k] = bit_cast<uint32_t>(v);
    else if constexpr (sizeof(T) == 2)
      words[k / 2] |= uint32_t(bit_cast<uint16_t>(v)) << 16 * (k % 2);
    else if constexpr (sizeof(T) == 1)
      words[k / 4] |= uint32_t(bit_cast<uint8_t>(v)) << 8 * (k % 4);
    else
      words[2 * k] = uint32_t(bit_cast<uint64_t>(v)),
                words[2 * k + 1] = bit_cast<uint64_t>(v) >> 32;
  }
};

// V elements that lie side by side, at an address that allows it.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* p) {
  using Whole = Piece<Vector<T, V>::kPiece>;
  constexpr int kWords = sizeof(Whole) / 4;
  Vector<T, V> v;
#pragma unroll
  for (int i = 0; i < Vector<T, V>::kWords / kWords; ++i) {
    const Whole piece = load(reinterpret_cast<const Whole*>(p) + i);
#pragma unroll
    for (int w = 0; w < kWords; ++w) v.words[i * kWords + w] = piece.words[w];
  }
  return v;
}

// The same where the address may not allow it, or elements are `step` apart.
template <class T, int V>
__device__ __forceinline__ bool is_aligned(const T* p, int64_t step) {
  return step == 1 && reinterpret_cast<uintptr_t>(p) % Vector<T, V>::kPiece == 0;
}
template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* p, int64_t step) {
  if (is_aligned<T, V>(p, step)) return load_vector<T, V>(p);
  Vector<T, V> v;
#pragma unroll
  for (int k = 0; k < V; ++k) v.put(k, load(p + k * step));
  return v;
}
template <class T, int V>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, V>& v) {
  constexpr int kPiece = Vector<T, V>::kPiece, kWords = kPiece / 4;
  using Whole = Piece<kPiece>;
#pragma unroll
  for (int i = 0; i < Vector<T, V>::kWords / kWords; ++i) {
    Whole piece;
#pragma unroll
    for (int w = 0; w < kWords; ++w) piece.words[w] = v.words[i * kWords + w];
    store(reinterpret_cast<Whole*>(p) + i, piece);
  }
}
template <class T, int V>
__device__ __forceinline__ void store_vector(T* p, int64_t step, const Vector<T, V>& v) {
  if (is_aligned<T, V>(p, step)) return store_vector<T, V>(p, v);
#pragma unroll
  for (int k = 0; k < V; ++k) store(p + k * step, v.get(k));
}

// Calls body(i) for the elements of a vector at `first` that lie in a row of n.
template <int V, class Body>
__device__ __forceinline__ void for_inside(int64_t first, int64_t n, Body body) {
#pragma unroll 1
  for (int64_t i = first < 0 ? 0 : first; i < first + V && i < n; ++i) body(i);
}

// A row of n elements in vectors: where it begins between two aligned addresses, the first vector
// begins `lead` elements before it. Vectors that are not whole are left to their elements.
template <class T, int V>
struct Row {
  const T* data;
  int64_t step, n;
  int lead;
  bool aligned;

  __device__ __forceinline__ Row(const T* data_, int64_t step_, int64_t n_)
      : data(data_), step(step_), n(n_) {
    lead = step == 1 ? int(reinterpret_cast<uintptr_t>(data) / sizeof(T) % V) : 0;
    aligned = is_aligned<T, V>(data - lead, step);
  }
  __device__ __forceinline__ bool is_whole(int64_t first) const {
    return aligned && first >= 0 && first + V <= n;
  }
};

// ---- indices ------------------------------------------------------------------------------------

// Most indices fit in 32 bits, whose division is many times faster.
__device__ __forceinline__ int64_t divided(int64_t a, int64_t b) {
  if (((uint64_t(a) | uint64_t(b)) >> 32) == 0) return uint32_t(a) / uint32_t(b);
  return a / b;
}

struct Offsets {
  int64_t of[kOperands];
};

// Adds to `at` where index `i` of the dims [begin, end) lies.
__device__ __forceinline__ void move(Offsets& at, const Dim* dims, int begin, int end, int64_t i) {
  for (int k = end - 1; k >= begin; --k) {
    int64_t index = i;
    if (k > begin) {
      i = divided(i, dims[k].size);
      index -= i * dims[k].size;
    }
#pragma unroll
    for (int o = 0; o < kOperands; ++o) at.of[o] += dims[k].stride[o] * index;
  }
}

// The same for one operand.
__device__ __forceinline__ int64_t offset_of(Operand o, const Dim* dims, int begin, int end,
                                             int64_t i) {
  int64_t at = 0;
  for (int k = end - 1; k >= begin; --k) {
    int64_t index = i;
    if (k > begin) {
      i = divided(i, dims[k].size);
      index -= i * dims[k].size;
    }
    at += dims[k].stride[o] * index;
  }
  return at;
}

// ---- parameters ---------------------------------------------------------------------------------

// A parameter of any floating type in the GPU's memory, or one value, exact in double.
struct Values {
  const void* data;
  double value;
  Type type;
};

// As a step of type D takes it. A zero point is rounded to that type first, a scale is taken in
// full.
template <class D, bool kRound>
__device__ __forceinline__ Wide<D> number(const Values& p, int64_t i) {
  const auto converted = [](auto wide) {
    const Wide<D> v = static_cast<Wide<D>>(wide);
    return kRound ? rounded<D>(v) : v;
  };
  if (p.data == nullptr) return converted(p.value);
  return with_float(p.type, [&](auto tag) {
    return converted(widen(load(static_cast<const typename decltype(tag)::type*>(p.data) + i)));
  });
}

// The same where many have the type of the step, and one value was rounded to it before.
template <class D>
__device__ __forceinline__ Wide<D> same_number(const Values& p, int64_t i) {
  return p.data == nullptr ? Wide<D>(p.value) : widen(load(static_cast<const D*>(p.data) + i));
}

__device__ __forceinline__ double exact_number(const Values& p, int64_t i) {
  return number<double, false>(p, i);
}

}  // namespace
}  // namespace quantkit
