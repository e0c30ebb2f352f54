#include "layout.h"

#include <algorithm>

namespace quantkit {

Axes::Axes(const int64_t* sizes_, int64_t dim_) : count(0), sizes(sizes_), dim(dim_) {
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    Axis& axis = axes[count++];
    axis.size = sizes[d];
    axis.start = 0;
    for (int o = 0; o < kOperands; ++o) axis.stride[o] = 0, axis.block[o] = 1;
  }
}

void Axes::add(Operand operand, const int64_t* strides) {
  Axis* axis = axes;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != 1) (axis++)->stride[operand] = strides[d];
}

void Axes::add(Operand operand, const int64_t* own_sizes, const int64_t* strides, int64_t own_dim,
               const int64_t* block_size) {
  const int64_t skipped = dim - own_dim;
  Axis* axis = axes;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    Axis& a = *axis++;
    const int64_t own = d - skipped;
    if (own < 0 || own_sizes[own] == 1) continue;
    a.stride[operand] = strides[own];
    a.block[operand] = block_size != nullptr ? block_size[own] : a.size / own_sizes[own];
  }
}

namespace {

// Of the operands that change along the axis, and not with every element: sorted, each once.
int blocks_of(const Axis& axis, int64_t* blocks) {
  int count = 0;
  for (int o = 0; o < kOperands; ++o) {
    const int64_t block = axis.block[o];
    if (axis.stride[o] != 0 && block > 1 && axis.start % block + axis.size > block)
      blocks[count++] = block;
  }
  std::sort(blocks, blocks + count);
  return static_cast<int>(std::unique(blocks, blocks + count) - blocks);
}

// Up to where every block is whole and each divides the next.
int64_t regular_size(const Axis& axis) {
  int64_t blocks[kOperands];
  const int count = blocks_of(axis, blocks);
  int64_t first_border = axis.size;
  bool regular = true;
  for (int i = 0; i < count; ++i) {
    first_border = std::min(first_border, blocks[i] - axis.start % blocks[i]);
    regular &= axis.start % blocks[i] == 0 && (i == 0 || blocks[i] % blocks[i - 1] == 0);
  }
  if (!regular) return first_border;
  return count == 0 ? axis.size : axis.size - axis.size % blocks[count - 1];
}

}  // namespace

Cut cut_of(const Axes& axes) {
  for (int32_t d = 0; d < axes.count; ++d) {
    const int64_t size = regular_size(axes.axes[d]);
    if (size != axes.axes[d].size) return {d, size};
  }
  return {-1, 0};
}

Axes part_of(const Axes& axes, int32_t axis, int64_t begin, int64_t end) {
  Axes part = axes;
  part.axes[axis].start += begin;
  part.axes[axis].size = end - begin;
  return part;
}

Layout::Layout(const Layout& other) { *this = other; }

Layout& Layout::operator=(const Layout& other) {
  count = other.count;
  numel = other.numel;
  std::copy_n(other.offset, kOperands, offset);
  std::copy_n(other.dims, count, dims);
  return *this;
}

Layout::Layout(const Axes& axes, Operand first, Operand second) : count(0), numel(1), offset{} {
  // An operand without a stride along one of two dimensions says nothing about their order.
  const auto lies_outside = [&](const Dim& a, const Dim& b) {
    for (const Operand o : {first, second})
      if (a.stride[o] != 0 && b.stride[o] != 0 && a.stride[o] != b.stride[o])
        return a.stride[o] > b.stride[o];
    return false;
  };
  const auto insert = [&](const Dim& dim) {
    int32_t at = count++;
    // Past neighbours that say nothing, too, as long as one further out belongs inside.
    for (int32_t k = at - 1; k >= 0; --k) {
      if (lies_outside(dims[k], dim)) break;
      if (!lies_outside(dim, dims[k])) continue;
      for (; at > k; --at) dims[at] = dims[at - 1];
    }
    dims[at] = dim;
  };
  for (int32_t d = 0; d < axes.count; ++d) {
    const Axis& axis = axes.axes[d];
    for (int o = 0; o < kOperands; ++o) offset[o] += axis.start / axis.block[o] * axis.stride[o];
    if (axis.size == 1) continue;
    numel *= axis.size;
    int64_t blocks[kOperands + 1];
    int n = blocks_of(axis, blocks);
    blocks[n++] = axis.size;
    for (int i = n - 1; i >= 0; --i) {  // outermost first
      const int64_t unit = i == 0 ? 1 : blocks[i - 1];
      if (blocks[i] == unit) continue;
      Dim dim{blocks[i] / unit, {}};
      for (int o = 0; o < kOperands; ++o)
        if (axis.block[o] <= unit) dim.stride[o] = axis.stride[o] * (unit / axis.block[o]);
      insert(dim);
    }
  }
  merge();
}

