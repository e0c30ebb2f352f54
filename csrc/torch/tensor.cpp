#include "tensor.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

// Null where torch has none.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace quantkit {

std::string torch_says() {
  return torch_exception_get_what_without_backtrace != nullptr
             ? torch_exception_get_what_without_backtrace()
             : "torch refused, as where memory runs out; standard error has its words, which torch "
               "2.13 and newer give here";
}

namespace {

constexpr int kTypes = static_cast<int>(Type::boolean) + 1;

struct Dtypes {
  std::array<int, 128> types;
  std::array<int32_t, kTypes> numbers;

  Dtypes() {
    types.fill(-1);
    const std::array<std::pair<Type, int32_t>, kTypes> known = {{
        {Type::f16, aoti_torch_dtype_float16()},
        {Type::bf16, aoti_torch_dtype_bfloat16()},
        {Type::f32, aoti_torch_dtype_float32()},
        {Type::f64, aoti_torch_dtype_float64()},
        {Type::i8, aoti_torch_dtype_int8()},
        {Type::u8, aoti_torch_dtype_uint8()},
        {Type::i16, aoti_torch_dtype_int16()},
        {Type::u16, aoti_torch_dtype_uint16()},
        {Type::i32, aoti_torch_dtype_int32()},
        {Type::u32, aoti_torch_dtype_uint32()},
        {Type::i64, aoti_torch_dtype_int64()},
        {Type::u64, aoti_torch_dtype_uint64()},
        {Type::boolean, aoti_torch_dtype_bool()},
    }};
    for (const auto& [type, number] : known) {
      types[number] = static_cast<int>(type);
      numbers[static_cast<int>(type)] = number;
    }
  }
};

const Dtypes& dtypes() {
  static const Dtypes table;
  return table;
}

}  // namespace

int32_t dtype_of(Type type) { return dtypes().numbers[static_cast<int>(type)]; }

int32_t dtype_of(Format format) {
  switch (format) {
    case Format::int8: return aoti_torch_dtype_int8();
    case Format::int16: return aoti_torch_dtype_int16();
    case Format::uint16: return aoti_torch_dtype_uint16();
    case Format::uint8:
    case Format::int4:
    case Format::uint4:
    case Format::int2:
    case Format::uint2:
    case Format::float4_e2m1fn: return aoti_torch_dtype_uint8();
    case Format::float8_e4m3fn: return aoti_torch_dtype_float8_e4m3fn();
    case Format::float8_e5m2: return aoti_torch_dtype_float8_e5m2();
    case Format::powers: return kFloat8E8m0;
    case Format::numbers: break;
  }
  return aoti_torch_dtype_float32();
}

const char* name_of(Format format) {
  switch (format) {
#define QK_CASE(name, ...) \
  case Format::name: return #name;
    QK_FORMATS(QK_CASE)
#undef QK_CASE
    case Format::numbers:
    case Format::powers: break;
  }
  return "numbers";
}

std::string dtype_name(int32_t dtype) {
  // In the order of torch's numbers.
  std::istringstream names(
      "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool "
      "qint8 quint8 qint32 bfloat16 quint4x2 quint2x4 bits1x8 bits2x4 bits4x2 bits8 bits16 "
      "float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz uint16 uint32 uint64 uint1 uint2 "
      "uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 float8_e8m0fnu "
      "float4_e2m1fn_x2");
  std::string name;
  for (int32_t i = -1; i < dtype && names >> name;) ++i;
  return dtype >= 0 && names ? "torch." + name : "dtype number " + std::to_string(dtype);
}

TensorInfo::TensorInfo(const char* name_, const Tensor& tensor)
    : name(name_), handle(tensor.get()) {
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
  void* data_ = nullptr;
  check_shim(aoti_torch_get_dtype(handle, &dtype));
  type = dtype >= 0 && dtype < 128 ? dtypes().types[dtype] : -1;
  if (type < 0) {  // None comes as an undefined tensor
    bool defined = false;
    check_shim(aoti_torch_is_defined(handle, &defined));
    if (!defined)
      throw std::runtime_error(std::string(name) + ": expected a torch.Tensor, got NoneType");
  }
  check_shim(aoti_torch_get_dim(handle, &dim));
  check_shim(aoti_torch_get_numel(handle, &numel));
  check_shim(aoti_torch_get_sizes(handle, &sizes_));
  check_shim(aoti_torch_get_strides(handle, &strides_));
  check_shim(aoti_torch_get_device_type(handle, &device_type));
  check_shim(aoti_torch_get_device_index(handle, &device_index));
  check_shim(aoti_torch_get_data_ptr(handle, &data_));
  sizes = sizes_;
  strides = strides_;
  bool read = type >= 0;
  for (const int32_t coded : {aoti_torch_dtype_float8_e4m3fn(), aoti_torch_dtype_float8_e5m2(),
                              kFloat8E8m0, kFloat4E2m1x2})
    read |= dtype == coded;
  int64_t bytes = 0, offset = 0, last = 0;
  check_shim(aoti_torch_get_storage_size(handle, &bytes));
  check_shim(aoti_torch_get_storage_offset(handle, &offset));
  for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
  if (numel > 0 && read &&
      (offset + last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)) > bytes)
    throw std::runtime_error(std::string(name) + ": its memory has " + std::to_string(bytes) +
                             " bytes, fewer than a tensor of shape " + shape_text() + " needs");
  data = static_cast<char*>(data_);
}

TensorInfo::TensorInfo(const char* name_, const float* number)
    : name(name_),
      handle(nullptr),
      dim(0),
      numel(1),
      sizes(nullptr),
      strides(nullptr),
      dtype(dtype_of(Type::f32)),
      device_type(aoti_torch_device_type_cpu()),
      device_index(-1),
      type(static_cast<int>(Type::f32)),
      data(const_cast<char*>(reinterpret_cast<const char*>(number))) {}

