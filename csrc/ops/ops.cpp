#include "ops.h"

#include <algorithm>

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

Tensor as_strided(const TensorInfo& t, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  check_shim(aoti_torch__reinterpret_tensor(t.handle, static_cast<int64_t>(sizes.size()),
                                            sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

Converted::Converted(const TensorInfo& t, Type type) : info(t) {
  if (t.kind() == type) return;
  made = empty_like(t, dtype_of(type));
  info = TensorInfo(t.name, *made);
  if (t.numel == 0) return;
  for_layouts(axes_of(t, nullptr, &info), kY, kX, [&](const Layout& layout) {
    Elementwise e{};
    e.operation = Operation::convert;
    e.layout = &layout;
    e.x = t.data;
    e.x_type = t.kind();
    e.y = info.data;
    e.y_type = type;
    run(e, t);
  });
}

Axes axes_of(const TensorInfo& x, const TensorInfo* q, const TensorInfo* y) {
  Axes axes(x.sizes, x.dim);
  axes.add(kX, x.strides);
  axes.add(kQ, (q != nullptr ? *q : x).strides);
  axes.add(kY, (y != nullptr ? *y : x).strides);
  return axes;
}

std::vector<int64_t> packed_sizes(const TensorInfo& x, Format format) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  if (per_byte(format) > 1) sizes.back() /= per_byte(format);
  return sizes;
}

std::vector<int64_t> unpacked_sizes(const TensorInfo& q, Format format) {
  std::vector<int64_t> sizes(q.sizes, q.sizes + q.dim);
  if (per_byte(format) > 1) sizes.back() *= per_byte(format);
  return sizes;
}

Codes::Codes(const TensorInfo& packed, std::vector<int64_t> sizes, Format format)
    : sizes_(std::move(sizes)),
      strides_(packed.strides, packed.strides + packed.dim),
      info_(packed) {
  for (int64_t d = 0; d + 1 < packed.dim; ++d) strides_[d] *= per_byte(format);
  strides_.back() = 1;
  info_.sizes = sizes_.data();
  info_.strides = strides_.data();
  info_.numel *= per_byte(format);
}

namespace {

// All codes of a tensor, to bytes or from them; both are contiguous.
void repack(Operation operation, const TensorInfo& to, const TensorInfo& from, Format format) {
  const TensorInfo& bytes = operation == Operation::pack ? to : from;
  const int64_t sizes[] = {bytes.numel}, strides[] = {1};
  TensorInfo flat = bytes;
  flat.sizes = sizes;
  flat.strides = strides;
  flat.dim = 1;
  Elementwise e{};
  e.operation = operation;
  e.format = format;
  e.q_in = from.data;
  e.q = to.data;
  for_layouts(axes_of(flat, nullptr, nullptr), kQ, kX, [&](const Layout& layout) {
    e.layout = &layout;
    run(e, bytes);
  });
}

}  // namespace

CodesOut::CodesOut(const TensorInfo& q, const TensorInfo& x, Format format, bool whole)
    : q_(q), format_(format) {
  if (per_byte(format) == 1) return;
  if (whole && packs_codes(q) && is_contiguous(q)) {
    codes_.emplace(q, std::vector<int64_t>(x.sizes, x.sizes + x.dim), format);
    return;
  }
  tensor_ = empty_contiguous(x, x.sizes, x.dim, dtype_of(Type::i8));
  made_.emplace("q", *tensor_);
  // Now: no allocation may fail once something is written.
  if (!is_contiguous(q)) bytes_ = empty_contiguous(q, q.sizes, q.dim, q.dtype);
}

void CodesOut::finish() const {
  if (!made_) return;
  if (!bytes_) return repack(Operation::pack, q_, *made_, format_);
  const TensorInfo packed("q", *bytes_);
  repack(Operation::pack, packed, *made_, format_);
  copy(q_, packed);
}

CodesIn::CodesIn(const TensorInfo& q, std::vector<int64_t> sizes, Format format) : info(q) {
  if (per_byte(format) == 1) return;
  // Neighbours must lie side by side; the GPU's kernels take codes with an element each.
  const bool apart = q.strides[q.dim - 1] != 1 && q.sizes[q.dim - 1] > 1;
  if (apart || !packs_codes(q)) bytes.emplace(q);
  const TensorInfo& packed = bytes ? bytes->info : q;
  if (packs_codes(q)) {
    codes.emplace(packed, std::move(sizes), format);
    info = codes->info();
    return;
  }
  tensor = empty_contiguous(q, sizes.data(), q.dim, dtype_of(Type::i8));
  info = TensorInfo("q", *tensor);
  repack(Operation::unpack, info, packed, format);
}

std::vector<int64_t> blocks_of(const TensorInfo& x, const int64_t* sizes, int64_t dim,
                               const BlockSize& block_size) {
  std::vector<int64_t> blocks(dim);
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t d = x.dim - dim + i, given = block_size ? (*block_size)[d] : -1;
    const int64_t whole = std::max<int64_t>(x.sizes[d], 1);
    const bool by_given = given > 0 && sizes[i] == blocks_in(x.sizes[d], given);
    blocks[i] = by_given ? given : sizes[i] > 1 ? whole / sizes[i] : whole;
  }
  return blocks;
}

bool has_whole_bytes(const TensorInfo& x, int64_t block, Format format) {
  return block % per_byte(format) == 0 || block >= x.sizes[x.dim - 1];
}

namespace {

constexpr float kZero = 0, kOne = 1, kMinusOne = -1;
constexpr Parameter on_host(const float& number) { return {&number, Type::f32, true}; }

// made = (numbers of from - subtracted) * scale, in float32; sizes: of scale, which `from` has or
// which divide its.
void multiply(const TensorInfo& made, const TensorInfo& from, Format format,
              const float& subtracted, const TensorInfo* scale) {
  Elementwise e{};
  e.operation = Operation::dequantize;
  e.format = format;
  e.q_in = from.data;
  e.y = made.data;
  e.y_type = Type::f32;
  e.steps.subtract = e.steps.multiply = Type::f32;
  e.subtract = on_host(subtracted);
  e.scale = on_host(kOne);
  Axes axes = axes_of(from, nullptr, &made);
  if (scale != nullptr) {
    e.scale = {scale->data, scale->kind(), !scale->same_device(made)};
    axes.add(kScale, scale->sizes, scale->strides, scale->dim);
  }
  for_layouts(axes, kY, kX, [&](const Layout& layout) {
    e.layout = &layout;
    run(e, made);
  });
}

}  // namespace

UsedScale::UsedScale(const TensorInfo& scale, const TensorInfo* global) : info(scale) {
  if (global == nullptr && !is_coded(scale)) return;
  // A scale without dimensions may lie on the CPU beside x, and global on x's device.
  if (global != nullptr && !global->same_device(scale) && global->dim == 0 && scale.dim == 0) {
    moved = empty_contiguous(*global, scale.sizes, 0, scale.dtype);
    info = TensorInfo(scale.name, *moved);
    copy(info, scale);
  }
  const std::optional<Converted> numbers =
      is_coded(info) ? std::nullopt : std::make_optional<Converted>(info, Type::f32);
  const std::optional<Converted> factor =
      global == nullptr ? std::nullopt : std::make_optional<Converted>(*global, Type::f32);
  const TensorInfo from = numbers ? numbers->info : info;
  const Format format = numbers                     ? Format::numbers
                        : info.dtype == kFloat8E8m0 ? Format::powers
                                                    : Format::float8_e4m3fn;
  made = empty_contiguous(info, info.sizes, info.dim, dtype_of(Type::f32));
  info = TensorInfo(scale.name, *made);
  if (info.numel > 0) multiply(info, from, format, kZero, factor ? &factor->info : nullptr);
}

SpreadGlobal::SpreadGlobal(const TensorInfo& global, const TensorInfo& on, const int64_t* sizes,
                           int64_t dim)
    : number(global, Type::f32),
      parameter{number.info.data, Type::f32, !number.info.same_device(on)} {
  if (global.dim == 0) return;
  zeros = empty_contiguous(on, sizes, dim, dtype_of(Type::f32));
  made = empty_contiguous(on, sizes, dim, dtype_of(Type::f32));
  const TensorInfo from("global_scale", *zeros), to("global_scale", *made);
  clear(from);
  if (to.numel > 0) multiply(to, from, Format::numbers, kMinusOne, &number.info);  // (0 - -1) g
  parameter.data = to.data;
}

DrawnFrom::DrawnFrom(const TensorInfo& x, const std::optional<Tensor>& seed,
                     const BlockSize& index) {
  if (!seed) return;
  seed_.emplace("seed", *seed);
  words_.emplace(*seed_);
  if (index) {
    first_ = index->front();
    strides_.assign(index->begin() + 1, index->end());
    return;
  }
  strides_.resize(x.dim);
  for (int64_t d = x.dim - 1, stride = 1; d >= 0; stride *= x.sizes[d--]) strides_[d] = stride;
}

void DrawnFrom::give(Elementwise& e, Axes& axes, const TensorInfo& x) const {
  if (!seed_) return;
  e.seed = reinterpret_cast<const int64_t*>(words_->info.data);
  e.seed_on_host = !words_->info.same_device(x);
  e.first_index = first_;
  axes.add(kIndex, strides_.data());
}

}  // namespace quantkit
