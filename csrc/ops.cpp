// The operators: schemas, checks, allocation, and the way from tensors to kernels.

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "levels.h"
#include "tensor.h"

namespace quantkit {
namespace {

// ---- from tensors to kernels ----------------------------------------------------------------------

Type promote(Type a, Type b) {
  if (a == b) return a;
  return a == Type::f64 || b == Type::f64 ? Type::f64 : Type::f32;
}

// The dtype of a step of torch: a parameter without dimensions leaves that of what has some.
Type step_type(Type t, int64_t dim, Type parameter, int64_t parameter_dim) {
  return dim > 0 && parameter_dim == 0 ? t : promote(t, parameter);
}

bool is_half(Type t) { return t == Type::f16 || t == Type::bf16; }

// Whether half precision cannot hold the limits.
bool is_wide(int64_t q_min, int64_t q_max) { return q_min < -128 || q_max > 255; }

// What x becomes before the first step.
Type first_type(const View& x, bool wide) {
  if (!is_floating(x.type) || (is_half(x.kind()) && wide)) return Type::f32;
  return x.kind();
}

Dimension::Along along(const View& x, const View& p, int64_t d) {
  const int64_t at = d - (x.dim - p.dim);
  if (at < 0 || p.sizes[at] == 1) return {x.sizes[d], 0};
  return {x.sizes[d] / p.sizes[at], p.strides[at]};
}

// shape gives the sizes; x, q and y have them too. Without parameters, one rule for all elements.
std::vector<Dimension> dimensions_of(const View& shape, const View& x, const View& q, const View& y,
                                     const View* scale = nullptr, const View* zero_point = nullptr) {
  std::vector<Dimension> dimensions(shape.dim);
  for (int64_t d = 0; d < shape.dim; ++d) {
    dimensions[d] = {shape.sizes[d], {x.strides[d], q.strides[d], y.strides[d]}, {1, 0}, {1, 0}};
    if (scale != nullptr) dimensions[d].scale = along(shape, *scale, d);
    if (zero_point != nullptr) dimensions[d].zero_point = along(shape, *zero_point, d);
  }
  return dimensions;
}

std::vector<Level> levels_between(const View& from, const View& to) {
  return levels_of(dimensions_of(from, from, to, to), kY, kX);
}

// Copies to a floating type.
void convert(const View& from, const View& to, const std::vector<Level>& levels) {
  run(Conversion{shape_of(levels), from.data, to.data, from.kind(), to.kind()}, from);
}
void convert(const View& from, const View& to) {
  if (from.numel != 0) convert(from, to, levels_between(from, to));
}

// t in another floating type; where it has that type already, itself.
Tensor converted(const View& t, const Tensor& tensor, Type type) {
  if (t.kind() == type) return tensor;
  Tensor result = empty_like(t, dtype_of(type));
  convert(t, View(t.name, result));
  return result;
}

// scale and zero_point as the kernels take them. Integer zero points become scale's dtype first, or
// float32 where that is half precision and may not hold them.
struct Parameters {
  View scale;
  Tensor add_tensor, subtract_tensor;
  View add, subtract;

  Parameters(const View& scale_, const View& zero_point, const Tensor& tensor, bool wide)
      : scale(scale_),
        add_tensor(converted(zero_point, tensor, integer_becomes(zero_point, wide))),
        subtract_tensor(converted(zero_point, tensor, integer_becomes(zero_point, true))),
        add("zero_point", add_tensor),
        subtract("zero_point", subtract_tensor) {}

  // Types and addresses, for data of dtype `first` before its first step.
  void give(Elementwise& e, Type first, const View& data) const {
    const int64_t dim = data.dim;
    const auto given = [&](const View& p) { return Parameter{p.data, p.kind(), !p.same_device(data)}; };
    e.scale = given(scale);
    e.add_zero_point = given(add);
    e.subtract_zero_point = given(subtract);
    e.divide_type = step_type(first, dim, scale.kind(), scale.dim);
    e.add_type = step_type(e.divide_type, dim, add.kind(), add.dim);
    e.subtract_type = step_type(Type::f32, dim, subtract.kind(), subtract.dim);
    e.scale_type = step_type(e.subtract_type, dim, scale.kind(), scale.dim);
  }

