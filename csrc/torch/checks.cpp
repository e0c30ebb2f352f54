#include "checks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "overlap.h"

namespace quantkit {
namespace {

[[noreturn]] void raise(const std::string& text) { throw std::runtime_error(text); }

std::string text(int64_t v) { return std::to_string(v); }

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

Format check_q_range(int64_t q_min, int64_t q_max, int32_t dtype) {
  std::string names;
  for (size_t i = 0; i < std::size(kFormats); ++i) {
    const int32_t known = dtype_of(stored_type(kFormats[i]));
    if (known == dtype) return check_q_range(q_min, q_max, kFormats[i]);
    names += (i == 0 ? "" : i + 1 < std::size(kFormats) ? ", " : " or ") + dtype_name(known);
  }
  raise("dtype: expected " + names + ", got " + dtype_name(dtype));
}

Format check_q_range(int64_t q_min, int64_t q_max, Format format) {
  const auto [low, high] = with_codes(format, [](auto tag) {
    using F = typename decltype(tag)::type;
    return std::pair<int64_t, int64_t>(F::kLow, F::kHigh);
  });
  if (q_min > q_max)
    raise("q_min, q_max: expected q_min <= q_max, got " + text(q_min) + " > " + text(q_max));
  if (q_min < low || q_max > high)
    raise("q_min, q_max: [" + text(q_min) + ", " + text(q_max) + "] is outside the limits [" +
          text(low) + ", " + text(high) + "] of " + dtype_name(dtype_of(stored_type(format))));
  return format;
}

void check_parameters(const TensorInfo& x, const TensorInfo& scale, const TensorInfo& zero_point) {
  check_kind(x, false);
  check_kind(scale, true);
  check_kind(zero_point, false);
  for (const TensorInfo* p : {&scale, &zero_point}) {
    const bool scalar = p->dim == 0 && p->device_type == aoti_torch_device_type_cpu();
    if (!p->same_device(x) && !scalar)
      raise(std::string(p->name) + ": expected device " + x.device_text() + ", that of " + x.name +
            ", got " + p->device_text());
    if (!fits(*p, x))
      raise(std::string(p->name) + ": shape " + p->shape_text() + " does not fit " + x.name +
            " of shape " + x.shape_text() + ": every size must divide " + x.name +
            "'s, or the shape broadcast to " + x.name + "'s");
  }
  if (!fit_each_other(scale, zero_point))
    raise("scale, zero_point: shapes " + scale.shape_text() + " and " + zero_point.shape_text() +
          " do not broadcast with each other");
}

void check_choice(const TensorInfo& x, const BlockSize& block_size, double eps, bool symmetric,
                  bool include_zero) {
  // By its bits: a caller that flushes denormals compares them as 0.
  const uint64_t bits = bit_cast<uint64_t>(eps);
  if (bits == 0 || bits > bit_cast<uint64_t>(std::numeric_limits<double>::infinity()))
    raise("eps: expected a number above 0, got " + text(eps));
  if (include_zero && symmetric)
    raise("include_zero: only the asymmetric scheme takes it, but the symmetric one was asked for");
  if (block_size) {
    const std::vector<int64_t>& blocks = *block_size;
    if (static_cast<int64_t>(blocks.size()) != x.dim)
      raise("block_size: expected " + text(x.dim) + " sizes, one per dimension of x of shape " +
            x.shape_text() + ", got " + list_text(blocks));
    for (int64_t d = 0; d < x.dim; ++d) {
      if (blocks[d] == 0 || blocks[d] < -1)
        raise("block_size: expected sizes of at least 1, or -1 for a whole dimension, got " +
              list_text(blocks));
      if (blocks[d] != -1 && x.sizes[d] % blocks[d] != 0)
        raise("block_size: " + text(blocks[d]) + " does not divide " + text(x.sizes[d]) +
              ", the size of dimension " + text(d) + " of x");
    }
  }
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

void check_out(const TensorInfo& out, const int64_t* sizes, int64_t dim, int32_t dtype,
               const TensorInfo& like) {
  const std::string name = out.name;
  check_kind(out, false);
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
