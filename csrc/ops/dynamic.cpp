// Operators that choose parameters: choose_qparams, dynamic_quantize, quantize_dequantize.
#include "ops.h"

namespace quantkit {
namespace {

// The results, in the order of every operator: q and x_hat where there are any, scale, zero_point.
template <Operation kOperation>
struct FromChosen {
  static constexpr bool kCodes = kOperation != Operation::choose;
  static constexpr bool kBack = kOperation == Operation::quantize_dequantize;
  static constexpr int kScaleAt = kCodes + kBack, kResults = kScaleAt + 2;
  TensorInfo x;
  const Tensor& x_tensor;
  Format format;
  Scheme scheme;
  std::vector<int64_t> sizes;  // of scale and zero_point; empty: 0-dim
  Type type;                   // of scale and zero_point

  FromChosen(const Tensor& x_, const BlockSize& block_size, int64_t q_min, int64_t q_max,
             double eps, bool symmetric, bool include_zero)
      : FromChosen(x_, block_size, q_min, q_max, eps, symmetric, dtype_of(Type::i16),
                   include_zero) {}
  FromChosen(const Tensor& x_, const BlockSize& block_size, int64_t q_min, int64_t q_max,
             double eps, bool symmetric, int32_t codes, bool include_zero)
      : x("x", x_), x_tensor(x_), format(check_q_range(q_min, q_max, codes)) {
    check_real(x);
    check_choice(x, block_size, eps, symmetric, include_zero);
    scheme = {static_cast<int32_t>(q_min), static_cast<int32_t>(q_max), symmetric, include_zero,
              eps};
    for (int64_t d = 0; block_size && d < x.dim; ++d)
      sizes.push_back((*block_size)[d] == -1 ? 1 : x.sizes[d] / (*block_size)[d]);
    type = first_type(x, is_wide(q_min, q_max));
  }

  Type back_type() const {
    TensorInfo zero_point = x;  // in torch's rule its type and rank count
    zero_point.type = static_cast<int>(type);
    zero_point.dim = static_cast<int64_t>(sizes.size());
    return dequantized_type(x.dim, type, zero_point.dim, zero_point);
  }

  Result result(int i) const {
    if (kCodes && i == 0) return {"q", dtype_of(stored_type(format)), x.sizes, x.dim, &x, false};
    if (kBack && i == 1) return {"x_hat", dtype_of(back_type()), x.sizes, x.dim, &x, false};
    return {i == kScaleAt ? "scale" : "zero_point",
            dtype_of(type),
            sizes.data(),
            static_cast<int64_t>(sizes.size()),
            &x,
            true};
  }
  std::vector<const TensorInfo*> inputs() const { return {&x}; }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool fresh) const {
    if (x.numel == 0) return;
    const Tensor loaded_tensor = loadable(x, x_tensor);
    const TensorInfo loaded("x", loaded_tensor);
    const TensorInfo &scale = outs[kScaleAt], &zero_point = outs[kScaleAt + 1];
    const TensorInfo& q = kCodes ? outs[0] : loaded;
    const TensorInfo& y = kBack ? outs[1] : loaded;
    Dynamic d{};
    d.scale = scale.data;
    d.zero_point = zero_point.data;
    d.p_type = type;
    d.scheme = scheme;
    Elementwise& e = d.elements;
    e.operation = kOperation;
    e.format = format;
    e.x = loaded.data;
    e.x_type = loaded.kind();
    e.q = kCodes ? q.data : nullptr;
    e.y = kBack ? y.data : nullptr;
    e.y_type = y.kind();
    e.q_min = scheme.q_min;
    e.q_max = scheme.q_max;
    e.scale = {scale.data, type, false};
    e.add = e.subtract = {zero_point.data, type, false};
    e.steps.divide = e.steps.add = type;
    e.steps.subtract = e.steps.multiply = back_type() == Type::f64 ? Type::f64 : Type::f32;
    e.chosen = true;
    e.symmetric = scheme.symmetric;
    e.nontemporal = kBack && nontemporal(fresh, loaded, y);
    Axes axes = axes_of(loaded, &q, &y);
    axes.add(kScale, sizes.data(), scale.strides, scale.dim);
    axes.add(kZeroPoint, sizes.data(), zero_point.strides, zero_point.dim);
    for_layouts(axes, kX, kQ, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(d, loaded);
    });
  }
};

using Choose = FromChosen<Operation::choose>;
using Quantize = FromChosen<Operation::quantize>;
using QuantizeDequantize = FromChosen<Operation::quantize_dequantize>;

}  // namespace

void implement_dynamic(Library& library) {
  using T = const Tensor&;
  using B = const BlockSize&;
  implement<Choose, T, B, int64_t, int64_t, double, bool, bool>(library, "choose_qparams");
  implement<Quantize, T, B, int64_t, int64_t, double, bool, int32_t, bool>(library,
                                                                           "dynamic_quantize");
  implement<QuantizeDequantize, T, B, int64_t, int64_t, double, bool, int32_t, bool>(
      library, "quantize_dequantize");
}

}  // namespace quantkit
