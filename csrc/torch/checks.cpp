#include "checks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string_view>

#include "overlap.h"

namespace quantkit {
namespace {

[[noreturn]] void raise(const std::string& text) { throw std::runtime_error(text); }

std::string text(int64_t v) { return std::to_string(v); }

// A name that nothing has, as Python shows it: at most 40 characters of its UTF-8. An error ends at
// a NUL, so control characters are escaped.
std::string quoted(const std::string& name) {
  std::string shown = "'";
  int characters = 0;
  for (const char c : name) {
    const bool begins = (c & 0xC0) != 0x80;
    if (begins && characters++ == 40) break;
    char code[5];
    snprintf(code, sizeof(code), "\\x%02x", uint8_t(c));
    const size_t letter = std::string_view("\\\t\n\r").find(c);
    if (letter != std::string_view::npos)
      (shown += '\\') += "\\tnr"[letter];
    else if (uint8_t(c) < 0x20 || c == 0x7F)
      shown += code;
    else
      shown += c;
  }
  return shown + "'";
}

std::string list_text(const std::vector<int64_t>& v) {
  std::string s = "[";
  for (size_t i = 0; i < v.size(); ++i) s += (i > 0 ? ", " : "") + text(v[i]);
  return s + "]";
}

// As Python prints a float.
std::string text(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v > 0 ? "inf" : "-inf";
  char buffer[32];
  const bool plain = v == 0 || (std::abs(v) >= 1e-4 && std::abs(v) < 1e16);
  const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), v, format).ptr;
  const std::string s(buffer, end);
  return s.find_first_of(".e") == std::string::npos ? s + ".0" : s;
}

bool fits(const TensorInfo& p, const TensorInfo& x) {
  if (p.dim > x.dim) return false;
  const int64_t skipped = x.dim - p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    const int64_t size = p.sizes[d], whole = x.sizes[skipped + d];
    if (size == 1 || size == whole) continue;
    if (skipped > 0 || size == 0 || whole == 0 || whole % size != 0) return false;
  }
  return true;
}

bool fit_each_other(const TensorInfo& a, const TensorInfo& b) {
  for (int64_t i = 1; i <= std::min(a.dim, b.dim); ++i) {
    const int64_t m = a.sizes[a.dim - i], n = b.sizes[b.dim - i];
    if (m != n && m != 1 && n != 1) return false;
  }
  return true;
}

void check_kind(const TensorInfo& t, bool floating) {
  if (floating ? t.floating() : t.type >= 0) return;
  raise(std::string(t.name) + ": expected " + (floating ? "a floating dtype" : "a real dtype") +
        " of at least 16 bits if floating, got " + dtype_name(t.dtype));
}

}  // namespace

void check_real(const TensorInfo& t) { check_kind(t, false); }

namespace {

// Those that an operator of contract 1 takes, by their dtype.
constexpr Format kByDtype[] = {Format::int8, Format::uint8, Format::int16};

#define QK_ENTRY(name, ...) Format::name,
constexpr Format kFormats[] = {QK_FORMATS(QK_ENTRY)};
#undef QK_ENTRY

// "a, b or c"
template <class List, class Name>
std::string choice_text(const List& list, Name name) {
  std::string names;
  for (size_t i = 0; i < std::size(list); ++i)
    names += (i == 0 ? "" : i + 1 < std::size(list) ? ", " : " or ") + std::string(name(list[i]));
  return names;
}

bool holds(Format format, int64_t q_min, int64_t q_max) {
  return with_codes(format, [&](auto tag) {
    using F = typename decltype(tag)::type;
    if constexpr (F::Encoder::kInteger)
      return F::kLow <= q_min && q_min <= q_max && q_max <= F::kHigh;
    else
      return q_min == -q_max && 0 < q_max && q_max <= F::kHigh &&
             F::within(float(q_max), 0.0f).number == float(q_max);
  });
}

[[noreturn]] void refuse_limits(int64_t q_min, int64_t q_max, Format format,
                                const std::string& name) {
  const auto [low, high] = with_codes(format, [](auto tag) {
    using F = typename decltype(tag)::type;
    return std::pair<int64_t, int64_t>(F::kLow, F::kHigh);
  });
  const std::string limits = "[" + text(q_min) + ", " + text(q_max) + "]";
  if (is_float(format))
    raise("q_min, q_max: expected -n and n, n a positive integer that is a number of " + name +
          " up to " + text(high) + ", got " + limits);
  if (q_min > q_max)
    raise("q_min, q_max: expected q_min <= q_max, got " + text(q_min) + " > " + text(q_max));
  raise("q_min, q_max: " + limits + " is outside the limits [" + text(low) + ", " + text(high) +
        "] of " + name);
}

}  // namespace