 private:
  Type integer_becomes(const View& zero_point, bool wide) const {
    if (is_floating(zero_point.type)) return zero_point.kind();
    return wide && is_half(scale.kind()) ? Type::f32 : scale.kind();
  }
};

// x as a type that kernels load: float16, bfloat16, float32 or float64.
Tensor loadable(const View& x, const Tensor& tensor) {
  return is_floating(x.type) ? tensor : converted(x, tensor, Type::f32);
}

// From here on a float output that the caller lends is written past the caches: it will not be in one when
// it is read. Fresh memory has just been cleared through them; codes are too few bytes to gain, and steps of
// half precision compute for longer than they write.
constexpr int64_t kStreamedBytes = int64_t(32) << 20;

bool streams(bool fresh, const View& x, const View& y) {
  return !fresh && !is_half(x.kind()) && y.numel * size_of(y.kind()) >= kStreamedBytes;
}

// ---- quantize, dequantize, fake_quantize ----------------------------------------------------------

struct Given {
  View x, scale, zero_point;
  const Tensor &x_tensor, &zero_point_tensor;

  Given(const char* name, const Tensor& x_, const Tensor& scale_, const Tensor& zero_point_)
      : x(name, x_),
        scale("scale", scale_),
        zero_point("zero_point", zero_point_),
        x_tensor(x_),
        zero_point_tensor(zero_point_) {
    check_parameters(x, scale, zero_point);
  }
};

Given given_for_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                         int64_t q_min, int64_t q_max, int32_t dtype) {
  check_q_range(q_min, q_max, dtype);
  return Given("x", x, scale, zero_point);
}

void quantize_into(const Given& g, int64_t q_min, int64_t q_max, const View& out) {
  if (out.numel == 0) return;
  const bool wide = is_wide(q_min, q_max);
  const Tensor x_tensor = loadable(g.x, g.x_tensor);
  const View x("x", x_tensor);
  const Parameters parameters(g.scale, g.zero_point, g.zero_point_tensor, wide);
  const std::vector<Level> levels =
      levels_of(dimensions_of(x, x, out, out, &g.scale, &parameters.add), kQ, kX);
  Elementwise e{};
  e.shape = shape_of(levels);
  e.x = x.data;
  e.x_type = x.kind();
  e.q = out.data;
  e.q_type = out.kind();
  e.q_min = static_cast<int32_t>(q_min);
  e.q_max = static_cast<int32_t>(q_max);
  parameters.give(e, first_type(x, wide), x);
  run(Operation::quantize, e, x);
}

Tensor quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min,
                int64_t q_max, int32_t dtype) {
  const Given g = given_for_quantize(x, scale, zero_point, q_min, q_max, dtype);
  Tensor q = empty_like(g.x, dtype);
  quantize_into(g, q_min, q_max, View("out", q));
  return q;
}

void quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min,
                  int64_t q_max, int32_t dtype, const Tensor& out_tensor) {
  const Given g = given_for_quantize(x, scale, zero_point, q_min, q_max, dtype);
  const View out("out", out_tensor);
  check_out(out, g.x.sizes, g.x.dim, dtype, g.x);
  claim_outs({&out}, {&g.x, &g.scale, &g.zero_point});
  quantize_into(g, q_min, q_max, out);
}

Type dequantized_type(const View& q, const Type scale, int64_t scale_dim, const View& zero_point) {
  const Type zero = is_floating(zero_point.type) ? zero_point.kind() : scale;
  return step_type(step_type(Type::f32, q.dim, zero, zero_point.dim), q.dim, scale, scale_dim);
}

int32_t dequantized_dtype(const Given& g) {
  return dtype_of(dequantized_type(g.x, g.scale.kind(), g.scale.dim, g.zero_point));
}

void dequantize_into(const Given& g, const View& out, bool fresh) {
  if (out.numel == 0) return;
  const bool code = g.x.type == static_cast<int>(Type::i8) ||
                    g.x.type == static_cast<int>(Type::u8) ||
                    g.x.type == static_cast<int>(Type::i16);
  const Tensor q_tensor = code ? g.x_tensor : converted(g.x, g.x_tensor, Type::f32);
  const View q("q", q_tensor);
  const Parameters parameters(g.scale, g.zero_point, g.zero_point_tensor, true);
  const std::vector<Level> levels =
      levels_of(dimensions_of(q, q, q, out, &g.scale, &parameters.subtract), kY, kQ);
  Elementwise e{};
  e.shape = shape_of(levels);
  e.q_in = q.data;
  e.q_type = q.kind();
  e.y = out.data;
  e.y_type = out.kind();
  parameters.give(e, Type::f32, q);
  e.streams = streams(fresh, q, out);
  run(Operation::dequantize, e, q);
}

