// Operators with given parameters: quantize, dequantize, fake_quantize and its gradient.
#include "given.h"

namespace quantkit {
namespace {

// Those that begin with x / scale + zero_point.
template <Operation kOperation, int kCount>
struct FromX {
  static constexpr int kResults = kCount;
  static constexpr bool kFake = kOperation != Operation::quantize;
  Format format;
  Given given;
  int64_t q_min, q_max;
  bool round_first = false;
  int32_t dtype;                         // of the first result
  std::vector<int64_t> sizes;            // of codes
  const TensorInfo* gradient = nullptr;  // kFake alone

  FromX(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min_,
        int64_t q_max_)
      : FromX(x, scale, zero_point, q_min_, q_max_, dtype_of(Format::int16)) {}
  FromX(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min_,
        int64_t q_max_, int32_t codes)
      : format(check_q_range(q_min_, q_max_, codes)),
        given("x", x, scale, zero_point),
        q_min(q_min_),
        q_max(q_max_) {
    set_result();
  }
  FromX(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
        int64_t q_min_, int64_t q_max_, const Text& name, const BlockSize& block_size,
        const std::optional<Tensor>& global_scale, const std::optional<Tensor>& seed,
        const BlockSize& index, bool round_first_)
      : format(check_format(name.value)),
        given((check_options(x, q_min_, q_max_, format, seed, index, round_first_),
               TensorInfo("x", x)),
              TensorInfo("x", x), scale, zero_point, format, block_size, global_scale),
        q_min(q_min_),
        q_max(q_max_),
        round_first(round_first_) {
    if (!kFake) check_packing(given.x, format);
    given.drawn = DrawnFrom(given.x, seed, index);
    set_result();
  }

  Result result(int i) const {
    const TensorInfo& x = given.x;
    if (i == 0) return {"out", dtype, sizes.data(), x.dim, &x, !kFake && per_byte(format) > 1};
    return {"mask", dtype_of(Type::boolean), x.sizes, x.dim, &x, false};
  }
  std::vector<const TensorInfo*> inputs() const {
    std::vector<const TensorInfo*> inputs = given.inputs();
    if (gradient != nullptr) inputs.insert(inputs.begin(), gradient);
    return inputs;
  }
  const TensorInfo* in_place() const {
    return kOperation == Operation::fake_quantize ? &given.x : nullptr;
  }

  void run(const TensorInfo* outs, bool fresh) const {
    if (outs[0].numel == 0) return;
    const bool wide = is_wide(q_min, q_max);
    const Converted loaded = loadable(given.x);
    const TensorInfo& x = loaded.info;
    const TensorInfo *beside = gradient, *y = &outs[0];
    std::optional<CodesOut> codes;
    Elementwise e{};
    e.operation = kOperation;
    e.format = format;
    e.x = x.data;
    e.x_type = x.kind();
    e.steps.round_first = round_first;
    e.q_min = static_cast<int32_t>(q_min);
    e.q_max = static_cast<int32_t>(q_max);
    if (!kFake) {
      codes.emplace(outs[0], x, format, given.has_whole_bytes(x, format));
      e.packed = codes->packed();
      beside = &codes->info(), y = nullptr;
    }
    if (kOperation == Operation::fake_quantize_masked) beside = &outs[1];
    if (gradient != nullptr)
      e.q_in = gradient->data;
    else if (beside != nullptr)
      e.q = beside->data;
    if (y != nullptr) {
      e.y = y->data;
      e.y_type = y->kind();
      e.nontemporal = nontemporal(fresh, x, *y);
    }
    given.run(e, x, beside, y, kFake ? kY : kQ, wide, first_type(x, wide));
    if (codes) codes->finish();
  }

 private:
  static void check_options(const Tensor& x, int64_t q_min, int64_t q_max, Format format,
                            const std::optional<Tensor>& seed, const BlockSize& index,
                            bool round_first) {
    const TensorInfo data("x", x);
    check_real(data);
    check_q_range(q_min, q_max, format);
    check_draws(data, seed, index);
    check_round_first(round_first, format, seed.has_value());
  }
  void set_result() {
    const TensorInfo& x = given.x;
    dtype = !kFake ? dtype_of(format) : x.floating() ? x.dtype : dtype_of(Type::f32);
    sizes = kFake ? std::vector<int64_t>(x.sizes, x.sizes + x.dim) : packed_sizes(x, format);
  }
};

using Quantize = FromX<Operation::quantize, 1>;
using FakeQuantize = FromX<Operation::fake_quantize, 1>;
using Masked = FromX<Operation::fake_quantize_masked, 2>;

struct Backward : FromX<Operation::fake_quantize_backward, 1> {
  TensorInfo grad;

  Backward(const Tensor& grad_, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
           int64_t q_min_, int64_t q_max_)
      : FromX(x, scale, zero_point, q_min_, q_max_), grad("grad", grad_) {
    check_gradient(grad, given.x);
    gradient = &grad;
  }
  Backward(const Backward&) = delete;
};

struct Dequantize {
  static constexpr int kResults = 1;
  Format format;
  TensorInfo q;
  std::vector<int64_t> sizes;  // of the result
  TensorInfo shape;            // q with them
  Type type;
  Given given;