bool is_contiguous(const TensorInfo& t) {
  bool contiguous = t.dim == 0;
  if (t.dim > 0) check_shim(aoti_torch_is_contiguous(t.handle, &contiguous));
  return contiguous;
}

std::string tuple_text(const int64_t* sizes, int64_t n) {
  std::string text = "(";
  for (int64_t i = 0; i < n; ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + (n == 1 ? ",)" : ")");
}

std::string TensorInfo::shape_text() const { return tuple_text(sizes, dim); }

std::string TensorInfo::device_text() const {
  if (device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (device_type == aoti_torch_device_type_meta()) return "meta";
  const bool cuda = device_type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "device " + std::to_string(device_type) + ":") +
         std::to_string(device_index);
}

// ---- allocation ---------------------------------------------------------------------------------

namespace {

// Page faults are most of the time of writing a large fresh tensor.
void advise_huge_pages([[maybe_unused]] AtenTensorHandle t, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHuge = int64_t(2) << 20;
  static const bool enabled = [] {
    const char* setting = std::getenv("QUANTKIT_HUGEPAGES");
    return setting == nullptr || std::strcmp(setting, "0") != 0;
  }();
  if (!enabled || bytes < 2 * kHuge) return;
  void* data = nullptr;
  check_shim(aoti_torch_get_data_ptr(t, &data));
  const auto begin = (reinterpret_cast<intptr_t>(data) + kHuge - 1) & -kHuge;
  const auto end = (reinterpret_cast<intptr_t>(data) + bytes) & -kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor empty_strided(const TensorInfo& on, const int64_t* sizes, const int64_t* strides,
                     int64_t dim, int64_t numel, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  check_shim(aoti_torch_empty_strided(dim, sizes, strides, dtype, on.device_type, on.device_index,
                                      &handle));
  Tensor tensor(handle);
  if (on.device_type == aoti_torch_device_type_cpu())
    advise_huge_pages(handle, numel * aoti_torch_dtype_element_size(dtype));
  return tensor;
}

// Dimensions with more than one element by descending stride; the dimension first where they tie.
std::vector<int64_t> by_stride(const TensorInfo& t) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return t.strides[a] > t.strides[b]; });
  return order;
}

// Whether the elements fill one piece of memory, each address once.
bool is_dense(const TensorInfo& t) {
  if (is_contiguous(t)) return true;
  const std::vector<int64_t> order = by_stride(t);
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.strides[*d] != expected) return false;
    expected *= t.sizes[*d];
  }
  return true;
}

}  // namespace

Tensor empty_contiguous(const TensorInfo& on, const int64_t* sizes, int64_t dim, int32_t dtype) {
  std::vector<int64_t> strides(dim);
  int64_t numel = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = numel;
    numel *= std::max<int64_t>(sizes[d], 1);  // as torch
  }
  return empty_strided(on, sizes, strides.data(), dim, numel, dtype);
}

Tensor empty_like(const TensorInfo& like, int32_t dtype) {
  if (like.numel > 0 && is_dense(like))
    return empty_strided(like, like.sizes, like.strides, like.dim, like.numel, dtype);
  // Which order torch gives to other strides is its own affair: ask it.
  AtenTensorHandle self = nullptr;
  check_shim(aoti_torch_new_tensor_handle(like.handle, &self));
  const auto boxed = [](auto v) { return torch::stable::detail::from(v); };
  std::array<StableIValue, 6> stack{boxed(self),         boxed(std::make_optional(dtype)),
                                    boxed(std::nullopt), boxed(std::nullopt),
                                    boxed(std::nullopt), boxed(std::nullopt)};
  check_shim(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  Tensor tensor = torch::stable::detail::to<Tensor>(stack[0]);
  if (like.device_type == aoti_torch_device_type_cpu())
    advise_huge_pages(tensor.get(), like.numel * aoti_torch_dtype_element_size(dtype));
  return tensor;
}

Contiguous::Contiguous(const TensorInfo& t) : info(t) {
  if (is_contiguous(t)) return;
  copy = empty_contiguous(t, t.sizes, t.dim, t.dtype);
  info = TensorInfo(t.name, *copy);
  quantkit::copy(info, t);
}

void copy(const TensorInfo& to, const TensorInfo& from) {
  check_shim(aoti_torch_copy_(to.handle, from.handle, 0));
}
void clear(const TensorInfo& t) {
  if (t.device_type == aoti_torch_device_type_cpu() && t.numel > 0 && is_contiguous(t))
    memset(t.data, 0, t.numel * aoti_torch_dtype_element_size(t.dtype));  // torch would use threads
  else
    check_shim(aoti_torch_zero_(t.handle));
}

bool is_leaf(const TensorInfo& t) {
  AtenTensorHandle self = nullptr;
  check_shim(aoti_torch_new_tensor_handle(t.handle, &self));
  StableIValue value = torch::stable::detail::from(self);
  check_shim(torch_call_dispatcher("aten::is_leaf", "", &value, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(value);
}

}  // namespace quantkit

quantkit::Text torch::stable::detail::ToImpl<quantkit::Text>::call(StableIValue value, uint64_t,
                                                                   bool) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  const char* text = nullptr;
  size_t length = 0;
  quantkit::check_shim(torch_string_c_str(handle, &text));
  quantkit::check_shim(torch_string_length(handle, &length));
  quantkit::Text result{std::string(text, length)};
  quantkit::check_shim(torch_delete_string(handle));
  return result;
}