Tensor dequantize(const Tensor& q, const Tensor& scale, const Tensor& zero_point) {
  const Given g("q", q, scale, zero_point);
  Tensor y = empty_like(g.x, dequantized_dtype(g));
  dequantize_into(g, View("out", y), true);
  return y;
}

void dequantize_out(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& out_tensor) {
  const Given g("q", q, scale, zero_point);
  const View out("out", out_tensor);
  check_out(out, g.x.sizes, g.x.dim, dequantized_dtype(g), g.x);
  claim_outs({&out}, {&g.x, &g.scale, &g.zero_point});
  dequantize_into(g, out, false);
}

// fake_quantize, or its gradient where grad is given.
void fake_quantize_into(const Given& g, int64_t q_min, int64_t q_max, const View* grad,
                        const View& out, bool fresh) {
  if (out.numel == 0) return;
  const bool wide = is_wide(q_min, q_max);
  const Tensor x_tensor = loadable(g.x, g.x_tensor);
  const View x("x", x_tensor);
  const Parameters parameters(g.scale, g.zero_point, g.zero_point_tensor, wide);
  const std::vector<Level> levels = levels_of(
      dimensions_of(x, x, grad != nullptr ? *grad : x, out, &g.scale, &parameters.add), kY, kX);
  Elementwise e{};
  e.shape = shape_of(levels);
  e.x = x.data;
  e.x_type = x.kind();
  e.q_in = grad != nullptr ? grad->data : nullptr;
  e.y = out.data;
  e.y_type = out.kind();
  e.q_min = static_cast<int32_t>(q_min);
  e.q_max = static_cast<int32_t>(q_max);
  parameters.give(e, first_type(x, wide), x);
  e.streams = streams(fresh, x, out);
  run(grad != nullptr ? Operation::fake_quantize_backward : Operation::fake_quantize, e, x);
}

int32_t fake_dtype(const View& x) { return is_floating(x.type) ? x.dtype : dtype_of(Type::f32); }

Given given_for_fake(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min,
                     int64_t q_max) {
  return given_for_quantize(x, scale, zero_point, q_min, q_max, dtype_of(Type::i16));
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min,
                     int64_t q_max) {
  const Given g = given_for_fake(x, scale, zero_point, q_min, q_max);
  Tensor y = empty_like(g.x, fake_dtype(g.x));
  fake_quantize_into(g, q_min, q_max, nullptr, View("out", y), true);
  return y;
}

void fake_quantize_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t q_min,
                       int64_t q_max, const Tensor& out_tensor) {
  const Given g = given_for_fake(x, scale, zero_point, q_min, q_max);
  const View out("out", out_tensor);
  check_out(out, g.x.sizes, g.x.dim, fake_dtype(g.x), g.x);
  claim_outs({&out}, {&g.x, &g.scale, &g.zero_point}, &g.x);
  fake_quantize_into(g, q_min, q_max, nullptr, out, false);
}

Tensor fake_quantize_backward(const Tensor& grad_tensor, const Tensor& x, const Tensor& scale,
                              const Tensor& zero_point, int64_t q_min, int64_t q_max) {
  const Given g = given_for_fake(x, scale, zero_point, q_min, q_max);
  const View grad("grad", grad_tensor);
  check_gradient(grad, g.x);
  Tensor y = empty_like(g.x, g.x.dtype);
  fake_quantize_into(g, q_min, q_max, &grad, View("out", y), true);
  return y;
}

void fake_quantize_backward_out(const Tensor& grad_tensor, const Tensor& x, const Tensor& scale,
                                const Tensor& zero_point, int64_t q_min, int64_t q_max,
                                const Tensor& out_tensor) {
  const Given g = given_for_fake(x, scale, zero_point, q_min, q_max);
  const View grad("grad", grad_tensor), out("out", out_tensor);
  check_gradient(grad, g.x);
  check_out(out, g.x.sizes, g.x.dim, g.x.dtype, g.x);
  claim_outs({&out}, {&grad, &g.x, &g.scale, &g.zero_point});
  fake_quantize_into(g, q_min, q_max, &grad, out, false);
}

// ---- choose_qparams, dynamic_quantize, quantize_dequantize ----------------------------------------

