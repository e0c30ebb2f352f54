#include "sizes.h"

#include <algorithm>

namespace quantkit {

bool fits(const TensorInfo& p, const TensorInfo& x) {
  if (p.dim > x.dim) return false;
  const int64_t skipped = x.dim - p.dim;
  for (int64_t d = 0; d < p.dim; ++d) {
    const int64_t size = p.sizes[d], whole = x.sizes[skipped + d];
    if (size == 1 || size == whole) continue;
    if (skipped > 0 || size == 0 || whole == 0 || whole % size != 0) return false;
  }
  return true;
}

bool fit_each_other(const TensorInfo& a, const TensorInfo& b) {
  for (int64_t i = 1; i <= std::min(a.dim, b.dim); ++i) {
    const int64_t m = a.sizes[a.dim - i], n = b.sizes[b.dim - i];
    if (m != n && m != 1 && n != 1) return false;
  }
  return true;
}

void check_block_sizes(const TensorInfo& x, const std::vector<int64_t>& blocks, bool short_blocks,
                       const std::string& name) {
  if (static_cast<int64_t>(blocks.size()) != x.dim)
    raise(name + ": expected " + text(x.dim) + " sizes, one per dimension of " + x.name +
          " of shape " + x.shape_text() + ", got " + list_text(blocks));
  for (int64_t d = 0; d < x.dim; ++d) {
    if (blocks[d] == 0 || blocks[d] < -1)
      raise(name + ": expected sizes of at least 1, or -1 for a whole dimension, got " +
            list_text(blocks));
    if (!short_blocks && blocks[d] != -1 && x.sizes[d] % blocks[d] != 0)
      raise("block_size: " + text(blocks[d]) + " does not divide " + text(x.sizes[d]) +
            ", the size of dimension " + text(d) + " of " + x.name +
            "; a short last block needs compute_dtype=torch.float32");
  }
}

}  // namespace quantkit
