// Operators that choose parameters: choose_qparams, dynamic_quantize, quantize_dequantize; and
// aminmax, what they choose from.
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
  Blocks blocks;         // each has a scale and a zero_point
  Type type;             // of scale and zero_point
  Type back_type;        // of x_hat
  bool float32 = false;  // the steps
  bool round_first = false;
  DrawnFrom drawn;

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
    zero_point.dim = blocks.dim();
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
    check_draws(x, seed, index);
    check_round_first(round, format, seed.has_value());
    if (kCodes) check_packing(x, format);
    drawn = DrawnFrom(x, seed, index);
    float32 = true;
    round_first = round && !symmetric;  // beside a zero point of 0 it changes nothing
    type = Type::f32;
    set_scheme(q_min, q_max, symmetric, include_zero, eps, choice.half_range);
    if (global) check_global(*global, x, blocks.counts.data(), blocks.dim());
    scheme.rule = choice.rule;
    scheme.stored = choice.stored;
    scheme.half = with_codes(format, [](auto tag) {
      using F = typename decltype(tag)::type;
      if constexpr (F::Encoder::kInteger)
        return 0;
      else
        return 1 << (22 - F::kMantissa);
    });
    for (int64_t rest = q_max; rest > 1; rest /= 2) ++scheme.exponent;
    back_type = check_output_dtype(output_dtype);
  }

  bool has_zero_point() const { return !is_float(format); }
  // Whether a scale is not what the steps use, or not chosen as version 1's are: no zero point then.
  bool is_stored() const {
    return scheme.rule != Rule::none || scheme.stored != Stored::number || global;
  }

  Result result(int i) const {
    if (kCodes && i == 0)
      return {"q", dtype_of(format), codes_sizes.data(), x.dim, &x, per_byte(format) > 1};
    if (kBack && i == 1)
      return {"x_hat", dtype_of(back_type), x.sizes, x.dim, &x, per_byte(format) > 1};
    const int64_t *const counts = blocks.counts.data(), dim = blocks.dim();
    if (i == kScaleAt) return {"scale", scale_dtype(), counts, dim, &x, true};
    return {"zero_point", dtype_of(type), counts, has_zero_point() ? dim : 0, &x, true};
  }
  std::vector<const TensorInfo*> inputs() const {
    std::vector<const TensorInfo*> inputs = {&x};
    if (global) inputs.push_back(&*global);
    if (drawn) inputs.push_back(&drawn.seed());
    return inputs;
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
    const int64_t *const counts = blocks.counts.data(), dim = blocks.dim();
    std::optional<Contiguous> kept;  // the scale's elements side by side, as those that are used
    std::optional<Tensor> used;
    std::optional<SpreadGlobal> spread;
    if (stored) {
      kept.emplace(scale);
      if (kCodes) used = empty_contiguous(x, counts, dim, dtype_of(Type::f32));
      if (global) spread.emplace(*global, loaded, counts, dim);
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
    drawn.give(e, axes, loaded);
    blocks.add_to(axes, kScale, scales);
    if (zero) blocks.add_to(axes, kZeroPoint, zero_point);
    // Packed codes are neighbours in the last dimension, however x lies.
    for_layouts(axes, e.packed ? kQ : kX, e.packed ? kX : kQ, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(d, loaded);
    });
    if (!zero) clear(zero_point);
    if (kept && kept->copy) copy(scale, kept->info);
    if (kCodes) codes->finish();
  }

 private:
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
    blocks = Blocks(x, block_size);
    codes_sizes = kCodes ? packed_sizes(x, format) : std::vector<int64_t>();
  }
  int64_t last_block() const { return blocks.dim() == 0 ? INT64_MAX - 1 : blocks.sizes.back(); }
};

// Integers in the order of int64: those of uint64 with their sign flipped, which is its own
// inverse.
Tensor in_order(const Tensor& t, Type type) {
  if (type != Type::u64) return t;
  static int64_t sign = INT64_MIN;
  AtenTensorHandle number = nullptr;
  check_shim(aoti_torch_create_tensor_from_blob(&sign, 0, nullptr, nullptr, 0, dtype_of(Type::i64),
                                                aoti_torch_device_type_cpu(), -1, &number));
  return aten("aten::bitwise_xor", "Tensor", t, Tensor(number));
}