// The arguments that choose parameters, checked, and the shape and type of the result.
struct Choice {
  View x;
  const Tensor& x_tensor;
  Scheme scheme;
  std::vector<int64_t> sizes;  // of scale and zero_point; empty: 0-dim
  Type type;                   // of scale and zero_point

  Choice(const Tensor& x_, const BlockSize& block_size, int64_t q_min, int64_t q_max, double eps,
         bool symmetric, bool include_zero, int32_t dtype)
      : x("x", x_), x_tensor(x_) {
    check_q_range(q_min, q_max, dtype);
    check_real(x);
    check_choice(x, block_size, eps, symmetric, include_zero);
    scheme = {static_cast<int32_t>(q_min), static_cast<int32_t>(q_max), symmetric, include_zero, eps};
    if (block_size)
      for (int64_t d = 0; d < x.dim; ++d)
        sizes.push_back((*block_size)[d] == -1 ? 1 : x.sizes[d] / (*block_size)[d]);
    type = first_type(x, is_wide(q_min, q_max));
  }

  Tensor new_parameter() const {
    return empty_contiguous(x, sizes.data(), sizes.size(), dtype_of(type));
  }
  int32_t dequantized() const {
    View p = x;  // scale's and zero_point's type and rank, in torch's rule
    p.type = static_cast<int>(type);
    p.dim = sizes.size();
    return dtype_of(dequantized_type(x, type, sizes.size(), p));
  }
};

// A parameter's memory as kernels need it, contiguous: the output itself, or a stand-in copied back.
struct Contiguous {
  Tensor tensor;
  const Tensor& out;
  std::vector<Level> levels;  // of the way back, made before anything is written: memory may run out

  Contiguous(const Choice& c, const Tensor& out_) : tensor(out_), out(out_) {
    bool contiguous = false;
    check_shim(aoti_torch_is_contiguous(out.get(), &contiguous));
    if (contiguous) return;
    tensor = c.new_parameter();
    levels = levels_between(View("parameter", tensor), View("out", out));
  }
  void copy_back() const {
    if (!levels.empty()) convert(View("parameter", tensor), View("out", out), levels);
  }
};

void choose_into(const Choice& c, const Tensor& scale_tensor, const Tensor& zero_point_tensor,
                 const View* q, const View* y, bool fresh) {
  if (c.x.numel == 0) return;
  const Tensor x_tensor = loadable(c.x, c.x_tensor);
  const View x("x", x_tensor);
  const Contiguous scale(c, scale_tensor), zero_point(c, zero_point_tensor);
  const View s("scale", scale.tensor), z("zero_point", zero_point.tensor);

  const std::vector<Dimension> dimensions =
      dimensions_of(x, x, q != nullptr ? *q : x, y != nullptr ? *y : x, &s, &z);
  const std::vector<Level> levels = levels_of(dimensions, kX, kQ);
  const std::vector<Level> kept = parameter_levels(levels);
  Dynamic d{};
  d.elements.shape = shape_of(levels);
  d.parameters = shape_of(kept);
  d.scale = s.data;
  d.zero_point = z.data;
  d.p_type = c.type;
  d.scheme = c.scheme;
  Elementwise& e = d.elements;
  e.x = x.data;
  e.x_type = x.kind();
  Operation fused = Operation::none;
  if (q != nullptr) {
    e.q = q->data;
    e.q_type = q->kind();
    e.y = y != nullptr ? y->data : nullptr;
    e.y_type = y != nullptr ? y->kind() : Type::f32;
    e.q_min = c.scheme.q_min;
    e.q_max = c.scheme.q_max;
    e.scale = {s.data, c.type, false};
    e.add_zero_point = e.subtract_zero_point = {z.data, c.type, false};
    e.chosen = true;
    e.symmetric = c.scheme.symmetric;
    e.divide_type = e.add_type = c.type;
    e.subtract_type = e.scale_type = type_of(c.dequantized()) == static_cast<int>(Type::f64)
                                         ? Type::f64
                                         : Type::f32;
    e.streams = y != nullptr && streams(fresh, x, *y);
    fused = y != nullptr ? Operation::quantize_dequantize : Operation::quantize;
  }
  run(d, fused, x);
  scale.copy_back();
  zero_point.copy_back();
}

using Parameter2 = std::tuple<Tensor, Tensor>;

