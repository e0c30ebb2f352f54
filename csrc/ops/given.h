// x, or q, with the scale and zero_point that operators are given.
#pragma once

#include "ops.h"

namespace quantkit {

// scale and zero_point as the kernels take them. Integer zero points become scale's dtype first, or
// float32 where that is half precision and may not hold them.
struct Parameters {
  const TensorInfo& scale;
  Converted add, subtract;

  Parameters(const TensorInfo& scale_, const TensorInfo& zero_point, bool wide, bool float32)
      : scale(scale_),
        add(zero_point, integer_becomes(zero_point, wide, float32)),
        subtract(zero_point, integer_becomes(zero_point, true, float32)) {}

  // Addresses, and the dtypes of version 1's steps for data of dtype `first` before its first step.
  void give(Elementwise& e, Type first, const TensorInfo& data) const {
    const int64_t dim = data.dim;
    const auto given = [&](const TensorInfo& p) {
      return Parameter{p.data, p.kind(), !p.same_device(data)};
    };
    e.scale = given(scale);
    e.add = given(add.info);
    e.subtract = given(subtract.info);
    e.steps.divide = step_type(first, dim, scale.kind(), scale.dim);
    e.steps.add = step_type(e.steps.divide, dim, add.info.kind(), add.info.dim);
    e.steps.subtract = step_type(Type::f32, dim, subtract.info.kind(), subtract.info.dim);
    e.steps.multiply = step_type(e.steps.subtract, dim, scale.kind(), scale.dim);
  }

 private:
  Type integer_becomes(const TensorInfo& zero_point, bool wide, bool float32) const {
    if (zero_point.floating()) return zero_point.kind();
    return float32 || (wide && scale.half()) ? Type::f32 : scale.kind();
  }
};

inline constexpr float kNoZeroPoint = 0;

// x, or q, with its parameters.
struct Given {
  TensorInfo x, scale, zero_point;
  bool float32 = false;  // the steps
  BlockSize block_size;
  std::optional<TensorInfo> global;
  DrawnFrom drawn;

  Given(const char* name, const Tensor& x_, const Tensor& scale_, const Tensor& zero_point_)
      : x(name, x_), scale("scale", scale_), zero_point("zero_point", zero_point_) {
    check_parameters(x, scale, zero_point);
  }
  // Of contract 2: `shape` has the sizes of x, or those of what q stands for.
  Given(const TensorInfo& x_, const TensorInfo& shape, const Tensor& scale_,
        const std::optional<Tensor>& zero_point_, Format format, const BlockSize& block_size_,
        const std::optional<Tensor>& global_)
      : x(x_),
        scale("scale", scale_),
        zero_point(zero_point_ ? TensorInfo("zero_point", *zero_point_)
                               : TensorInfo("zero_point", &kNoZeroPoint)),
        float32(true),
        block_size(block_size_) {
    if (global_) global.emplace("global_scale", *global_);
    check_parameters(shape, scale, zero_point_ ? &zero_point : nullptr, format, block_size,
                     global ? &*global : nullptr);
  }

  std::vector<const TensorInfo*> inputs() const {
    std::vector<const TensorInfo*> inputs = {&x, &scale};
    if (zero_point.handle != nullptr) inputs.push_back(&zero_point);
    if (global) inputs.push_back(&*global);
    if (drawn) inputs.push_back(&drawn.seed());
    return inputs;
  }
  // Whether no byte of packed codes has two parameters.
  bool has_whole_bytes(const TensorInfo& shape, Format format) const {
    bool whole = true;
    for (const TensorInfo* p : {&scale, &zero_point})
      if (p->dim > 0 && shape.dim > 0) {
        const int64_t block = blocks_of(shape, p->sizes, p->dim, block_size).back();
        whole &= block == 1 || quantkit::has_whole_bytes(shape, block, format);
      }
    return whole;
  }

  // Fills in what depends on the parameters, and runs the call. `beside`: what lies at kQ, `lead`:
  // the operand that decides the order of memory.
  void run(Elementwise& e, const TensorInfo& data, const TensorInfo* beside, const TensorInfo* y,
           Operand lead, bool wide, Type first) const {
    run(e, axes_of(data, beside, y), data, lead, wide, first,
        [&](const Elementwise& call) { quantkit::run(call, data); });
  }
  template <class Body>
  void run(Elementwise& e, Axes axes, const TensorInfo& data, Operand lead, bool wide, Type first,
           const Body& body) const {
    const UsedScale used(scale, global ? &*global : nullptr);
    const Parameters parameters(used.info, zero_point, wide, float32);
    parameters.give(e, first, data);
    e.powers = scale.dtype == kFloat8E8m0;
    if (float32) e.steps = {Type::f32, Type::f32, Type::f32, Type::f32, e.steps.round_first};
    const TensorInfo& add = parameters.add.info;
    axes.add(kScale, scale.sizes, used.info.strides, scale.dim,
             blocks_of(data, scale.sizes, scale.dim, block_size).data());
    axes.add(kZeroPoint, add.sizes, add.strides, add.dim,
             blocks_of(data, add.sizes, add.dim, block_size).data());
    drawn.give(e, axes, data);
    for_layouts(axes, lead, kX, [&](const Layout& layout) {
      e.layout = &layout;
      body(e);
    });
  }
};

}  // namespace quantkit