void Layout::merge() {
  int32_t kept = 0;
  for (int32_t k = 0; k < count; ++k) {
    bool merges = kept > 0;
    for (int o = 0; merges && o < kOperands; ++o) merges = dims[kept - 1].continues(dims[k], o);
    if (!merges) {
      dims[kept++] = dims[k];
      continue;
    }
    const int64_t size = dims[kept - 1].size * dims[k].size;
    dims[kept - 1] = dims[k];
    dims[kept - 1].size = size;
  }
  count = kept;
  if (count == 0) dims[count++] = Dim{1, {1, 1, 1, 0, 0, 0}};
}

int32_t Layout::outer_parameters() const {
  int32_t outer = 0;
  while (outer < count && dims[outer].stride[kScale] != 0) ++outer;
  return outer;
}

int64_t Layout::slabs() const {
  int64_t slabs = 1;
  for (int32_t k = 0; k < outer_parameters(); ++k) slabs *= dims[k].size;
  return slabs;
}

namespace {

template <class Keep>
Layout kept_of(const Layout& all, Keep keep) {
  Layout kept = all;
  kept.count = 0;
  kept.numel = 1;
  for (int32_t k = 0; k < all.count; ++k) {
    if (!keep(all.dims[k])) continue;
    kept.numel *= all.dims[k].size;
    kept.dims[kept.count++] = all.dims[k];
  }
  if (kept.count == 0) kept.dims[kept.count++] = Dim{1, {1, 1, 1, 0, 0, 0}};
  return kept;
}

}  // namespace

Layout Layout::parameters() const {
  return kept_of(*this, [](const Dim& dim) { return dim.stride[kScale] != 0; });
}

Layout Layout::states() const {
  return kept_of(*this, [](const Dim& dim) { return dim.stride[kState] != 0; });
}
Layout Layout::within_state() const {
  return kept_of(*this, [](const Dim& dim) { return dim.stride[kState] == 0; });
}

Layout Layout::without_repeats() const {
  return kept_of(*this,
                 [](const Dim& dim) { return dim.stride[kX] != 0 || dim.stride[kScale] != 0; });
}

Layout Layout::part(int32_t dim, int64_t begin, int64_t end) const {
  Layout part = *this;
  part.numel = numel / dims[dim].size * (end - begin);
  part.dims[dim].size = end - begin;
  for (int o = 0; o < kOperands; ++o) part.offset[o] += begin * dims[dim].stride[o];
  return part;
}

int64_t Layout::number_states() {
  int64_t states = 1;
  for (int32_t k = count - 1; k >= 0; --k) {
    dims[k].stride[kState] = dims[k].stride[kScale] != 0 ? states : 0;
    if (dims[k].stride[kScale] != 0) states *= dims[k].size;
  }
  offset[kState] = 0;
  return states;
}

void Layout::tile(int64_t most) {
  const auto apart = [](const Dim& dim) {
    return dim.stride[kScale] > 1 || dim.stride[kZeroPoint] > 1;
  };
  const auto shared = [](const Dim& dim) {
    return dim.stride[kScale] == 0 && dim.stride[kZeroPoint] == 0;
  };
  Dim& row = dims[count - 1];
  if (count < 2 || count == kMaxDims || row.size <= most || !apart(row) || !shared(dims[count - 2]))
    return;
  int64_t piece = most;
  while (row.size % piece != 0) --piece;
  if (piece < most / 8) return;
  Dim pieces = row;
  pieces.size = row.size / piece;
  for (int64_t& stride : pieces.stride) stride *= piece;
  row.size = piece;
  int32_t at = count - 1;
  while (at > 0 && shared(dims[at - 1])) --at;
  std::copy_backward(dims + at, dims + count, dims + count + 1);
  dims[at] = pieces;
  ++count;
}

}  // namespace quantkit
