// Operators with given parameters: quantize, dequantize, fake_quantize and its gradient.
#include "ops.h"

namespace quantkit {
namespace {

// scale and zero_point as the kernels take them. Integer zero points become scale's dtype first, or
// float32 where that is half precision and may not hold them.
struct Parameters {
  const TensorInfo& scale;
  Tensor add_tensor, subtract_tensor;
  TensorInfo add, subtract;

  Parameters(const TensorInfo& scale_, const TensorInfo& zero_point, const Tensor& tensor,
             bool wide)
      : scale(scale_),
        add_tensor(converted(zero_point, tensor, integer_becomes(zero_point, wide))),
        subtract_tensor(converted(zero_point, tensor, integer_becomes(zero_point, true))),
        add("zero_point", add_tensor),
        subtract("zero_point", subtract_tensor) {}

  // Dtypes and addresses, for data of dtype `first` before its first step.
  void give(Elementwise& e, Type first, const TensorInfo& data) const {
    const int64_t dim = data.dim;
    const auto given = [&](const TensorInfo& p) {
      return Parameter{p.data, p.kind(), !p.same_device(data)};
    };
    e.scale = given(scale);
    e.add = given(add);
    e.subtract = given(subtract);
    e.steps.divide = step_type(first, dim, scale.kind(), scale.dim);
    e.steps.add = step_type(e.steps.divide, dim, add.kind(), add.dim);
    e.steps.subtract = step_type(Type::f32, dim, subtract.kind(), subtract.dim);
    e.steps.multiply = step_type(e.steps.subtract, dim, scale.kind(), scale.dim);
  }

 private:
  Type integer_becomes(const TensorInfo& zero_point, bool wide) const {
    if (zero_point.floating()) return zero_point.kind();
    return wide && scale.half() ? Type::f32 : scale.kind();
  }
};

// x, or q, with its parameters.
struct Given {
  TensorInfo x, scale, zero_point;
  const Tensor &x_tensor, &zero_point_tensor;

  Given(const char* name, const Tensor& x_, const Tensor& scale_, const Tensor& zero_point_)
      : x(name, x_),
        scale("scale", scale_),
        zero_point("zero_point", zero_point_),
        x_tensor(x_),
        zero_point_tensor(zero_point_) {
    check_parameters(x, scale, zero_point);
  }

  // Fills in what depends on the parameters, and runs the call. `beside`: what lies at kQ, `lead`:
  // the operand that decides the order of memory.
  void run(Elementwise& e, const TensorInfo& data, const TensorInfo* beside, const TensorInfo* y,
           Operand lead, bool wide, Type first) const {
    const Parameters parameters(scale, zero_point, zero_point_tensor, wide);
    parameters.give(e, first, data);
    Axes axes = axes_of(data, beside, y);
    axes.add(kScale, scale.sizes, scale.strides, scale.dim);
    axes.add(kZeroPoint, zero_point.sizes, parameters.add.strides, zero_point.dim);
    for_layouts(axes, lead, kX, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(e, data);
    });
  }
};

// Those that begin with x / scale + zero_point.
template <Operation kOperation, int kCount>
struct FromX {
  static constexpr int kResults = kCount;
  static constexpr bool kFake = kOperation != Operation::quantize;
  Format format;
  Given given;
  int64_t q_min, q_max;
  int32_t dtype;                         // of the first result
  const TensorInfo* gradient = nullptr;  // kFake alone

  FromX(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min_,
        int64_t q_max_)
      : FromX(x, scale, zero_point, q_min_, q_max_, dtype_of(Type::i16)) {
    dtype = given.x.floating() ? given.x.dtype : dtype_of(Type::f32);
  }
  FromX(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min_,
        int64_t q_max_, int32_t codes)
      : format(check_q_range(q_min_, q_max_, codes)),
        given("x", x, scale, zero_point),
        q_min(q_min_),
        q_max(q_max_),
        dtype(codes) {}

  Result result(int i) const {
    const TensorInfo& x = given.x;
    if (i == 0) return {"out", dtype, x.sizes, x.dim, &x, false};
    return {"mask", dtype_of(Type::boolean), x.sizes, x.dim, &x, false};
  }
  std::vector<const TensorInfo*> inputs() const {
    std::vector<const TensorInfo*> inputs = {&given.x, &given.scale, &given.zero_point};
    if (gradient != nullptr) inputs.insert(inputs.begin(), gradient);
    return inputs;
  }
  const TensorInfo* in_place() const {
    return kOperation == Operation::fake_quantize ? &given.x : nullptr;
  }

  void run(const TensorInfo* outs, bool fresh) const {
    if (outs[0].numel == 0) return;
    const bool wide = is_wide(q_min, q_max);
    const Tensor x_tensor = loadable(given.x, given.x_tensor);
    const TensorInfo x("x", x_tensor);
    const TensorInfo *beside = gradient, *y = &outs[0];
    Elementwise e{};
    e.operation = kOperation;
    e.format = format;
    e.x = x.data;
    e.x_type = x.kind();
    e.q_min = static_cast<int32_t>(q_min);
    e.q_max = static_cast<int32_t>(q_max);
    if (!kFake) beside = &outs[0], y = nullptr;
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
  Given given;

  Dequantize(const Tensor& q, const Tensor& scale, const Tensor& zero_point)
      : given("q", q, scale, zero_point) {}

  Result result(int) const {
    const TensorInfo& q = given.x;
    const Type type =
        dequantized_type(q.dim, given.scale.kind(), given.scale.dim, given.zero_point);
    return {"out", dtype_of(type), q.sizes, q.dim, &q, false};
  }
  std::vector<const TensorInfo*> inputs() const {
    return {&given.x, &given.scale, &given.zero_point};
  }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool fresh) const {
    const TensorInfo& y = outs[0];
    if (y.numel == 0) return;
    Elementwise e{};
    e.operation = Operation::dequantize;
    e.format = Format::numbers;
    for (const Format format : kFormats)
      if (stored_type(format) == given.x.kind()) e.format = format;
    const Tensor q_tensor = e.format == Format::numbers
                                ? converted(given.x, given.x_tensor, Type::f32)
                                : given.x_tensor;
    const TensorInfo q("q", q_tensor);
    e.q_in = q.data;
    e.y = y.data;
    e.y_type = y.kind();
    e.nontemporal = nontemporal(fresh, q, y);
    given.run(e, q, &q, &y, kY, true, Type::f32);
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
  implement<Quantize, T, T, T, int64_t, int64_t, int32_t>(library, "quantize");
  implement<Dequantize, T, T, T>(library, "dequantize");
  // Where x wants a gradient, autograd calls the others.
  for (const char* name : {"fake_quantize", "_fake_quantize"})
    implement<FakeQuantize, T, T, T, int64_t, int64_t>(library, name);
  implement<Masked, T, T, T, int64_t, int64_t>(library, "_fake_quantize_masked");
  implement<MaskedGradient, T, T>(library, "_masked_gradient");
  implement<Backward, T, T, T, T, int64_t, int64_t>(library, "_fake_quantize_backward");
}

}  // namespace quantkit
