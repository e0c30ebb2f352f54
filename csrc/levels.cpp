#include "levels.h"

#include <algorithm>

namespace quantkit {
namespace {

bool merges(const Level& outer, const Level& inner) {
  for (int k = 0; k < kOperands; ++k)
    if (outer.step[k] != inner.size * inner.step[k]) return false;
  return true;
}

// At least one level, which stands for the single element of a tensor of one.
void fill_if_empty(std::vector<Level>& levels) {
  if (levels.empty()) levels.push_back(Level{1, {1, 1, 1, 0, 0}});
}

}  // namespace

std::vector<Level> levels_of(const std::vector<Dimension>& dimensions, Operand first,
                             Operand second) {
  std::vector<Level> sorted;
  sorted.reserve(2 * dimensions.size() + 1);
  const auto add = [&](int64_t size, const Dimension& d, int64_t elements, bool scale, bool zero) {
    if (size == 1) return;
    Level level{size, {}};
    for (int k = kX; k <= kY; ++k) level.step[k] = d.strides[k] * elements;
    level.step[kScale] = scale ? d.scale.step : 0;
    level.step[kZeroPoint] = zero ? d.zero_point.step : 0;
    sorted.push_back(level);
  };
  for (const Dimension& d : dimensions) {
    // Where both change they do so together: the two shapes broadcast with each other.
    const int64_t block = d.scale.step != 0 ? d.scale.block : d.zero_point.block;
    const bool steps = d.scale.step != 0 || d.zero_point.step != 0;
    if (!steps) {
      add(d.size, d, 1, false, false);
    } else {
      add(d.size / block, d, block, true, true);
      add(block, d, 1, false, false);
    }
  }
  std::stable_sort(sorted.begin(), sorted.end(), [&](const Level& a, const Level& b) {
    return a.step[first] != b.step[first] ? a.step[first] > b.step[first]
                                          : a.step[second] > b.step[second];
  });
  std::vector<Level> levels;
  levels.reserve(sorted.size() + 1);
  for (const Level& level : sorted) {
    if (!levels.empty() && merges(levels.back(), level)) {
      const int64_t size = levels.back().size * level.size;
      levels.back() = level;
      levels.back().size = size;
    } else {
      levels.push_back(level);
    }
  }
  fill_if_empty(levels);
  return levels;
}

std::vector<Level> parameter_levels(const std::vector<Level>& levels) {
  std::vector<Level> kept;
  for (const Level& level : levels)
    if (level.step[kScale] != 0) kept.push_back(level);
  fill_if_empty(kept);
  return kept;
}

Shape shape_of(const std::vector<Level>& levels) {
  int64_t numel = 1;
  for (const Level& level : levels) numel *= level.size;
  return {levels.data(), static_cast<int32_t>(levels.size()), numel};
}

}  // namespace quantkit
