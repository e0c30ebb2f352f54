#include "ops.h"

namespace quantkit {
namespace {

Type promote(Type a, Type b) {
  if (a == b) return a;
  return a == Type::f64 || b == Type::f64 ? Type::f64 : Type::f32;
}

}  // namespace

Type step_type(Type t, int64_t dim, Type parameter, int64_t parameter_dim) {
  return dim > 0 && parameter_dim == 0 ? t : promote(t, parameter);
}

Type first_type(const TensorInfo& x, bool wide) {
  if (!x.floating() || (x.half() && wide)) return Type::f32;
  return x.kind();
}

Type dequantized_type(int64_t dim, Type scale, int64_t scale_dim, const TensorInfo& zero_point) {
  const Type zero = zero_point.floating() ? zero_point.kind() : scale;
  return step_type(step_type(Type::f32, dim, zero, zero_point.dim), dim, scale, scale_dim);
}

Tensor converted(const TensorInfo& t, const Tensor& tensor, Type type) {
  if (t.kind() == type) return tensor;
  Tensor result = empty_like(t, dtype_of(type));
  if (t.numel == 0) return result;
  const TensorInfo to(t.name, result);
  for_layouts(axes_of(t, nullptr, &to), kY, kX, [&](const Layout& layout) {
    Elementwise e{};
    e.operation = Operation::convert;
    e.layout = &layout;
    e.x = t.data;
    e.x_type = t.kind();
    e.y = to.data;
    e.y_type = type;
    run(e, t);
  });
  return result;
}

Tensor loadable(const TensorInfo& x, const Tensor& tensor) {
  return x.floating() ? tensor : converted(x, tensor, Type::f32);
}

Axes axes_of(const TensorInfo& x, const TensorInfo* q, const TensorInfo* y) {
  Axes axes(x.sizes, x.dim);
  axes.add(kX, x.strides);
  axes.add(kQ, (q != nullptr ? *q : x).strides);
  axes.add(kY, (y != nullptr ? *y : x).strides);
  return axes;
}

}  // namespace quantkit
