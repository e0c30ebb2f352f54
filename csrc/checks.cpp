#include "checks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "overlap.h"

namespace quantkit {
namespace {

[[noreturn]] void refuse(const std::string& text) { throw std::runtime_error(text); }

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

bool fits(const View& p, const View& x) {
  if (p.dim > x.dim) return false;
  const int64_t skipped = x.dim - p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    const int64_t size = p.sizes[d], whole = x.sizes[skipped + d];
    if (size == 1 || size == whole) continue;
    if (skipped > 0 || size == 0 || whole == 0 || whole % size != 0) return false;
  }
  return true;
}

bool fit_each_other(const View& a, const View& b) {
  for (int64_t i = 1; i <= std::min(a.dim, b.dim); ++i) {
    const int64_t m = a.sizes[a.dim - i], n = b.sizes[b.dim - i];
    if (m != n && m != 1 && n != 1) return false;
  }
  return true;
}

void check_kind(const View& t, bool floating) {
  if (floating ? is_floating(t.type) : t.type >= 0) return;
  refuse(std::string(t.name) + ": expected " + (floating ? "a floating dtype" : "a real dtype") +
         " of at least 16 bits if floating, got " + dtype_name(t.dtype));
}

}  // namespace

void check_real(const View& t) { check_kind(t, false); }

void check_q_range(int64_t q_min, int64_t q_max, int32_t dtype) {
  int64_t low = 0, high = 0;
  switch (type_of(dtype)) {
    case static_cast<int>(Type::i8): low = -128, high = 127; break;
    case static_cast<int>(Type::u8): low = 0, high = 255; break;
    case static_cast<int>(Type::i16): low = -32768, high = 32767; break;
    default:
      refuse("dtype: expected torch.int8, torch.uint8 or torch.int16, got " + dtype_name(dtype));
  }
  if (q_min > q_max)
    refuse("q_min, q_max: expected q_min <= q_max, got " + text(q_min) + " > " + text(q_max));
  if (q_min < low || q_max > high)
    refuse("q_min, q_max: [" + text(q_min) + ", " + text(q_max) + "] is outside the limits [" +
           text(low) + ", " + text(high) + "] of " + dtype_name(dtype));
}

void check_parameters(const View& x, const View& scale, const View& zero_point) {
  check_kind(x, false);
  check_kind(scale, true);
  check_kind(zero_point, false);
  for (const View* p : {&scale, &zero_point}) {
    const bool scalar = p->dim == 0 && p->device_type == aoti_torch_device_type_cpu();
    if (!p->same_device(x) && !scalar)
      refuse(std::string(p->name) + ": expected device " + x.device_text() + ", that of " + x.name +
             ", got " + p->device_text());
    if (!fits(*p, x))
      refuse(std::string(p->name) + ": shape " + p->shape_text() + " does not fit " + x.name +
             " of shape " + x.shape_text() + ": every size must divide " + x.name +
             "'s, or the shape broadcast to " + x.name + "'s");
  }
  if (!fit_each_other(scale, zero_point))
    refuse("scale, zero_point: shapes " + scale.shape_text() + " and " +
           zero_point.shape_text() + " do not broadcast with each other");
}