Parameter2 choose_qparams(const Tensor& x, const BlockSize& block_size, int64_t q_min, int64_t q_max,
                          double eps, bool symmetric, bool include_zero) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype_of(Type::i16));
  Tensor scale = c.new_parameter(), zero_point = c.new_parameter();
  choose_into(c, scale, zero_point, nullptr, nullptr, true);
  return {scale, zero_point};
}

void check_parameter_out(const Choice& c, const View& out) {
  check_out(out, c.sizes.data(), c.sizes.size(), dtype_of(c.type), c.x);
}

void choose_qparams_out(const Tensor& x, const BlockSize& block_size, int64_t q_min, int64_t q_max,
                        double eps, bool symmetric, bool include_zero, const Tensor& scale_tensor,
                        const Tensor& zero_point_tensor) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype_of(Type::i16));
  const View scale("scale", scale_tensor), zero_point("zero_point", zero_point_tensor);
  check_parameter_out(c, scale);
  check_parameter_out(c, zero_point);
  claim_outs({&scale, &zero_point}, {&c.x});
  choose_into(c, scale_tensor, zero_point_tensor, nullptr, nullptr, false);
}

std::tuple<Tensor, Tensor, Tensor> dynamic_quantize(const Tensor& x, const BlockSize& block_size,
                                                    int64_t q_min, int64_t q_max, double eps,
                                                    bool symmetric, int32_t dtype,
                                                    bool include_zero) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype);
  Tensor q = empty_like(c.x, dtype), scale = c.new_parameter(), zero_point = c.new_parameter();
  const View q_view("q", q);
  choose_into(c, scale, zero_point, &q_view, nullptr, true);
  return {q, scale, zero_point};
}

void dynamic_quantize_out(const Tensor& x, const BlockSize& block_size, int64_t q_min, int64_t q_max,
                          double eps, bool symmetric, int32_t dtype, bool include_zero,
                          const Tensor& q_tensor, const Tensor& scale_tensor,
                          const Tensor& zero_point_tensor) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype);
  const View q("q", q_tensor), scale("scale", scale_tensor);
  const View zero_point("zero_point", zero_point_tensor);
  check_out(q, c.x.sizes, c.x.dim, dtype, c.x);
  check_parameter_out(c, scale);
  check_parameter_out(c, zero_point);
  claim_outs({&q, &scale, &zero_point}, {&c.x});
  choose_into(c, scale_tensor, zero_point_tensor, &q, nullptr, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_dequantize(
    const Tensor& x, const BlockSize& block_size, int64_t q_min, int64_t q_max, double eps,
    bool symmetric, int32_t dtype, bool include_zero) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype);
  Tensor q = empty_like(c.x, dtype);
  const View q_view("q", q);
  Tensor y = empty_like(q_view, c.dequantized());
  const View y_view("x_hat", y);
  Tensor scale = c.new_parameter(), zero_point = c.new_parameter();
  choose_into(c, scale, zero_point, &q_view, &y_view, true);
  return {q, y, scale, zero_point};
}

void quantize_dequantize_out(const Tensor& x, const BlockSize& block_size, int64_t q_min,
                             int64_t q_max, double eps, bool symmetric, int32_t dtype,
                             bool include_zero, const Tensor& q_tensor, const Tensor& x_hat_tensor,
                             const Tensor& scale_tensor, const Tensor& zero_point_tensor) {
  const Choice c(x, block_size, q_min, q_max, eps, symmetric, include_zero, dtype);
  const View q("q", q_tensor), x_hat("x_hat", x_hat_tensor), scale("scale", scale_tensor);
  const View zero_point("zero_point", zero_point_tensor);
  check_out(q, c.x.sizes, c.x.dim, dtype, c.x);
  check_out(x_hat, c.x.sizes, c.x.dim, c.dequantized(), c.x);
  check_parameter_out(c, scale);
  check_parameter_out(c, zero_point);
  claim_outs({&q, &x_hat, &scale, &zero_point}, {&c.x});
  choose_into(c, scale_tensor, zero_point_tensor, &q, &x_hat, false);
}

}  // namespace
}  // namespace quantkit

// ---- registration ---------------------------------------------------------------------------------

#define CHOOSE(dtype) \
  "Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool symmetric, " dtype \
  "bool include_zero=False"
#define DYNAMIC CHOOSE("ScalarType dtype, ")
#define GIVEN "Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max"

// Another name lets two builds live in one process (benchmarks/ab.py).
#ifndef QUANTKIT_NAMESPACE
#define QUANTKIT_NAMESPACE quantkit
#endif
#define QUOTED(name) #name
#define NAME_OF(name) QUOTED(name)

