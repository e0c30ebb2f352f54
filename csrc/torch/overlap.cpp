#include "overlap.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

namespace quantkit {
namespace {

int64_t element_size(const TensorInfo& t) { return aoti_torch_dtype_element_size(t.dtype); }

// Elements of a tensor lie at sums of its strides, each taken from 0 to size - 1 times, so two
// tensors meet where some sum of the strides of both lies between two bounds. A search over the
// strides, largest first, decides that at once for all usual layouts. Where it does not (the
// question is NP-hard), the addresses of the smaller tensor are sorted and the other's looked up.
// quantkit/_overlap.py does the same.
struct Term {
  int64_t stride, most;  // how often it may be taken
};
using Terms = std::vector<Term>;

void sort_by_stride(Terms& terms) {
  std::sort(terms.begin(), terms.end(),
            [](const Term& s, const Term& t) { return s.stride > t.stride; });
}

// By descending stride.
Terms terms_of(const TensorInfo& t, int64_t unit) {
  Terms terms;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] != 1) terms.push_back({t.strides[d] * unit, t.sizes[d] - 1});
  sort_by_stride(terms);
  return terms;
}

// From the first element to the last, in elements.
int64_t reach_of(const TensorInfo& t) {
  int64_t reach = 0;
  for (int64_t d = 0; d < t.dim; ++d) reach += t.strides[d] * (t.sizes[d] - 1);
  return reach;
}

class Sums {
 public:
  explicit Sums(const Terms& terms) : terms_(terms), suffixes_(terms.size() + 1, {0, 0, true}) {
    for (size_t i = terms.size(); i-- > 0;) {
      const Suffix& rest = suffixes_[i + 1];
      const int64_t stride = terms[i].stride, common = std::gcd(rest.divisor, stride);
      const bool full =
          rest.divisor == 0 || (rest.divisor == common && stride <= rest.reach + common);
      suffixes_[i] = {rest.reach + stride * terms[i].most, common, rest.full && full};
    }
  }

  // Whether some sum lies in [low, high]; nothing where that takes longer than sorting.
  std::optional<bool> any_in(int64_t low, int64_t high) {
    const bool found = search(0, low, high);
    if (!found && steps_ > kSteps) return std::nullopt;
    return found;
  }

 private:
  static constexpr int64_t kSteps = 2000;
  // Of the terms from each on. Full: no multiple of the divisor is left out between 0 and the
  // reach.
  struct Suffix {
    int64_t reach, divisor;
    bool full;
  };

  bool search(size_t i, int64_t low, int64_t high) {
    if (++steps_ > kSteps) return false;
    const auto [reach, divisor, full] = suffixes_[i];
    low = std::max<int64_t>(low, 0);
    high = std::min(high, reach);
    if (low > high) return false;
    if (low == 0 || high == reach) return true;
    if (high / divisor * divisor < low) return false;
    if (full) return true;
    const int64_t stride = terms_[i].stride, short_of = low - suffixes_[i + 1].reach;
    const int64_t first = short_of <= 0 ? 0 : (short_of + stride - 1) / stride;
    const int64_t last = std::min(terms_[i].most, high / stride);
    for (int64_t k = first; k <= last && steps_ <= kSteps; ++k)
      if (search(i + 1, low - k * stride, high - k * stride)) return true;
    return false;
  }

  const Terms& terms_;
  std::vector<Suffix> suffixes_;
  int64_t steps_ = 0;
};

// Calls body(address) for every element until it returns true; whether it did.
template <class Body>
bool any_element(const TensorInfo& t, Body body) {
  std::vector<int64_t> index(t.dim, 0);
  intptr_t at = reinterpret_cast<intptr_t>(t.data);
  const int64_t size = element_size(t);
  for (int64_t i = 0; i < t.numel; ++i) {
    if (body(at)) return true;
    for (int64_t d = t.dim - 1; d >= 0; --d) {
      at += t.strides[d] * size;
      if (++index[d] < t.sizes[d]) break;
      at -= t.sizes[d] * t.strides[d] * size;
      index[d] = 0;
    }
  }
  return false;
}

std::vector<intptr_t> sorted_addresses(const TensorInfo& t) {
  std::vector<intptr_t> addresses;
  addresses.reserve(t.numel);
  any_element(t, [&](intptr_t at) {
    addresses.push_back(at);
    return false;
  });
  std::sort(addresses.begin(), addresses.end());
  return addresses;
}

}  // namespace

bool overlaps_itself(const TensorInfo& t) {
  if (t.numel < 2) return false;
  const Terms terms = terms_of(t, 1);
  int64_t reach = reach_of(t);
  if (terms.back().stride == 0 || t.numel > reach + 1) return true;  // fewer places than elements
  // Two index tuples that first differ, in this order, by at least one times a stride.
  for (size_t i = 0; i < terms.size(); ++i) {
    reach -= terms[i].stride * terms[i].most;
    const int64_t target = reach - terms[i].stride;
    if (target < 0) continue;  // the rest does not reach so far
    Terms differences(terms.begin() + i, terms.end());
    differences[0].most -= 1;
    for (size_t k = 1; k < differences.size(); ++k) differences[k].most *= 2;
    const std::optional<bool> found = Sums(differences).any_in(target, target);
    if (found == true) return true;
    if (found) continue;
    const std::vector<intptr_t> addresses = sorted_addresses(t);
    return std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end();
  }
  return false;
}

bool overlap(const TensorInfo& a, const TensorInfo& b) {
  if (a.numel == 0 || b.numel == 0 || !a.same_device(b)) return false;
  if (a.numel > b.numel) return overlap(b, a);
  const int64_t a_size = element_size(a), b_size = element_size(b);
  // Elements meet where -b_size < a's address - b's < a_size, turned so that all strides add.
  const int64_t b_reach = reach_of(b) * b_size, ahead = b.data + b_reach - a.data;
  const int64_t low = ahead - a_size + 1, high = ahead + b_size - 1;
  if (high < 0 || low > reach_of(a) * a_size + b_reach) return false;
  Terms terms = terms_of(a, a_size);
  for (const Term& term : terms_of(b, b_size)) terms.push_back(term);
  sort_by_stride(terms);
  Terms merged;
  for (const Term& term : terms) {
    if (term.stride == 0) continue;
    if (merged.empty() || merged.back().stride != term.stride) merged.push_back({term.stride, 0});
    merged.back().most += term.most;
  }
  if (const std::optional<bool> found = Sums(merged).any_in(low, high)) return *found;
  const std::vector<intptr_t> addresses = sorted_addresses(a);
  return any_element(b, [&](intptr_t at) {
    const auto near = std::upper_bound(addresses.begin(), addresses.end(), at - a_size);
    return near != addresses.end() && *near < at + b_size;
  });
}

}  // namespace quantkit
