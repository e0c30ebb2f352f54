// What operators share: dtypes of steps, the way from tensors to a layout, results that are made or
// given.
//
// An operator is a call: an object that checks its arguments and says what it returns. `returned`
// makes the results, `written` takes those of `out=`, and either lets the call fill them.
// `implement` registers both.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "../torch/checks.h"
#include "../torch/device.h"
#include "../torch/tensor.h"

namespace quantkit {

// Whether half precision cannot hold the limits.
inline bool is_wide(int64_t q_min, int64_t q_max) { return q_min < -128 || q_max > 255; }

// What x becomes before the first step.
Type first_type(const TensorInfo& x, bool wide);
// The dtype of dequantize's result: an integer zero_point counts as of scale's dtype.
Type dequantized_type(int64_t dim, Type scale, int64_t scale_dim, const TensorInfo& zero_point);
// The dtype of a step of torch: a parameter without dimensions leaves that of what has some.
Type step_type(Type t, int64_t dim, Type parameter, int64_t parameter_dim);

// t in a floating type; where it has that type already, itself.
struct Converted {
  std::optional<Tensor> made;
  TensorInfo info;

  Converted(const TensorInfo& t, Type type);
};
// x as a type that kernels load: float16, bfloat16, float32 or float64.
inline Converted loadable(const TensorInfo& x) { return {x, x.floating() ? x.kind() : Type::f32}; }

// An operator of torch.
template <class... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  check_shim(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
// t's memory from `offset` elements on, with other sizes and strides.
Tensor as_strided(const TensorInfo& t, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, int64_t offset);

// int8 codes of x with a scale for each token: q, scale and zero_point are written.
void quantize_tokens(const Tensor& x, const TensorInfo* outs);

// ---- codes of which several share a byte --------------------------------------------------------

// The sizes of a tensor of codes of x's shape, and those of what a tensor of codes stands for.
std::vector<int64_t> packed_sizes(const TensorInfo& x, Format format);
std::vector<int64_t> unpacked_sizes(const TensorInfo& q, Format format);

// A tensor as if each code had an element of its own: with these sizes, and strides that count
// codes.
class Codes {
 public:
  Codes(const TensorInfo& packed, std::vector<int64_t> sizes, Format format);
  Codes(const Codes&) = delete;
  const TensorInfo& info() const { return info_; }

 private:
  std::vector<int64_t> sizes_, strides_;
  TensorInfo info_;
};

// What kernels write for the codes q of x: q, or codes with an element each that finish() packs.
// whole: no two parameters share a byte.
class CodesOut {
 public:
  CodesOut(const TensorInfo& q, const TensorInfo& x, Format format, bool whole);
  const TensorInfo& info() const { return codes_ ? codes_->info() : made_ ? *made_ : q_; }
  bool packed() const { return codes_.has_value(); }
  void finish() const;

 private:
  const TensorInfo& q_;
  Format format_;
  std::optional<Tensor> tensor_, bytes_;
  std::optional<TensorInfo> made_;
  std::optional<Codes> codes_;
};

// What kernels read for the codes q: q, whose codes have an element each or are packed; where they
// cannot read it so, a copy.
struct CodesIn {
  TensorInfo info;
  std::optional<Contiguous> bytes;
  std::optional<Tensor> tensor;
  std::optional<Codes> codes;

  CodesIn(const TensorInfo& q, std::vector<int64_t> sizes, Format format);
  bool packed() const { return codes.has_value(); }
};

// ---- parameters ---------------------------------------------------------------------------------

// The block sizes of a parameter of these sizes: those that were given, else x's sizes by them.
std::vector<int64_t> blocks_of(const TensorInfo& x, const int64_t* sizes, int64_t dim,
                               const BlockSize& block_size);
// How many blocks each dimension of x has, empty for one block of all, and how long they are.
struct Blocks {
  std::vector<int64_t> counts, sizes;

  Blocks() = default;
  Blocks(const TensorInfo& x, const BlockSize& block_size) {
    for (int64_t d = 0; block_size && d < x.dim; ++d) {
      const int64_t block = (*block_size)[d], whole = std::max<int64_t>(x.sizes[d], 1);
      sizes.push_back(block == -1 ? whole : block);
      counts.push_back(blocks_in(x.sizes[d], block));
    }
  }
  int64_t dim() const { return static_cast<int64_t>(counts.size()); }
  // Of the operand that has an element for each.
  void add_to(Axes& axes, Operand operand, const TensorInfo& t) const {
    axes.add(operand, counts.data(), t.strides, t.dim, sizes.empty() ? nullptr : sizes.data());
  }
};
// Whether every byte of x's codes has codes of one block alone.
bool has_whole_bytes(const TensorInfo& x, int64_t block, Format format);

// A scale as the steps take it: itself, or where it is coded or `global` multiplies it (null:
// nothing does), its number in float32.
struct UsedScale {
  std::optional<Tensor> moved, made;
  TensorInfo info;

  UsedScale(const TensorInfo& scale, const TensorInfo* global);
};
// `global` in float32 on the device of `on`, in the shape of a scale of these sizes where it has
// dimensions.
struct SpreadGlobal {
  Converted number;
  std::optional<Tensor> zeros, made;
  Parameter parameter;

  SpreadGlobal(const TensorInfo& global, const TensorInfo& on, const int64_t* sizes, int64_t dim);
};

// Where random rounding draws from, which was checked: each element's place in the sequence.
class DrawnFrom {
 public:
  DrawnFrom() = default;
  DrawnFrom(const TensorInfo& x, const std::optional<Tensor>& seed, const BlockSize& index);
  explicit operator bool() const { return seed_.has_value(); }
  const TensorInfo& seed() const { return *seed_; }
  void give(Elementwise& e, Axes& axes, const TensorInfo& x) const;

 private:
  std::optional<TensorInfo> seed_;
  std::optional<Contiguous> words_;
  int64_t first_ = 0;
  std::vector<int64_t> strides_;
};

// The geometry of a call: x, what lies beside it and y have one shape; null stands for x.
Axes axes_of(const TensorInfo& x, const TensorInfo* q, const TensorInfo* y);

// From here on a float output that is given is written past the caches: it will not be in one when
// it is read. Fresh memory has just been cleared through them; codes are too few bytes to gain, and
// steps of half precision compute for longer than they write.
constexpr int64_t kNontemporalBytes = int64_t(32) << 20;
inline bool nontemporal(bool fresh, const TensorInfo& x, const TensorInfo& y) {
  return !fresh && !x.half() && y.numel * size_of(y.kind()) >= kNontemporalBytes;
}

// One result of a call.
struct Result {
  const char* name;
  int32_t dtype;
  const int64_t* sizes;
  int64_t dim;
  const TensorInfo* like;  // with its strides and its device, or
  bool contiguous;         // contiguous on its device
};

inline Tensor made(const Result& r, const TensorInfo* codes) {
  if (r.contiguous) return empty_contiguous(*r.like, r.sizes, r.dim, r.dtype);
  return empty_like(codes != nullptr ? *codes : *r.like, r.dtype);
}

template <class Call, size_t... kRest>
auto returned(const Call& call, std::index_sequence<0, kRest...>) {
  const Tensor first = made(call.result(0), nullptr);
  const TensorInfo first_info(call.result(0).name, first);
  // The strides of an empty_like are cheaper to follow than x's, and the same.
  const std::array<Tensor, 1 + sizeof...(kRest)> tensors{first,
                                                         made(call.result(kRest), &first_info)...};
  const TensorInfo infos[] = {first_info, TensorInfo(call.result(kRest).name, tensors[kRest])...};
  call.run(infos, true);
  if constexpr (sizeof...(kRest) == 0)
    return first;
  else
    return std::make_tuple(first, tensors[kRest]...);
}
template <class Call>
auto returned(const Call& call) {
  return returned(call, std::make_index_sequence<Call::kResults>());
}

template <class Call, class... Outs>
void written(const Call& call, const Outs&... outs) {
  static_assert(sizeof...(Outs) == Call::kResults, "one out for each result");
  int i = 0;
  const TensorInfo infos[] = {TensorInfo(call.result(i++).name, outs)...};
  std::vector<const TensorInfo*> given;
  for (i = 0; i < Call::kResults; ++i) {
    const Result r = call.result(i);
    check_out(infos[i], r.sizes, r.dim, r.dtype, *r.like);
    given.push_back(&infos[i]);
  }
  claim_outs(given, call.inputs(), call.in_place());
  call.run(infos, false);
}

template <class T, size_t>
using Each = T;

template <auto kMake, class Results>
struct Overloads;
template <class Call, class... Args, Call (*kMake)(Args...), size_t... kResult>
struct Overloads<kMake, std::index_sequence<kResult...>> {
  static auto functional(Args... args) { return returned(kMake(args...)); }
  static void out(Args... args, Each<const Tensor&, kResult>... outs) {
    written(kMake(args...), outs...);
  }
};

template <class Call, class... Args>
Call make(Args... args) {
  return Call(args...);
}

using Library = torch::stable::detail::StableLibrary;

// Registers an operator, whose arguments are of these types, and its `out` overload.
template <class Call, class... Args>
void implement(Library& library, const std::string& name) {
  using Both = Overloads<&make<Call, Args...>, std::make_index_sequence<Call::kResults>>;
  library.impl(name.c_str(), TORCH_BOX(&Both::functional));
  const bool overload = name.find('.') != std::string::npos;
  library.impl((name + (overload ? "_out" : ".out")).c_str(), TORCH_BOX(&Both::out));
}

// The operators of each file.
void implement_static(Library& library);
void implement_dynamic(Library& library);
void implement_measure(Library& library);
void implement_linear(Library& library);

}  // namespace quantkit
