#include <algorithm>
#include <limits>

#include "values.h"

namespace quantkit {

void check_draws(const TensorInfo& x, const std::optional<Tensor>& given, const BlockSize& index) {
  if (!given) {
    if (index) raise("index: expected None without seed, got " + list_text(*index));
    return;
  }
  const TensorInfo seed("seed", *given);
  if (seed.dtype != dtype_of(Type::i64) || seed.dim != 1 || seed.sizes[0] != 2)
    raise("seed: expected torch.int64 of shape (2,), got " + dtype_name(seed.dtype) + " of shape " +
          seed.shape_text());
  if (!seed.same_device(x) && seed.device_type != aoti_torch_device_type_cpu())
    raise("seed: expected device " + x.device_text() + ", that of x, or cpu, got " +
          seed.device_text());
  if (!index) return;
  if (static_cast<int64_t>(index->size()) != 1 + x.dim)
    raise("index: expected an offset and a stride for each dimension of x of shape " +
          x.shape_text() + ", got " + list_text(*index));
  if (x.numel == 0) return;
  __int128 least = (*index)[0], most = least;
  for (int64_t d = 0; d < x.dim; ++d) {
    const __int128 along = static_cast<__int128>((*index)[d + 1]) * (x.sizes[d] - 1);
    (along < 0 ? least : most) += along;
  }
  if (least < 0 || most > INT64_MAX)
    raise("index: expected places of x's elements in [0, 2^63 - 1], got " + list_text(*index) +
          " for x of shape " + x.shape_text());
}

ScaleChoice check_rule(Format format, bool symmetric, double eps,
                       const std::optional<int32_t>& scale_dtype,
                       const std::optional<Text>& scale_rule, bool has_global) {
  const std::string name = name_of(format);
  ScaleChoice choice{false, Rule::none, Stored::number};
  if (scale_dtype == kFloat8E8m0)
    choice.stored = Stored::e8m0;
  else if (scale_dtype == aoti_torch_dtype_float8_e4m3fn())
    choice.stored = Stored::e4m3;
  else if (scale_dtype && *scale_dtype != dtype_of(Type::f32))
    raise(
        "scale_dtype: expected None, torch.float32, torch.float8_e8m0fnu or "
        "torch.float8_e4m3fn, got " +
        dtype_name(*scale_dtype));
  const std::string coded = scale_dtype ? dtype_name(*scale_dtype) : "";
  if (scale_rule) {
    constexpr std::pair<const char*, Rule> kRules[] = {{"half_range", Rule::none},
                                                       {"ceil", Rule::ceil},
                                                       {"floor", Rule::floor},
                                                       {"even", Rule::even}};
    const std::string& given = scale_rule->value;
    const auto* const rule = std::find_if(std::begin(kRules), std::end(kRules),
                                          [&](const auto& known) { return given == known.first; });
    if (rule == std::end(kRules))
      raise("scale_rule: expected None, " +
            choice_text(kRules, [](const auto& r) { return r.first; }) + ", got " + quoted(given));
    choice.rule = rule->second;
    choice.half_range = choice.rule == Rule::none;
    const bool is_signed =
        with_codes(format, [](auto tag) { return decltype(tag)::type::kLow < 0; });
    if (choice.half_range && (is_float(format) || !is_signed))
      raise("scale_rule: half_range is for signed integer formats, got " + name);
    if (choice.rule == Rule::even && !is_float(format))
      raise("scale_rule: even is for float formats, got " + name);
    if (choice.stored == Stored::e4m3 || (choice.stored == Stored::e8m0 && choice.half_range))
      raise("scale_rule: " + given + " makes no scales of " + coded);
  } else if (choice.stored == Stored::e8m0) {
    choice.rule = Rule::ceil;
  }
  if (has_global && choice.rule != Rule::none)
    raise("global_scale: scales that are powers of two take none");
  // Of what float32 rounds to it or less, e4m3 makes 0.
  if (choice.stored == Stored::e4m3 && !(eps > 0x1p-10 + 0x1p-34))
    raise("eps: expected a number above 2**-10 for " + coded + ", got " + text(eps));
  if (!symmetric) {
    if (is_float(format)) raise("symmetric (sym): expected True for " + name + ", got False");
    const char* const given = scale_rule                        ? "scale_rule"
                              : choice.stored != Stored::number ? "scale_dtype"
                              : has_global                      ? "global_scale"
                                                                : nullptr;
    if (given != nullptr)
      raise(std::string(given) +
            ": only the symmetric scheme takes one, but the asymmetric one was asked for");
  }
  return choice;
}

void check_round_first(bool round_first, Format format, bool randomly) {
  if (round_first && is_float(format))
    raise("round_first: expected False for " + std::string(name_of(format)) + ", got True");
  if (round_first && randomly) raise("round_first: expected False with seed, got True");
}

void check_packing(const TensorInfo& x, Format format) {
  const int64_t codes = per_byte(format);
  if (codes > 1 && (x.dim == 0 || x.sizes[x.dim - 1] % codes != 0))
    raise("x: expected a last size that " + text(codes) + " divides for " + name_of(format) +
          ", got shape " + x.shape_text());
}

void check_choice(const TensorInfo& x, const BlockSize& block_size, double eps, bool symmetric,
                  bool include_zero, bool short_blocks) {
  // By its bits: a caller that flushes denormals compares them as 0.
  const uint64_t bits = bit_cast<uint64_t>(eps);
  if (bits == 0 || bits > bit_cast<uint64_t>(std::numeric_limits<double>::infinity()))
    raise("eps: expected a number above 0, got " + text(eps));
  if (include_zero && symmetric)
    raise("include_zero: only the asymmetric scheme takes it, but the symmetric one was asked for");
  check_chosen_blocks(x, block_size, short_blocks);
}

void check_chosen_blocks(const TensorInfo& x, const BlockSize& block_size, bool short_blocks) {
  if (block_size) check_block_sizes(x, *block_size, short_blocks);
  // Without a block there is nothing to choose; a block without elements has no extremes.
  bool blockless = false;
  for (int64_t d = 0; block_size && d < x.dim; ++d)
    blockless |= x.sizes[d] == 0 && (*block_size)[d] != -1;
  if (x.numel == 0 && !blockless)
    raise(
        "x: expected at least one element to choose parameters from, got an empty tensor of "
        "shape " +
        x.shape_text());
}

void check_gradient(const TensorInfo& grad, const TensorInfo& x) {
  check_kind(grad, true);
  if (grad.dtype != x.dtype)
    raise("grad: expected dtype " + dtype_name(x.dtype) + ", that of x, got " +
          dtype_name(grad.dtype));
  if (!std::equal(grad.sizes, grad.sizes + grad.dim, x.sizes, x.sizes + x.dim))
    raise("grad: expected shape " + x.shape_text() + ", got " + grad.shape_text());
  check_same_device(grad, x);
}

void check_mask(const TensorInfo& mask, const TensorInfo& grad) {
  check_kind(grad, true);
  check_dtype(mask, Type::boolean);
  if (!std::equal(grad.sizes, grad.sizes + grad.dim, mask.sizes, mask.sizes + mask.dim))
    raise("grad: expected shape " + mask.shape_text() + ", that of mask, got " + grad.shape_text());
  check_same_device(grad, mask);
}

void check_linear(const TensorInfo& x, const TensorInfo& q, const TensorInfo& scale,
                  const TensorInfo* bias) {
  constexpr int64_t kMostColumns = 131071;  // so many products fit into 32 bits
  check_kind(x, true);
  check_dtype(q, Type::i8);
  check_dtype(scale, Type::f32);
  if (bias != nullptr) check_kind(*bias, true);
  if (x.dim == 0 || x.sizes[x.dim - 1] == 0 || x.sizes[x.dim - 1] > kMostColumns)
    raise("x: expected a last dimension of 1 to 131071 elements, got shape " + x.shape_text());
  const int64_t columns = x.sizes[x.dim - 1];
  if (q.dim != 2 || q.sizes[1] != columns)
    raise("q: expected shape (outputs, " + text(columns) + "), as x has shape " + x.shape_text() +
          ", got " + q.shape_text());
  const int64_t outputs = q.sizes[0];
  if (scale.dim != 0 && !(scale.dim == 2 && scale.sizes[0] == outputs && scale.sizes[1] == 1))
    raise("scale: expected shape () or (" + text(outputs) + ", 1), got " + scale.shape_text());
  if (bias != nullptr && !(bias->dim == 1 && bias->sizes[0] == outputs))
    raise("bias: expected shape (" + text(outputs) + ",), got " + bias->shape_text());
  for (const TensorInfo* t : {&q, &scale, bias})
    if (t != nullptr) check_device(*t, x);
}

}  // namespace quantkit