// min and max of each block of x, in x's dtype.
struct Aminmax {
  static constexpr int kResults = 2;
  TensorInfo x;
  Blocks blocks;

  Aminmax(const Tensor& x_, const BlockSize& block_size) : x("x", x_) {
    check_real(x);
    check_chosen_blocks(x, block_size, true);
    blocks = Blocks(x, block_size);
  }

  Result result(int i) const {
    return {i == 0 ? "min" : "max", x.dtype, blocks.counts.data(), blocks.dim(), &x, true};
  }
  std::vector<const TensorInfo*> inputs() const { return {&x}; }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool) const {
    if (x.numel == 0) return;
    if (!x.floating()) return run_integers(outs);
    Dynamic d{};
    d.scheme.extremes = true;
    d.scale = outs[0].data;
    d.zero_point = outs[1].data;
    d.p_type = x.kind();
    Elementwise& e = d.elements;
    e.operation = Operation::choose;
    e.x = x.data;
    e.x_type = e.y_type = x.kind();
    Axes axes = axes_of(x, nullptr, nullptr);
    blocks.add_to(axes, kScale, outs[0]);
    blocks.add_to(axes, kZeroPoint, outs[1]);
    for_layouts(axes, kX, kQ, [&](const Layout& layout) {
      e.layout = &layout;
      quantkit::run(d, x);
    });
  }

 private:
  // No kernel loads integers: torch reduces them as int64, which is exact.
  void run_integers(const TensorInfo* outs) const {
    const Tensor copied = empty_contiguous(x, x.sizes, x.dim, dtype_of(Type::i64));
    copy(TensorInfo(x.name, copied), x);
    const Tensor numbers = in_order(copied, x.kind());
    const Tensor made[] = {reduced("aten::amin", numbers), reduced("aten::amax", numbers)};
    for (int i = 0; i < kResults; ++i) copy(outs[i], TensorInfo(outs[i].name, made[i]));
  }
  Tensor reduced(const char* reduction, const Tensor& numbers) const {
    const Tensor made =
        empty_contiguous(x, blocks.counts.data(), blocks.dim(), dtype_of(Type::i64));
    const TensorInfo from(x.name, numbers), to(x.name, made);
    Axes axes(x.sizes, x.dim);
    axes.add(kX, from.strides);
    blocks.add_to(axes, kScale, to);
    for_layouts(axes, kX, kScale, [&](const Layout& layout) {
      // Of no dimension torch would reduce all: the first one is there for that.
      std::vector<int64_t> sizes{1}, strides{1}, counts{1}, to_strides{1}, within{0};
      for (int32_t k = 0; k < layout.count; ++k) {
        const Dim& dim = layout.dims[k];
        const bool is_within = dim.stride[kScale] == 0;
        if (is_within) within.push_back(k + 1);
        sizes.push_back(dim.size);
        strides.push_back(dim.stride[kX]);
        counts.push_back(is_within ? 1 : dim.size);
        to_strides.push_back(dim.stride[kScale]);
      }
      const Tensor part = as_strided(from, sizes, strides, layout.offset[kX]);
      const Tensor place = as_strided(to, counts, to_strides, layout.offset[kScale]);
      copy(TensorInfo(x.name, place), TensorInfo(x.name, aten(reduction, "", part, within, true)));
    });
    return in_order(made, x.kind());
  }
};

using Choose = FromChosen<Operation::choose>;
using Quantize = FromChosen<Operation::quantize>;
using QuantizeDequantize = FromChosen<Operation::quantize_dequantize>;

}  // namespace

void quantize_tokens(const Tensor& x, const TensorInfo* outs) {
  std::vector<int64_t> blocks(TensorInfo("x", x).dim, 1);
  blocks.back() = -1;
  const Text format{"int8"};
  Quantize(x, blocks, -128, 127, 1e-8, true, format, false, {}, {}, {}).run(outs, true);
}

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
  implement<Aminmax, T, B>(library, "aminmax");
}

}  // namespace quantkit