Format check_q_range(int64_t q_min, int64_t q_max, int32_t dtype) {
  for (const Format format : kByDtype) {
    if (dtype_of(format) != dtype) continue;
    if (!holds(format, q_min, q_max)) refuse_limits(q_min, q_max, format, dtype_name(dtype));
    return format;
  }
  raise("dtype: expected " +
        choice_text(kByDtype, [](Format f) { return dtype_name(dtype_of(f)); }) + ", got " +
        dtype_name(dtype));
}

Format check_format(const std::string& name) {
  for (const Format format : kFormats)
    if (name == name_of(format)) return format;
  raise("format: expected " + choice_text(kFormats, name_of) + ", got " + quoted(name));
}

void check_q_range(int64_t q_min, int64_t q_max, Format format) {
  if (!holds(format, q_min, q_max)) refuse_limits(q_min, q_max, format, name_of(format));
}

namespace {

void check_device(const TensorInfo& p, const TensorInfo& x) {
  const bool scalar = p.dim == 0 && p.device_type == aoti_torch_device_type_cpu();
  if (!p.same_device(x) && !scalar)
    raise(std::string(p.name) + ": expected device " + x.device_text() + ", that of " + x.name +
          ", got " + p.device_text());
}

void check_fit(const TensorInfo& p, const TensorInfo& x) {
  if (!fits(p, x))
    raise(std::string(p.name) + ": shape " + p.shape_text() + " does not fit " + x.name +
          " of shape " + x.shape_text() + ": every size must divide " + x.name +
          "'s, or the shape broadcast to " + x.name + "'s");
}

void check_block_sizes(const TensorInfo& x, const std::vector<int64_t>& blocks, bool short_blocks,
                       const std::string& name = "block_size") {
  if (static_cast<int64_t>(blocks.size()) != x.dim)
    raise(name + ": expected " + text(x.dim) + " sizes, one per dimension of " + x.name +
          " of shape " + x.shape_text() + ", got " + list_text(blocks));
  for (int64_t d = 0; d < x.dim; ++d) {
    if (blocks[d] == 0 || blocks[d] < -1)
      raise(name + ": expected sizes of at least 1, or -1 for a whole dimension, got " +
            list_text(blocks));
    if (!short_blocks && blocks[d] != -1 && x.sizes[d] % blocks[d] != 0)
      raise("block_size: " + text(blocks[d]) + " does not divide " + text(x.sizes[d]) +
            ", the size of dimension " + text(d) + " of " + x.name +
            "; a short last block needs compute_dtype=torch.float32");
  }
}

void check_fit(const TensorInfo& scale, const TensorInfo& zero_point, const TensorInfo& x) {
  check_fit(zero_point, x);
  if (!fit_each_other(scale, zero_point))
    raise("scale, zero_point: shapes " + scale.shape_text() + " and " + zero_point.shape_text() +
          " do not broadcast with each other");
}

// scale has a size for the blocks of each dimension. Whether the last one of some is short.
bool check_blocks(const TensorInfo& x, const TensorInfo& scale,
                  const std::vector<int64_t>& blocks) {
  check_block_sizes(x, blocks, true);
  std::vector<int64_t> counts;
  bool is_short = false;
  for (int64_t d = 0; d < x.dim; ++d) {
    counts.push_back(blocks_in(x.sizes[d], blocks[d]));
    is_short |= blocks[d] != -1 && x.sizes[d] % blocks[d] != 0;
  }
  if (!std::equal(scale.sizes, scale.sizes + scale.dim, counts.begin(), counts.end()))
    raise("scale: shape " + scale.shape_text() + " does not fit " + x.name + " of shape " +
          x.shape_text() + " and block_size " + list_text(blocks) + ": expected " +
          tuple_text(counts.data(), x.dim));
  return is_short;
}

// Where block_size alone says which elements share a parameter.
void check_fits_scale(const TensorInfo& zero_point, const TensorInfo& scale) {
  bool fits = zero_point.dim == 0 || zero_point.dim == scale.dim;
  for (int64_t d = 0; fits && d < zero_point.dim; ++d)
    fits = zero_point.sizes[d] == 1 || zero_point.sizes[d] == scale.sizes[d];
  if (!fits)
    raise("zero_point: expected sizes of 1 or those of scale of shape " + scale.shape_text() +
          " beside short blocks, got " + zero_point.shape_text());
}

}  // namespace