// torch takes tags since 2.12: null before, where quantkit/_load.py adds them for Python.
extern "C" [[gnu::weak]] int32_t torch_tag_pt2_compliant_tag();
extern "C" [[gnu::weak]] AOTITorchError torch_library_def_with_tags(TorchLibraryHandle, const char*,
                                                                    const int32_t*, int32_t);

namespace {
void define(TorchLibraryHandle library, const std::string& schema) {
  if (torch_library_def_with_tags == nullptr || torch_tag_pt2_compliant_tag == nullptr) {
    quantkit::check_shim(aoti_torch_library_def(library, schema.c_str()));
  } else {
    const int32_t tag = torch_tag_pt2_compliant_tag();
    quantkit::check_shim(torch_library_def_with_tags(library, schema.c_str(), &tag, 1));
  }
}

const struct Schemas {
  TorchLibraryHandle library = nullptr;

  void def(const std::string& name, const std::string& arguments, const std::string& result,
           const std::string& outs) const {
    define(library, name + "(" + arguments + ") -> " + result);
    define(library, name + ".out(" + arguments + ", *, " + outs + ") -> ()");
  }
  Schemas() {
    quantkit::check_shim(aoti_torch_library_init_def(NAME_OF(QUANTKIT_NAMESPACE), __FILE__, __LINE__, &library));
    def("choose_qparams", CHOOSE(""), "(Tensor, Tensor)",
        "Tensor(a!) scale, Tensor(b!) zero_point");
    def("quantize", GIVEN ", ScalarType dtype", "Tensor", "Tensor(a!) out");
    def("dequantize", "Tensor q, Tensor scale, Tensor zero_point", "Tensor", "Tensor(a!) out");
    def("dynamic_quantize", DYNAMIC, "(Tensor, Tensor, Tensor)",
        "Tensor(a!) q, Tensor(b!) scale, Tensor(c!) zero_point");
    def("quantize_dequantize", DYNAMIC, "(Tensor, Tensor, Tensor, Tensor)",
        "Tensor(a!) q, Tensor(b!) x_hat, Tensor(c!) scale, Tensor(d!) zero_point");
    def("fake_quantize", GIVEN, "Tensor", "Tensor(a!) out");
    // The same without a gradient (autograd costs every call), and the gradient itself.
    def("_fake_quantize", GIVEN, "Tensor", "Tensor(a!) out");
    def("_fake_quantize_backward", "Tensor grad, " GIVEN, "Tensor", "Tensor(a!) out");
  }
  ~Schemas() { aoti_torch_delete_library_object(library); }
} schemas;

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("choose_qparams", TORCH_BOX(&quantkit::choose_qparams));
  m.impl("choose_qparams.out", TORCH_BOX(&quantkit::choose_qparams_out));
  m.impl("quantize", TORCH_BOX(&quantkit::quantize));
  m.impl("quantize.out", TORCH_BOX(&quantkit::quantize_out));
  m.impl("dequantize", TORCH_BOX(&quantkit::dequantize));
  m.impl("dequantize.out", TORCH_BOX(&quantkit::dequantize_out));
  m.impl("dynamic_quantize", TORCH_BOX(&quantkit::dynamic_quantize));
  m.impl("dynamic_quantize.out", TORCH_BOX(&quantkit::dynamic_quantize_out));
  m.impl("quantize_dequantize", TORCH_BOX(&quantkit::quantize_dequantize));
  m.impl("quantize_dequantize.out", TORCH_BOX(&quantkit::quantize_dequantize_out));
  m.impl("fake_quantize", TORCH_BOX(&quantkit::fake_quantize));
  m.impl("fake_quantize.out", TORCH_BOX(&quantkit::fake_quantize_out));
  m.impl("_fake_quantize", TORCH_BOX(&quantkit::fake_quantize));
  m.impl("_fake_quantize.out", TORCH_BOX(&quantkit::fake_quantize_out));
  m.impl("_fake_quantize_backward", TORCH_BOX(&quantkit::fake_quantize_backward));
  m.impl("_fake_quantize_backward.out", TORCH_BOX(&quantkit::fake_quantize_backward_out));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(QUANTKIT_NAMESPACE, CPU, m) { implement(m); }
#ifdef QUANTKIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(QUANTKIT_NAMESPACE, CUDA, m) { implement(m); }
#endif
