#include <algorithm>

#include "../overlap.h"
#include "values.h"

namespace quantkit {

void check_out(const TensorInfo& out, const int64_t* sizes, int64_t dim, int32_t dtype,
               const TensorInfo& like) {
  const std::string name = out.name;
  if (out.dtype != dtype)
    raise(name + ": expected dtype " + dtype_name(dtype) + ", got " + dtype_name(out.dtype));
  if (!out.same_device(like))
    raise(name + ": expected device " + like.device_text() + ", got " + out.device_text());
  if (!std::equal(out.sizes, out.sizes + out.dim, sizes, sizes + dim))
    raise(name + ": expected shape " + tuple_text(sizes, dim) + ", got " + out.shape_text());
}

namespace {

// Strides of dimensions of size 1 lead nowhere.
bool same_elements(const TensorInfo& a, const TensorInfo& b) {
  bool same = a.data == b.data && a.dtype == b.dtype;
  for (int64_t d = 0; d < a.dim; ++d) same &= a.sizes[d] == 1 || a.strides[d] == b.strides[d];
  return same;
}

void check_overlap(const std::vector<const TensorInfo*>& outs,
                   const std::vector<const TensorInfo*>& inputs, const TensorInfo* in_place) {
  for (const TensorInfo* out : outs)
    if (overlaps_itself(*out))
      raise(std::string(out->name) + ": its elements overlap each other in memory");
  for (size_t i = 0; i < outs.size(); ++i) {
    const TensorInfo& out = *outs[i];
    std::vector<const TensorInfo*> others = inputs;
    others.insert(others.end(), outs.begin(), outs.begin() + i);
    for (const TensorInfo* other : others) {
      const bool same = other == in_place && same_elements(out, *other);
      if (!same && overlap(out, *other))
        raise(std::string(out.name) + ": overlaps " + other->name + " in memory");
    }
  }
}

}  // namespace

void claim_outs(const std::vector<const TensorInfo*>& outs,
                const std::vector<const TensorInfo*>& inputs, const TensorInfo* in_place) {
  check_overlap(outs, inputs, in_place);
  for (const TensorInfo* out : outs)
    if (aoti_torch_grad_mode_is_enabled() && !is_leaf(*out))
      raise(std::string(out->name) +
            ": expected a tensor outside of autograd's graphs, as out= has no "
            "gradient; pass " +
            out->name + ".detach()");
  // A tensor copied to itself stays as it is, but autograd counts a new version of it.
  for (const TensorInfo* out : outs)
    if (aoti_torch_copy_(out->handle, out->handle, 0) != AOTI_TORCH_SUCCESS)
      raise(std::string(out->name) + ": cannot be written: " + torch_says());
}

}  // namespace quantkit