bool is_coded(const TensorInfo& scale) {
  return scale.dtype == kFloat8E8m0 || scale.dtype == dtype_of(Format::float8_e4m3fn);
}

void check_parameters(const TensorInfo& x, const TensorInfo& scale, const TensorInfo& zero_point) {
  check_kind(x, false);
  check_kind(scale, true);
  check_kind(zero_point, false);
  check_device(scale, x);
  check_fit(scale, x);
  check_device(zero_point, x);
  check_fit(scale, zero_point, x);
}

void check_parameters(const TensorInfo& x, const TensorInfo& scale, const TensorInfo* zero_point,
                      Format format, const BlockSize& block_size, const TensorInfo* global) {
  if (!scale.floating() && !is_coded(scale))
    raise(
        "scale: expected a floating dtype of at least 16 bits, torch.float8_e8m0fnu or "
        "torch.float8_e4m3fn, got " +
        dtype_name(scale.dtype));
  if (zero_point != nullptr) {
    if (is_float(format))
      raise("zero_point: expected None for " + std::string(name_of(format)) + ", got Tensor");
    check_kind(*zero_point, false);
  }
  check_device(scale, x);
  if (zero_point != nullptr) check_device(*zero_point, x);
  const bool is_short = block_size && check_blocks(x, scale, *block_size);
  if (!is_short) check_fit(scale, x);
  if (global != nullptr) {
    if (scale.dtype == kFloat8E8m0) raise("global_scale: torch.float8_e8m0fnu scales take none");
    check_global(*global, x, scale.sizes, scale.dim);
  }
  if (zero_point == nullptr) return;
  if (is_short)
    check_fits_scale(*zero_point, scale);
  else
    check_fit(scale, *zero_point, x);
}

void check_global(const TensorInfo& global, const TensorInfo& x, const int64_t* sizes,
                  int64_t dim) {
  check_kind(global, true);
  check_device(global, x);
  TensorInfo scale = global;  // with scale's sizes
  scale.sizes = sizes;
  scale.dim = dim;
  if ((global.dim != 0 && global.dim != dim) || !fits(global, scale))
    raise("global_scale: shape " + global.shape_text() + " does not fit scale of shape " +
          tuple_text(sizes, dim) + ": expected no dimension, or sizes that divide scale's");
}

void check_blocks(const char* name, const TensorInfo& x, const std::vector<int64_t>& blocks) {
  check_block_sizes(x, blocks, true, name);
}

