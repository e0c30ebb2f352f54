#include "values.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <string_view>

namespace quantkit {

void raise(const std::string& text) { throw std::runtime_error(text); }

std::string text(int64_t v) { return std::to_string(v); }

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

std::string list_text(const std::vector<int64_t>& v) {
  std::string s = "[";
  for (size_t i = 0; i < v.size(); ++i) s += (i > 0 ? ", " : "") + text(v[i]);
  return s + "]";
}

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

void check_kind(const TensorInfo& t, bool floating) {
  if (floating ? t.floating() : t.type >= 0) return;
  raise(std::string(t.name) + ": expected " + (floating ? "a floating dtype" : "a real dtype") +
        " of at least 16 bits if floating, got " + dtype_name(t.dtype));
}

void check_real(const TensorInfo& t) { check_kind(t, false); }

void check_dtype(const TensorInfo& t, Type type) {
  if (t.dtype != dtype_of(type))
    raise(std::string(t.name) + ": expected " + dtype_name(dtype_of(type)) + ", got " +
          dtype_name(t.dtype));
}

void check_same_device(const TensorInfo& t, const TensorInfo& x) {
  if (!t.same_device(x))
    raise(std::string(t.name) + ": expected device " + x.device_text() + ", that of " + x.name +
          ", got " + t.device_text());
}

void check_device(const TensorInfo& p, const TensorInfo& x) {
  const bool scalar = p.dim == 0 && p.device_type == aoti_torch_device_type_cpu();
  if (!scalar) check_same_device(p, x);
}

Format check_format(const std::string& name) {
#define QK_ENTRY(name, ...) Format::name,
  constexpr Format kFormats[] = {QK_FORMATS(QK_ENTRY)};
#undef QK_ENTRY
  for (const Format format : kFormats)
    if (name == name_of(format)) return format;
  raise("format: expected " + choice_text(kFormats, name_of) + ", got " + quoted(name));
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

}  // namespace quantkit