void check_choice(const View& x, const BlockSize& block_size, double eps, bool symmetric,
                  bool include_zero) {
  // By its bits: a caller that flushes denormals compares them as 0.
  const uint64_t bits = bit_cast<uint64_t>(eps);
  if (bits == 0 || bits > bit_cast<uint64_t>(std::numeric_limits<double>::infinity()))
    refuse("eps: expected a number above 0, got " + text(eps));
  if (include_zero && symmetric)
    refuse(
        "include_zero: only the asymmetric scheme takes it, but the symmetric one was asked for");
  if (block_size) {
    const std::vector<int64_t>& blocks = *block_size;
    if (static_cast<int64_t>(blocks.size()) != x.dim)
      refuse("block_size: expected " + text(x.dim) + " sizes, one per dimension of x of shape " +
             x.shape_text() + ", got " + list_text(blocks));
    for (int64_t d = 0; d < x.dim; ++d) {
      if (blocks[d] == 0 || blocks[d] < -1)
        refuse("block_size: expected sizes of at least 1, or -1 for a whole dimension, got " +
               list_text(blocks));
      if (blocks[d] != -1 && x.sizes[d] % blocks[d] != 0)
        refuse("block_size: " + text(blocks[d]) + " does not divide " + text(x.sizes[d]) +
               ", the size of dimension " + text(d) + " of x");
    }
  }
  // Without a block there is nothing to choose; a block without elements has no extremes.
  bool blockless = false;
  for (int64_t d = 0; block_size && d < x.dim; ++d)
    blockless |= x.sizes[d] == 0 && (*block_size)[d] != -1;
  if (x.numel == 0 && !blockless)
    refuse(
        "x: expected at least one element to choose parameters from, got an empty tensor of shape " +
        x.shape_text());
}

void check_gradient(const View& grad, const View& x) {
  check_kind(grad, true);
  if (grad.dtype != x.dtype)
    refuse("grad: expected dtype " + dtype_name(x.dtype) + ", that of x, got " +
           dtype_name(grad.dtype));
  if (!std::equal(grad.sizes, grad.sizes + grad.dim, x.sizes, x.sizes + x.dim))
    refuse("grad: expected shape " + x.shape_text() + ", got " + grad.shape_text());
  if (!grad.same_device(x))
    refuse("grad: expected device " + x.device_text() + ", that of x, got " + grad.device_text());
}

void check_out(const View& out, const int64_t* sizes, int64_t dim, int32_t dtype, const View& like) {
  const std::string name = out.name;
  check_kind(out, false);
  if (out.dtype != dtype)
    refuse(name + ": expected dtype " + dtype_name(dtype) + ", got " + dtype_name(out.dtype));
  if (!out.same_device(like))
    refuse(name + ": expected device " + like.device_text() + ", got " + out.device_text());
  if (!std::equal(out.sizes, out.sizes + out.dim, sizes, sizes + dim))
    refuse(name + ": expected shape " + tuple_text(sizes, dim) + ", got " + out.shape_text());
}

namespace {

// Strides of dimensions of size 1 lead nowhere.
bool same_elements(const View& a, const View& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int64_t d = 0; d < a.dim; ++d) same &= a.sizes[d] == 1 || a.strides[d] == b.strides[d];
  return same;
}

void check_overlap(const std::vector<const View*>& outs, const std::vector<const View*>& inputs,
                   const View* in_place) {
  for (const View* out : outs)
    if (overlaps_itself(*out))
      refuse(std::string(out->name) + ": its elements overlap each other in memory");
  for (size_t i = 0; i < outs.size(); ++i) {
    const View& out = *outs[i];
    std::vector<const View*> others = inputs;
    others.insert(others.end(), outs.begin(), outs.begin() + i);
    for (const View* other : others) {
      const bool same = other == in_place && same_elements(out, *other);
      if (!same && overlap(out, *other))
        refuse(std::string(out.name) + ": overlaps " + other->name + " in memory");
    }
  }
}

}  // namespace

void claim_outs(const std::vector<const View*>& outs, const std::vector<const View*>& inputs,
                const View* in_place) {
  check_overlap(outs, inputs, in_place);
  for (const View* out : outs)
    if (aoti_torch_grad_mode_is_enabled() && !is_leaf(*out))
      refuse(std::string(out->name) + ": expected a tensor outside of autograd's graphs, as out= has no "
             "gradient; pass " + out->name + ".detach()");
  // A tensor copied to itself stays as it is, but autograd counts a new version of it.
  for (const View* out : outs)
    if (aoti_torch_copy_(out->handle, out->handle, 0) != AOTI_TORCH_SUCCESS)
      refuse(std::string(out->name) + ": cannot be written: " + torch_says());
}

}  // namespace quantkit