void check_draws(const TensorInfo& x, const TensorInfo* seed, const BlockSize& index) {
  if (seed == nullptr) {
    if (index) raise("index: expected None without seed, got " + list_text(*index));
    return;
  }
  if (seed->dtype != dtype_of(Type::i64) || seed->dim != 1 || seed->sizes[0] != 2)
    raise("seed: expected torch.int64 of shape (2,), got " + dtype_name(seed->dtype) +
          " of shape " + seed->shape_text());
  if (!seed->same_device(x) && seed->device_type != aoti_torch_device_type_cpu())
    raise("seed: expected device " + x.device_text() + ", that of x, or cpu, got " +
          seed->device_text());
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

void check_codes(const TensorInfo& q, Format format) {
  const std::string name = name_of(format);
  if (per_byte(format) == 1 && !is_float(format)) return check_kind(q, false);
  const bool is_float4 = format == Format::float4_e2m1fn;
  if (q.dtype != dtype_of(format) && !(is_float4 && q.dtype == kFloat4E2m1x2))
    raise("q: expected " + dtype_name(dtype_of(format)) +
          (is_float4 ? " or " + dtype_name(kFloat4E2m1x2) : "") + " for " + name + ", got " +
          dtype_name(q.dtype));
  if (per_byte(format) > 1 && q.dim == 0)
    raise("q: expected at least one dimension for " + name + ", got shape ()");
}

Type check_output_dtype(const std::optional<int32_t>& output_dtype) {
  if (!output_dtype) return Type::f32;
  for (const Type type : {Type::f16, Type::bf16, Type::f32})
    if (dtype_of(type) == *output_dtype) return type;
  raise("output_dtype: expected None, torch.float16, torch.bfloat16 or torch.float32, got " +
        dtype_name(*output_dtype));
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
  if (!grad.same_device(x))
    raise("grad: expected device " + x.device_text() + ", that of x, got " + grad.device_text());
}

void check_mask(const TensorInfo& mask, const TensorInfo& grad) {
  check_kind(grad, true);
  if (mask.dtype != dtype_of(Type::boolean))
    raise("mask: expected torch.bool, got " + dtype_name(mask.dtype));
  if (!std::equal(grad.sizes, grad.sizes + grad.dim, mask.sizes, mask.sizes + mask.dim))
    raise("grad: expected shape " + mask.shape_text() + ", that of mask, got " + grad.shape_text());
  if (!grad.same_device(mask))
    raise("grad: expected device " + mask.device_text() + ", that of mask, got " +
          grad.device_text());
}

namespace {
void check_dtype(const TensorInfo& t, Type type) {
  if (t.dtype != dtype_of(type))
    raise(std::string(t.name) + ": expected " + dtype_name(dtype_of(type)) + ", got " +
          dtype_name(t.dtype));
}
}  // namespace

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

void check_out(const TensorInfo& out, const int64_t* sizes, int64_t dim, int32_t dtype,
               const TensorInfo& like) {
  const std::string name = out.name;
  if (out.dtype != dtype)
    raise(name + ": expected dtype " + dtype_name(dtype) + ", got " + dtype_name(out.dtype));
  if (!out.same_device(like))
    raise(name + ": expected device " + like.device_text() + ", got " + out.device_text());
  if (!std::equal(out.sizes, out.sizes + out.dim, sizes, sizes + dim))
    raise(name + ": expected shape " + tuple_text(sizes, dim) + ", got " + out.shape_text());
}

namespace {

// Strides of dimensions of size 1 lead nowhere.
bool same_elements(const TensorInfo& a, const TensorInfo& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int64_t d = 0; d < a.dim; ++d) same &= a.sizes[d] == 1 || a.strides[d] == b.strides[d];
  return same;
}

void check_overlap(const std::vector<const TensorInfo*>& outs,
                   const std::vector<const TensorInfo*>& inputs, const TensorInfo* in_place) {
  for (const TensorInfo* out : outs)
    if (overlaps_itself(*out))
      raise(std::string(out->name) + ": its elements overlap each other in memory");
  for (size_t i = 0; i < outs.size(); ++i) {
    const TensorInfo& out = *outs[i];
    std::vector<const TensorInfo*> others = inputs;
    others.insert(others.end(), outs.begin(), outs.begin() + i);
    for (const TensorInfo* other : others) {
      const bool same = other == in_place && same_elements(out, *other);
      if (!same && overlap(out, *other))
        raise(std::string(out.name) + ": overlaps " + other->name + " in memory");
    }
  }
}

}  // namespace

void claim_outs(const std::vector<const TensorInfo*>& outs,
                const std::vector<const TensorInfo*>& inputs, const TensorInfo* in_place) {
  check_overlap(outs, inputs, in_place);
  for (const TensorInfo* out : outs)
    if (aoti_torch_grad_mode_is_enabled() && !is_leaf(*out))
      raise(std::string(out->name) +
            ": expected a tensor outside of autograd's graphs, as out= has no "
            "gradient; pass " +
            out->name + ".detach()");
  // A tensor copied to itself stays as it is, but autograd counts a new version of it.
  for (const TensorInfo* out : outs)
    if (aoti_torch_copy_(out->handle, out->handle, 0) != AOTI_TORCH_SUCCESS)
      raise(std::string(out->name) + ": cannot be written: " + torch_says());
}

}  // namespace quantkit
