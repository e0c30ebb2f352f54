// Geometry: from sizes, strides and granularities to the few dimensions that kernels walk. No
// torch.
//
// A tensor of any shape and strides with parameters of any granularity is a list of dimensions,
// outermost first, each with a stride for every operand (0: the operand does not change along it).
// Neighbours that follow the same rule are merged, so most tensors have one or two. CPU and CUDA
// read the same layout.
#pragma once

#include <cstdint>

namespace quantkit {

// What has a stride: x, what comes in or goes out beside it (codes, a gradient, a mask), y, the
// parameters, and the states of a reduction: one for each parameter, or for each block that is
// measured.
enum Operand : int { kX, kQ, kY, kScale, kZeroPoint, kState, kOperands };
// Where an element lies in the sequence of random draws: nothing has states at the same time.
constexpr Operand kIndex = kState;

constexpr int kMaxDims = 64;

// A dimension as tensors have it, or a part of it that begins at `start`: element i of it lies at
// (start + i) / block * stride, in elements of the operand.
struct Axis {
  int64_t size, start;
  int64_t stride[kOperands], block[kOperands];
};

// The dimensions of more than one element: fewer than 64, of however many a tensor has.
struct Axes {
  int32_t count;
  Axis axes[kMaxDims];
  const int64_t* sizes;  // of all
  int64_t dim;

  Axes(const int64_t* sizes, int64_t dim);
  // An operand with an element for each of x's.
  void add(Operand operand, const int64_t* strides);
  // A parameter: of x's rank with sizes that divide x's, or of a lower rank and broadcasting.
  // `block_size` says how many elements share one where the last block may be short (null: the
  // sizes say it).
  void add(Operand operand, const int64_t* sizes, const int64_t* strides, int64_t dim,
           const int64_t* block_size = nullptr);
};

struct Dim {
  int64_t size;
  int64_t stride[kOperands];

  // Whether a step along this dimension is one past the end of `inner`. Places of random draws may
  // be so far apart that the product wraps; then they never meet.
  bool continues(const Dim& inner, int operand) const {
    return uint64_t(stride[operand]) == uint64_t(inner.size) * uint64_t(inner.stride[operand]);
  }
};

// At least one dimension; where there are more, each has at least two elements. The product of all
// is below 2^63.
struct Layout {
  int32_t count;
  int64_t numel;
  int64_t offset[kOperands];
  Dim dims[kMaxDims];

  Layout() = default;
  // The axes, which need no cut, in the order of memory: by the strides of `first`, where it has
  // none by those of `second`.
  Layout(const Axes& axes, Operand first, Operand second);
  Layout(const Layout& other);
  Layout& operator=(const Layout& other);  // copies no more than `count` dimensions

  // How many of the outer dimensions step from parameter to parameter.
  int32_t outer_parameters() const;
  // Their product: slabs share no parameter.
  int64_t slabs() const;

  // Only the dimensions that step from parameter to parameter.
  Layout parameters() const;
  // Only those that step from state to state, or only the others.
  Layout states() const;
  Layout within_state() const;
  // Without those along which x repeats itself under one parameter: extremes do not change.
  Layout without_repeats() const;
  // Only [begin, end) of a dimension.
  Layout part(int32_t dim, int64_t begin, int64_t end) const;
  // Numbers the parameters in the layout's order; returns how many there are.
  int64_t number_states();
  // Where each element of a long row has parameters that lie apart and rows share them: cuts the
  // row into pieces of at most `most` elements, so that all rows of a piece come one after the
  // other.
  void tile(int64_t most);

 private:
  void merge();
};

// The first axis that a layout cannot hold as it is (-1: none), and after how many elements to cut
// it.
struct Cut {
  int32_t axis;
  int64_t at;
};
Cut cut_of(const Axes& axes);
Axes part_of(const Axes& axes, int32_t axis, int64_t begin, int64_t end);

// Calls body(layout) once; where a last block is short or the blocks of two operands have different
// borders, for each part.
template <class Body>
void for_layouts(const Axes& axes, Operand first, Operand second, const Body& body) {
  Cut c = cut_of(axes);
  if (c.axis < 0) return body(Layout(axes, first, second));
  Axes rest = axes;
  for (; c.axis >= 0; c = cut_of(rest)) {
    for_layouts(part_of(rest, c.axis, 0, c.at), first, second, body);
    rest = part_of(rest, c.axis, c.at, rest.axes[c.axis].size);
  }
  body(Layout(rest, first, second));
}

}  // namespace quantkit
