// A tensor as this code reads it: through the C shim once, then plain fields.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../calls.h"

namespace quantkit {

using torch::stable::Tensor;

// Why torch refused. It tells since 2.13; older ones say it on standard error.
std::string torch_says();

// Throws torch's own message, as where there is no memory for a result.
inline void check_shim(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(torch_says());
}

// torch's number of a dtype, and its name.
int32_t dtype_of(Type type);
std::string dtype_name(int32_t dtype);

// The dtype of a tensor of codes, and the name of a format.
int32_t dtype_of(Format format);
// Two of torch's numbers that the headers of 2.10 do not name.
constexpr int32_t kFloat8E8m0 = 44, kFloat4E2m1x2 = 45;
const char* name_of(Format format);

// A string argument. torch 2.13's own conversion to std::string leaks 48 bytes a call.
struct Text {
  std::string value;
};

struct TensorInfo {
  const char* name;
  AtenTensorHandle handle;
  int64_t dim, numel;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type, device_index;
  int type;  // a Type, or -1
  char* data;

  TensorInfo(const char* name, const Tensor& tensor);
  // A float in the host's memory, as a tensor without dimensions.
  TensorInfo(const char* name, const float* number);

  Type kind() const { return static_cast<Type>(type); }
  bool floating() const { return type >= 0 && is_floating(kind()); }
  bool half() const { return type >= 0 && is_half(kind()); }
  bool same_device(const TensorInfo& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  std::string shape_text() const;
  std::string device_text() const;
};

bool is_contiguous(const TensorInfo& t);
// A tensor of t's device and dtype, contiguous, with its elements: t itself or a copy.
struct Contiguous {
  std::optional<Tensor> copy;
  TensorInfo info;

  explicit Contiguous(const TensorInfo& t);
};

std::string tuple_text(const int64_t* sizes, int64_t n);

// Fresh tensors; large ones on the CPU get huge pages before they are first written.
Tensor empty_contiguous(const TensorInfo& device_of, const int64_t* sizes, int64_t dim,
                        int32_t dtype);
Tensor empty_like(const TensorInfo& like, int32_t dtype);  // the strides of torch.empty_like

// Whether no graph of autograd made t.
bool is_leaf(const TensorInfo& t);
// Copies elements, in the stream of their device, and makes them 0.
void copy(const TensorInfo& to, const TensorInfo& from);
void clear(const TensorInfo& t);

}  // namespace quantkit

namespace torch::stable::detail {
template <>
struct ToImpl<quantkit::Text> {
  static quantkit::Text call(StableIValue value, uint64_t, bool);
};
}  // namespace torch::stable::detail