  Dequantize(const Tensor& q_, const Tensor& scale, const Tensor& zero_point)
      : format(Format::numbers),
        q("q", q_),
        sizes(q.sizes, q.sizes + q.dim),
        shape(q),
        given("q", q_, scale, zero_point) {
    type = dequantized_type(q.dim, given.scale.kind(), given.scale.dim, given.zero_point);
    take_stored();
  }
  Dequantize(const Tensor& q_, const Tensor& scale, const std::optional<Tensor>& zero_point,
             const Text& name, const BlockSize& block_size,
             const std::optional<Tensor>& global_scale, const std::optional<int32_t>& output_dtype)
      : format(check_format(name.value)),
        q("q", q_),
        sizes((check_codes(q, format), unpacked_sizes(q, format))),
        shape(q),
        given((type = check_output_dtype(output_dtype), q), shaped(), scale, zero_point, format,
              block_size, global_scale) {
    if (per_byte(format) == 1 && !is_float(format)) take_stored();
  }
  Dequantize(const Dequantize&) = delete;

  Result result(int) const {
    return {"out", dtype_of(type), sizes.data(), q.dim, &q, per_byte(format) > 1};
  }
  std::vector<const TensorInfo*> inputs() const { return given.inputs(); }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool fresh) const {
    const TensorInfo& y = outs[0];
    if (y.numel == 0) return;
    Elementwise e{};
    e.operation = Operation::dequantize;
    std::optional<Converted> numbers;
    if (format == Format::numbers) numbers.emplace(q, Type::f32);
    const CodesIn codes(numbers ? numbers->info : q, sizes, format);
    e.format = format;
    e.packed = codes.packed();
    e.q_in = codes.info.data;
    e.y = y.data;
    e.y_type = y.kind();
    e.nontemporal = nontemporal(fresh, codes.info, y);
    given.run(e, codes.info, &codes.info, &y, kY, true, Type::f32);
  }

 private:
  // The format that q's dtype stands for, or plain numbers.
  void take_stored() {
    format = Format::numbers;
    for (const Format f : {Format::int8, Format::uint8, Format::int16, Format::uint16})
      if (dtype_of(f) == q.dtype) format = f;
  }
  const TensorInfo& shaped() {
    shape.sizes = sizes.data();
    shape.numel *= per_byte(format);
    return shape;
  }
};

struct MaskedGradient {
  static constexpr int kResults = 1;
  TensorInfo grad, mask;

  MaskedGradient(const Tensor& grad_, const Tensor& mask_)
      : grad("grad", grad_), mask("mask", mask_) {
    check_mask(mask, grad);
  }

  Result result(int) const { return {"out", grad.dtype, mask.sizes, mask.dim, &mask, false}; }
  std::vector<const TensorInfo*> inputs() const { return {&grad, &mask}; }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool fresh) const {
    const TensorInfo& y = outs[0];
    if (y.numel == 0) return;
    Elementwise e{};
    e.operation = Operation::masked_gradient;
    e.x = grad.data;
    e.q_in = mask.data;
    e.y = y.data;
    e.x_type = e.y_type = y.kind();
    e.nontemporal = nontemporal(fresh, grad, y);
    for_layouts(axes_of(grad, &mask, &y), kY, kX, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(e, grad);
    });
  }
};

}  // namespace

void implement_static(Library& library) {
  using T = const Tensor&;
  using O = const std::optional<Tensor>&;
  using B = const BlockSize&;
  using F = const Text&;
  implement<Quantize, T, T, T, int64_t, int64_t, int32_t>(library, "quantize");
  implement<Dequantize, T, T, T>(library, "dequantize");
  // Where x wants a gradient, autograd calls the others.
  for (const char* name : {"fake_quantize", "_fake_quantize"})
    implement<FakeQuantize, T, T, T, int64_t, int64_t>(library, name);
  implement<Masked, T, T, T, int64_t, int64_t>(library, "_fake_quantize_masked");
  implement<Quantize, T, T, O, int64_t, int64_t, F, B, O, O, B, bool>(library, "quantize.format");
  implement<Dequantize, T, T, O, F, B, O, const std::optional<int32_t>&>(library,
                                                                         "dequantize.format");
  for (const char* name : {"fake_quantize.format", "_fake_quantize.format"})
    implement<FakeQuantize, T, T, O, int64_t, int64_t, F, B, O, O, B, bool>(library, name);
  implement<Masked, T, T, O, int64_t, int64_t, F, B, O, O, B, bool>(library,
                                                                    "_fake_quantize_masked.format");
  implement<MaskedGradient, T, T>(library, "_masked_gradient");
  implement<Backward, T, T, T, T, int64_t, int64_t>(library, "_fake_quantize_backward");
}

}  // namespace quantkit
