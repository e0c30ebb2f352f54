// The linear layer of int8 codes: linear_w8a8.
#include "ops.h"

namespace quantkit {
namespace {

int64_t rounded_up(int64_t n, int64_t multiple) { return divided_up(n, multiple) * multiple; }

template <class T>
T* data_of(const Tensor& t) {
  return reinterpret_cast<T*>(TensorInfo("", t).data);
}

// (rows, columns) of codes; those beyond n of both are 0.
Tensor codes_of(const TensorInfo& on, int64_t rows, int64_t columns, int64_t n) {
  const int64_t sizes[] = {rows, columns};
  const Tensor made = empty_contiguous(on, sizes, 2, dtype_of(Format::int8));
  if (rows * columns != n) clear(TensorInfo("q", made));
  return made;
}

// t on the device of `on`, with its elements side by side, in float32.
struct Floats {
  std::optional<Tensor> moved;
  Contiguous here;
  Converted converted;

  Floats(const TensorInfo& t, const TensorInfo& on)
      : here(moved_to(t, on)), converted(here.info, Type::f32) {}
  const float* data() const { return reinterpret_cast<const float*>(converted.info.data); }

 private:
  TensorInfo moved_to(const TensorInfo& t, const TensorInfo& on) {
    if (t.same_device(on)) return t;
    moved = empty_contiguous(on, t.sizes, t.dim, t.dtype);
    copy(TensorInfo(t.name, *moved), t);
    return TensorInfo(t.name, *moved);
  }
};

struct LinearW8a8 {
  static constexpr int kResults = 1;
  const Tensor& tensor;  // x
  TensorInfo x, q, scale;
  std::optional<TensorInfo> bias;
  std::vector<int64_t> sizes;

  LinearW8a8(const Tensor& x_, const Tensor& q_, const Tensor& scale_,
             const std::optional<Tensor>& bias_)
      : tensor(x_), x("x", x_), q("q", q_), scale("scale", scale_) {
    if (bias_) bias.emplace("bias", *bias_);
    check_linear(x, q, scale, bias ? &*bias : nullptr);
    sizes.assign(x.sizes, x.sizes + x.dim);
    sizes.back() = q.sizes[0];
  }

  Result result(int) const { return {"out", x.dtype, sizes.data(), x.dim, &x, true}; }
  std::vector<const TensorInfo*> inputs() const {
    std::vector<const TensorInfo*> inputs = {&x, &q, &scale};
    if (bias) inputs.push_back(&*bias);
    return inputs;
  }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool) const {
    if (outs[0].numel == 0) return;
    Linear l{};
    l.depth = x.sizes[x.dim - 1];
    l.tokens = x.numel / l.depth;
    l.outputs = q.sizes[0];
    // Torch's product on a GPU takes whole vectors: zeros fill them.
    const bool by_torch = sums_by_torch(x);
    const int64_t rows = by_torch ? rounded_up(l.tokens, 32) : l.tokens,
                  columns = by_torch ? rounded_up(l.depth, 16) : l.depth;
    const Tensor codes = codes_of(x, rows, columns, x.numel);
    const Tensor x_scale = quantized_tokens(codes, columns);

    const Contiguous weights(q), y(outs[0]);
    const Floats scales(scale, x);
    std::optional<Floats> offsets;
    if (bias) offsets.emplace(*bias, x);
    l.x = data_of<const int8_t>(codes);
    l.x_scale = data_of<const float>(x_scale);
    l.q = reinterpret_cast<const int8_t*>(weights.info.data);
    l.scale = scales.data();
    l.each_scale = scale.dim > 0;
    l.bias = offsets ? offsets->data() : nullptr;
    l.y = y.info.data;
    l.y_type = x.kind();
    std::optional<Tensor> sums;
    if (by_torch) {
      l.sums_stride = rounded_up(l.outputs, 16);
      sums = product(codes, weights.info, l.sums_stride, columns);
      l.sums = data_of<const int32_t>(*sums);
    }
    quantkit::run(l, x);
    if (y.copy) copy(outs[0], y.info);
  }

 private:
  // Writes x's codes to rows of `columns`; their scales.
  Tensor quantized_tokens(const Tensor& codes, int64_t columns) const {
    std::vector<int64_t> shape(x.sizes, x.sizes + x.dim), strides(x.dim, 1);
    int64_t stride = columns;
    for (int64_t d = x.dim - 2; d >= 0; --d) {
      strides[d] = stride;
      stride *= x.sizes[d];
    }
    const Tensor q_out = as_strided(TensorInfo("q", codes), shape, strides, 0);
    shape.back() = 1;
    const Tensor made = empty_contiguous(x, shape.data(), x.dim, dtype_of(Type::f32)),
                 zero = empty_contiguous(x, shape.data(), x.dim, dtype_of(Type::f32));
    const TensorInfo outs[] = {{"q", q_out}, {"scale", made}, {"zero_point", zero}};
    quantize_tokens(tensor, outs);
    return made;
  }

  static Tensor product(const Tensor& codes, const TensorInfo& q, int64_t outputs,
                        int64_t columns) {
    const int64_t rows = q.sizes[0], depth = q.sizes[1];
    Tensor whole = as_strided(q, {rows, depth}, {depth, 1}, 0);
    if (rows != outputs || depth != columns) {
      whole = codes_of(q, outputs, columns, q.numel);
      const Tensor part = as_strided(TensorInfo("q", whole), {rows, depth}, {columns, 1}, 0);
      copy(TensorInfo("q", part), q);
    }
    const Tensor transposed =
        as_strided(TensorInfo("q", whole), {columns, outputs}, {1, columns}, 0);
    return aten("aten::_int_mm", "", codes, transposed);
  }
};

}  // namespace

void implement_linear(Library& library) {
  using T = const Tensor&;
  implement<LinearW8a8, T, T, T, const std::optional<Tensor>&>(library, "linear_w8a8");
}

}  // namespace quantkit
