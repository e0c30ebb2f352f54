#include <algorithm>

#include "sizes.h"

namespace quantkit {
namespace {

// Those that an operator of contract 1 takes, by their dtype.
constexpr Format kByDtype[] = {Format::int8, Format::uint8, Format::int16};

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

void check_q_range(int64_t q_min, int64_t q_max, Format format) {
  if (!holds(format, q_min, q_max)) refuse_limits(q_min, q_max, format, name_of(format));
}

namespace {

void check_fit(const TensorInfo& p, const TensorInfo& x) {
  if (!fits(p, x))
    raise(std::string(p.name) + ": shape " + p.shape_text() + " does not fit " + x.name +
          " of shape " + x.shape_text() + ": every size must divide " + x.name +
          "'s, or the shape broadcast to " + x.name + "'s");
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

}  // namespace quantkit
