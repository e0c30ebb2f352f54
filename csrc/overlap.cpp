#include "overlap.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace quantkit {
namespace {

// Runs of bytes: [begin, begin + run), repeated along dimensions of ascending strides.
struct Runs {
  struct Along {
    int64_t size, stride;
  };
  int64_t begin, run;
  std::vector<Along> dimensions;

  int64_t end() const {
    int64_t last = begin;
    for (const Along& d : dimensions) last += (d.size - 1) * d.stride;
    return last + run;
  }
  // Adds a dimension whose stride is not below the others'.
  void repeat(int64_t size, int64_t stride) {
    if (dimensions.empty() && stride <= run) {
      run += (size - 1) * stride;
    } else if (size > 1) {
      dimensions.push_back({size, stride});
    }
  }
  // The first half of the longest dimension; *this keeps the second.
  Runs split() {
    Runs first = *this;
    const Along longest = dimensions.back();
    const int64_t half = longest.size / 2;
    dimensions.pop_back();
    first.dimensions.pop_back();
    begin += half * longest.stride;
    repeat(longest.size - half, longest.stride);
    first.repeat(half, longest.stride);
    return first;
  }
};

// Whether a byte is in both. Halves what is longer until spans or the strides' common divisor decide:
// usual layouts at the first look, any other in memory that does not grow with the tensors.
bool meet(Runs a, Runs b) {
  for (;;) {
    if (a.begin >= b.end() || b.begin >= a.end()) return false;
    if (a.dimensions.empty() && b.dimensions.empty()) return true;
    int64_t divisor = 0;
    for (const Runs* r : {&a, &b})
      for (const Runs::Along& d : r->dimensions) divisor = std::gcd(divisor, d.stride);
    const int64_t apart = ((b.begin - a.begin) % divisor + divisor) % divisor;
    if (apart >= a.run && apart + b.run <= divisor) return false;
    const bool longer = b.dimensions.empty() ||
                        (!a.dimensions.empty() && a.end() - a.begin >= b.end() - b.begin);
    if (meet((longer ? a : b).split(), longer ? b : a)) return true;
  }
}

// Dimensions with more than one element by ascending stride.
std::vector<Runs::Along> ascending(const View& t) {
  std::vector<Runs::Along> dimensions;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] > 1) dimensions.push_back({t.sizes[d], t.strides[d]});
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Runs::Along& x, const Runs::Along& y) { return x.stride < y.stride; });
  return dimensions;
}

Runs bytes_of(const View& t) {
  const int64_t size = aoti_torch_dtype_element_size(t.dtype);
  Runs runs{reinterpret_cast<intptr_t>(t.data), size, {}};
  for (const Runs::Along& d : ascending(t)) runs.repeat(d.size, d.stride * size);
  return runs;
}

}  // namespace

bool overlaps_itself(const View& t) {
  if (t.numel < 2) return false;
  Runs inner{0, 1, {}};  // in elements
  for (const Runs::Along& d : ascending(t)) {
    // An element at two indices, of which d's differ by one or more.
    Runs further = inner;
    further.begin = d.stride;
    further.repeat(d.size - 1, d.stride);
    if (meet(inner, further)) return true;
    inner.repeat(d.size, d.stride);
  }
  return false;
}

bool overlap(const View& a, const View& b) {
  if (a.numel == 0 || b.numel == 0 || !a.same_device(b)) return false;
  return meet(bytes_of(a), bytes_of(b));
}

}  // namespace quantkit
