// Operators that choose parameters: choose_qparams, dynamic_quantize, quantize_dequantize.
#include <algorithm>

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
  std::optional<TensorInfo> global;
  Format format;
  Scheme scheme{};
  BlockSize block_size;
  std::vector<int64_t> codes_sizes;
  std::vector<int64_t> sizes;  // of scale and zero_point; empty: 0-dim
  Type type;                   // of scale and zero_point
  Type back_type;              // of x_hat
  bool float32 = false;        // the steps
  bool round_first = false;

  FromChosen(const Tensor& x_, const BlockSize& block_size_, int64_t q_min, int64_t q_max,
             double eps, bool symmetric, bool include_zero)
      : FromChosen(x_, block_size_, q_min, q_max, eps, symmetric, dtype_of(Format::int16),
                   include_zero) {}
  FromChosen(const Tensor& x_, const BlockSize& block_size_, int64_t q_min, int64_t q_max,
             double eps, bool symmetric, int32_t codes, bool include_zero)
      : FromChosen(x_, block_size_, check_q_range(q_min, q_max, codes)) {
    check_choice(x, block_size, eps, symmetric, include_zero, false);
    type = first_type(x, is_wide(q_min, q_max));
    set_scheme(q_min, q_max, symmetric, include_zero, eps, false);
    TensorInfo zero_point = x;  // in torch's rule its type and rank count
    zero_point.type = static_cast<int>(type);
    zero_point.dim = static_cast<int64_t>(sizes.size());
    back_type = dequantized_type(x.dim, type, zero_point.dim, zero_point);
  }

  // Of contract 2.
  using Dtype = std::optional<int32_t>;
  using Given = std::optional<Tensor>;
  FromChosen(const Tensor& x_, const BlockSize& block_size_, int64_t q_min, int64_t q_max,
             double eps, bool symmetric, const Text& name, bool include_zero,
             const Dtype& scale_dtype, const std::optional<Text>& scale_rule,
             const Given& global_scale, const Given& seed = {}, const BlockSize& index = {},
             bool round = false, const Dtype& output_dtype = {})
      : FromChosen(x_, block_size_, check_format(name.value)) {
    check_q_range(q_min, q_max, format);
    if (global_scale) global.emplace("global_scale", *global_scale);
    const ScaleChoice choice =
        check_rule(format, symmetric, eps, scale_dtype, scale_rule, global.has_value());
    check_choice(x, block_size, eps, symmetric, include_zero, true);
    check_none("seed", seed);
    check_none("index", index);
    check_round_first(round, format);
    if (kCodes) check_packing(x, format);
    float32 = true;
    round_first = round && !symmetric;  // beside a zero point of 0 it changes nothing
    type = Type::f32;
    set_scheme(q_min, q_max, symmetric, include_zero, eps, choice.half_range);
    if (global) check_global(*global, x, sizes.data(), static_cast<int64_t>(sizes.size()));
    scheme.rule = choice.rule;
    scheme.stored = choice.stored;
    scheme.half = with_codes(format, [](auto tag) {
      using F = typename decltype(tag)::type;
      if constexpr (F::Encoder::kInteger)
        return 0;
      else
        return 1 << (22 - F::kMantissa);
    });
    if (choice.rule != Rule::even) scheme.half = 0;
    for (int64_t rest = q_max; rest > 1; rest /= 2) ++scheme.exponent;
    back_type = check_output_dtype(output_dtype);
  }

  bool has_zero_point() const { return !is_float(format); }
  // Whether a scale is not what the steps use, or not chosen as version 1's are: no zero point then.
  bool is_stored() const {
    return scheme.rule != Rule::none || scheme.stored != Stored::number || global;
  }

  Result result(int i) const {
    const int64_t dim = static_cast<int64_t>(sizes.size());
    if (kCodes && i == 0)
      return {"q", dtype_of(format), codes_sizes.data(), x.dim, &x, per_byte(format) > 1};
    if (kBack && i == 1)
      return {"x_hat", dtype_of(back_type), x.sizes, x.dim, &x, x_hat_contiguous()};
    if (i == kScaleAt) return {"scale", scale_dtype(), sizes.data(), dim, &x, true};
    return {"zero_point", dtype_of(type), sizes.data(), has_zero_point() ? dim : 0, &x, true};
  }
  std::vector<const TensorInfo*> inputs() const {
    if (global) return {&x, &*global};
    return {&x};
  }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool fresh) const {
    const TensorInfo &scale = outs[kScaleAt], &zero_point = outs[kScaleAt + 1];
    if (x.numel == 0) {
      if (!has_zero_point()) clear(zero_point);
      return;
    }
    const bool stored = is_stored(), zero = has_zero_point() && !stored;
    const Converted converted = loadable(x);
    const TensorInfo& loaded = converted.info;
    std::optional<CodesOut> codes;
    if (kCodes)
      codes.emplace(outs[0], loaded, format, has_whole_bytes(loaded, last_block(), format));
    const TensorInfo& q = kCodes ? codes->info() : loaded;
    const TensorInfo& y = kBack ? outs[1] : loaded;
    const int64_t dim = static_cast<int64_t>(sizes.size());
    std::optional<Contiguous> kept;  // the scale's elements side by side, as those that are used
    std::optional<Tensor> used;
    std::optional<SpreadGlobal> spread;
    if (stored) {
      kept.emplace(scale);
      if (kCodes) used = empty_contiguous(x, sizes.data(), dim, dtype_of(Type::f32));
      if (global) spread.emplace(*global, loaded, sizes.data(), dim);
    }
    const TensorInfo scales = !stored ? scale : used ? TensorInfo("scale", *used) : kept->info;
    Dynamic d{};
    d.scale = !stored || used ? scales.data : nullptr;
    d.zero_point = zero ? zero_point.data : nullptr;
    static constexpr float kZero = 0, kOne = 1;
    d.stored = stored ? kept->info.data : nullptr;
    d.global = spread ? spread->parameter : Parameter{&kOne, Type::f32, true};
    d.each_global = spread && global->dim > 0;
    d.p_type = type;
    d.scheme = scheme;
    Elementwise& e = d.elements;
    e.operation = kOperation;
    e.format = format;
    e.packed = kCodes && codes->packed();
    e.x = loaded.data;
    e.x_type = loaded.kind();
    e.q = kCodes ? q.data : nullptr;
    e.y = kBack ? y.data : nullptr;
    e.y_type = y.kind();
    e.q_min = scheme.q_min;
    e.q_max = scheme.q_max;
    e.scale = {scales.data, type, false};
    e.add = e.subtract =
        zero ? Parameter{zero_point.data, type, false} : Parameter{&kZero, type, true};
    e.steps.divide = e.steps.add = type;
    e.steps.round_first = round_first;
    e.steps.subtract = e.steps.multiply =
        !float32 && back_type == Type::f64 ? Type::f64 : Type::f32;
    e.powers = scheme.rule != Rule::none;
    e.chosen = true;
    e.centred = scheme.symmetric && scheme.steps == std::max(scheme.q_max, 1) &&
                (!stored || scheme.rule == Rule::ceil);
    e.nontemporal = kBack && nontemporal(fresh, loaded, y);
    Axes axes = axes_of(loaded, &q, &y);
    const int64_t* const blocks = resolved_.empty() ? nullptr : resolved_.data();
    axes.add(kScale, sizes.data(), scales.strides, scale.dim, blocks);
    if (zero) axes.add(kZeroPoint, sizes.data(), zero_point.strides, zero_point.dim, blocks);
    // Packed codes are neighbours in the last dimension, however x lies.
    const bool packed = kCodes && codes->packed();
    for_layouts(axes, packed ? kQ : kX, packed ? kX : kQ, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(d, loaded);
    });
    if (!zero) clear(zero_point);
    if (kept && kept->copy) copy(scale, kept->info);
    if (kCodes) codes->finish();
  }

 private:
  std::vector<int64_t> resolved_;  // block_size without -1

  int32_t scale_dtype() const {
    switch (scheme.stored) {
      case Stored::number: break;
      case Stored::e8m0: return kFloat8E8m0;
      case Stored::e4m3: return aoti_torch_dtype_float8_e4m3fn();
    }
    return dtype_of(type);
  }

  FromChosen(const Tensor& x_, const BlockSize& block_size_, Format format_)
      : x("x", x_), format(format_), block_size(block_size_) {
    check_real(x);
  }

  void set_scheme(int64_t q_min, int64_t q_max, bool symmetric, bool include_zero, double eps,
                  bool half_range) {
    double steps = static_cast<double>(std::max<int64_t>(symmetric ? q_max : q_max - q_min, 1));
    if (half_range) steps = static_cast<double>(std::max<int64_t>(q_max - q_min, 1)) / 2;
    scheme.q_min = static_cast<int32_t>(q_min);
    scheme.q_max = static_cast<int32_t>(q_max);
    scheme.symmetric = symmetric;
    scheme.include_zero = include_zero;
    scheme.steps = steps;
    scheme.eps = eps;
    for (int64_t d = 0; block_size && d < x.dim; ++d) {
      const int64_t block = (*block_size)[d], whole = std::max<int64_t>(x.sizes[d], 1);
      resolved_.push_back(block == -1 ? whole : block);
      sizes.push_back(block == -1 ? 1 : (x.sizes[d] + block - 1) / block);
    }
    codes_sizes = kCodes ? packed_sizes(x, format) : std::vector<int64_t>();
  }
  int64_t last_block() const { return resolved_.empty() ? INT64_MAX - 1 : resolved_.back(); }
  bool x_hat_contiguous() const { return per_byte(format) > 1; }
};

using Choose = FromChosen<Operation::choose>;
using Quantize = FromChosen<Operation::quantize>;
using QuantizeDequantize = FromChosen<Operation::quantize_dequantize>;

}  // namespace

void implement_dynamic(Library& library) {
  using T = const Tensor&;
  using B = const BlockSize&;
  using O = const std::optional<Tensor>&;
  using D = const std::optional<int32_t>&;
  using R = const std::optional<Text>&;
  using F = const Text&;
  using I = int64_t;
  implement<Choose, T, B, I, I, double, bool, bool>(library, "choose_qparams");
  implement<Quantize, T, B, I, I, double, bool, int32_t, bool>(library, "dynamic_quantize");
  implement<QuantizeDequantize, T, B, I, I, double, bool, int32_t, bool>(library,
                                                                         "quantize_dequantize");
  implement<Choose, T, B, I, I, double, bool, F, bool, D, R, O>(library, "choose_qparams.format");
  implement<Quantize, T, B, I, I, double, bool, F, bool, D, R, O, O, B, bool>(
      library, "dynamic_quantize.format");
  implement<QuantizeDequantize, T, B, I, I, double, bool, F, bool, D, R, O, O, B, bool, D>(
      library, "quantize_dequantize.format");
}

}  // namespace quantkit
