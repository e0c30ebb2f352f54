// Layouts of chosen and random axes against brute force: every element of every layout, walked, has
// the offsets of all operands that the definition gives (element i of a dimension lies at i / block
// * stride). layout CASES SEED prints how many of what it tried; of a mistake, the case.
#include "layout.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

using namespace quantkit;

namespace {

using Sizes = std::vector<int64_t>;
using At = std::array<int64_t, kOperands>;  // the offsets of an element

// What an operand was given as: an element for each of x's, or a parameter.
struct Given {
  enum { nothing, data, parameter } as = nothing;
  Sizes sizes, strides, block;  // a parameter's; block: empty where its sizes divide x's
};

struct Case {
  const char* name;
  Sizes sizes;
  Given operands[kOperands];
  Operand first = kX, second = kQ;
};

std::map<std::string, int64_t> counted;
int64_t mistakes = 0;

std::string text(const Sizes& values) {
  std::string all = "(";
  for (int64_t v : values) all += (all.size() > 1 ? ", " : "") + std::to_string(v);
  return all + ")";
}

void check(bool right, const Case& c, const char* what) {
  if (right || ++mistakes > 5) return;
  std::printf("%s: %s: sizes %s, first %d, second %d\n", what, c.name, text(c.sizes).c_str(),
              c.first, c.second);
  for (int o = 0; o < kOperands; ++o)
    if (c.operands[o].as != Given::nothing)
      std::printf("  operand %d: sizes %s strides %s blocks %s\n", o,
                  text(c.operands[o].sizes).c_str(), text(c.operands[o].strides).c_str(),
                  text(c.operands[o].block).c_str());
}

// ---- the two ways -------------------------------------------------------------------------------

std::vector<At> defined(const Case& c) {
  const int64_t dim = int64_t(c.sizes.size());
  std::vector<At> all;
  Sizes index(dim, 0);
  for (;;) {
    At at{};
    for (int o = 0; o < kOperands; ++o) {
      const Given& g = c.operands[o];
      const int64_t skipped = dim - int64_t(g.strides.size());
      for (int64_t d = skipped; g.as != Given::nothing && d < dim; ++d) {
        const int64_t own = d - skipped;
        int64_t block = 1;
        if (g.as == Given::parameter)
          block = g.sizes[own] == 1  ? c.sizes[d]
                  : !g.block.empty() ? g.block[own]
                                     : c.sizes[d] / g.sizes[own];
        at[o] += index[d] / block * g.strides[own];
      }
    }
    all.push_back(at);
    int64_t d = dim - 1;
    for (; d >= 0 && ++index[d] == c.sizes[d]; --d) index[d] = 0;
    if (d < 0) return all;
  }
}

void walk(const Layout& layout, std::vector<At>& all) {
  Sizes index(layout.count, 0);
  for (;;) {
    At at;
    for (int o = 0; o < kOperands; ++o) {
      at[o] = layout.offset[o];
      for (int32_t k = 0; k < layout.count; ++k) at[o] += index[k] * layout.dims[k].stride[o];
    }
    all.push_back(at);
    int32_t k = layout.count - 1;
    for (; k >= 0 && ++index[k] == layout.dims[k].size; --k) index[k] = 0;
    if (k < 0) return;
  }
}
std::vector<At> walked(const Layout& layout) {
  std::vector<At> all;
  walk(layout, all);
  return all;
}

template <class T>
std::vector<T> sorted(std::vector<T> all) {
  std::sort(all.begin(), all.end());
  return all;
}

// The values of one operand, or of two, each once.
std::set<std::pair<int64_t, int64_t>> values_of(const std::vector<At>& all, Operand a, Operand b) {
  std::set<std::pair<int64_t, int64_t>> found;
  for (const At& at : all) found.insert({at[a], at[b]});
  return found;
}

Axes axes_of(const Case& c) {
  const int64_t dim = int64_t(c.sizes.size());
  Axes axes(c.sizes.data(), dim);
  for (int o = 0; o < kOperands; ++o) {
    const Given& g = c.operands[o];
    if (g.as == Given::data) axes.add(Operand(o), g.strides.data());
    if (g.as == Given::parameter)
      axes.add(Operand(o), g.sizes.data(), g.strides.data(), int64_t(g.sizes.size()),
               g.block.empty() ? nullptr : g.block.data());
  }
  return axes;
}

// ---- what is true of every layout ---------------------------------------------------------------

void check_shape(const Case& c, const Layout& layout) {
  int64_t numel = 1;
  for (int32_t k = 0; k < layout.count; ++k) {
    const Dim& dim = layout.dims[k];
    numel *= dim.size;
    check(layout.count == 1 || dim.size > 1, c, "a dimension of one element");
    bool merges = k > 0;
    for (int o = 0; merges && o < kOperands; ++o)
      merges = layout.dims[k - 1].stride[o] == dim.size * dim.stride[o];
    check(!merges, c, "neighbours that were not merged");
  }
  check(layout.count > 0 && numel == layout.numel, c, "numel");

  // In the order of memory: by `first` where it has a stride along all, by `second` where `first` has
  // none.
  const auto along = [&](Operand o) {
    int32_t count = 0;
    for (int32_t k = 0; k < layout.count; ++k) count += layout.dims[k].stride[o] != 0;
    return count;
  };
  Operand decides = c.first;
  if (along(c.first) == 0) decides = c.second;
  if (along(decides) < layout.count) return;
  for (int32_t k = 1; k < layout.count; ++k)
    check(layout.dims[k - 1].stride[decides] >= layout.dims[k].stride[decides], c,
          "not in the order of memory");
}

void check_tiles(const Case& c, const Layout& layout, int64_t most) {
  Layout tiled = layout;
  tiled.tile(most);
  if (tiled.count == layout.count) return;
  ++counted["tiled"];
  const Dim& inner = tiled.dims[tiled.count - 1];
  check(inner.size <= most && inner.size >= most / 8, c, "the size of a tile");
  const std::vector<At> all = walked(tiled);
  check(sorted(all) == sorted(walked(layout)), c, "tile");
  // All rows of a piece come one after the other: they have the parameters of one.
  int64_t run = inner.size;
  for (int32_t k = tiled.count - 2;
       k >= 0 && tiled.dims[k].stride[kScale] == 0 && tiled.dims[k].stride[kZeroPoint] == 0; --k)
    run *= tiled.dims[k].size;
  check(run > inner.size, c, "a tile of one row");
  for (int64_t begin = 0; begin < tiled.numel; begin += run) {
    const std::vector<At> piece(all.begin() + begin, all.begin() + begin + run);
    check(int64_t(values_of(piece, kScale, kZeroPoint).size()) <= inner.size, c,
          "the rows of a tile");
  }
}

// Where scale has an element for each parameter.
void check_parameters(const Case& c, Layout layout) {
  const std::vector<At> all = walked(layout);
  const auto scales = values_of(all, kScale, kScale);

  const Layout once = layout.without_repeats();
  check(values_of(all, kX, kScale) == values_of(walked(once), kX, kScale), c, "without_repeats");
  for (int32_t k = 0; k < once.count; ++k)
    check(once.count == 1 || once.dims[k].stride[kX] != 0 || once.dims[k].stride[kScale] != 0, c,
          "a repeat is left");
  counted["repeats"] += once.numel < layout.numel;

  const Layout parameters = layout.parameters();
  const std::vector<At> each = walked(parameters);
  check(values_of(each, kScale, kZeroPoint) == values_of(all, kScale, kZeroPoint), c, "parameters");
  check(parameters.numel == int64_t(scales.size()), c, "a parameter twice");

  const int64_t slabs = layout.slabs(), slab = layout.numel / slabs;
  check(layout.numel % slabs == 0, c, "slabs");
  std::map<int64_t, int64_t> slab_of;
  for (int64_t i = 0; i < layout.numel; ++i)
    check(slab_of.emplace(all[i][kScale], i / slab).first->second == i / slab, c,
          "slabs share a parameter");
  counted["slabs"] += slabs > 1 && slab > 1;

  const int64_t states = layout.number_states();
  check(states == int64_t(scales.size()), c, "the number of states");
  std::map<int64_t, int64_t> state_of;
  std::set<int64_t> dense;
  for (const At& at : walked(layout)) {
    check(state_of.emplace(at[kScale], at[kState]).first->second == at[kState], c,
          "two states of a parameter");
    dense.insert(at[kState]);
  }
  check(int64_t(dense.size()) == states && *dense.begin() == 0 && *dense.rbegin() == states - 1, c,
        "states are not dense");
  int64_t next = 0;
  for (const At& at : walked(layout.parameters()))
    check(at[kState] == next++, c, "states are not in the order of parameters");
}

void check_parts(const Case& c, const Layout& layout, std::mt19937& random) {
  const int32_t k = int32_t(random() % layout.count);
  const int64_t size = layout.dims[k].size, at = int64_t(random() % (size + 1));
  std::vector<At> all;
  for (const auto& [begin, end] : {std::pair(int64_t(0), at), std::pair(at, size)}) {
    if (begin == end) continue;
    const Layout part = layout.part(k, begin, end);
    const size_t before = all.size();
    walk(part, all);
    check(part.numel == int64_t(all.size() - before), c, "the numel of a part");
  }
  check(sorted(all) == sorted(walked(layout)), c, "part");
}

// Returns the layouts.
std::vector<Layout> check_case(const Case& c, std::mt19937& random) {
  ++counted["cases"];
  std::vector<Layout> layouts;
  std::vector<At> all;
  for_layouts(axes_of(c), c.first, c.second, [&](const Layout& layout) {
    layouts.push_back(layout);
    walk(layout, all);
  });
  check(sorted(all) == sorted(defined(c)), c, "offsets");
  const Given& scale = c.operands[kScale];
  bool own = true;  // scale and zero_point of one shape, each parameter at its own address
  for (size_t d = 0; d < scale.sizes.size(); ++d)
    own &= scale.sizes[d] == 1 || scale.strides[d] != 0;
  own &= scale.sizes == c.operands[kZeroPoint].sizes && scale.block == c.operands[kZeroPoint].block;
  for (const Layout& layout : layouts) {
    check_shape(c, layout);
    check_tiles(c, layout, 8);
    check_parts(c, layout, random);
    if (own) check_parameters(c, layout);
  }
  counted["cut"] += layouts.size() > 1;
  return layouts;
}

// ---- cases --------------------------------------------------------------------------------------

// Strides of dimensions in the order of memory that `order` says, each `padding` wider.
Sizes strides_of(const Sizes& sizes, const Sizes& order, const Sizes& padding) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[order[i]] = next;
    next *= sizes[order[i]] + padding[order[i]];
  }
  return strides;
}
Sizes in_order(size_t dim) {
  Sizes order(dim);
  for (size_t d = 0; d < dim; ++d) order[d] = int64_t(d);
  return order;
}
Sizes contiguous(const Sizes& sizes) {
  return strides_of(sizes, in_order(sizes.size()), Sizes(sizes.size(), 0));
}
Given like_x(Sizes strides) { return {Given::data, {}, std::move(strides), {}}; }
// A parameter over blocks, the last ones short where they do not divide.
Given over(const Sizes& sizes, const Sizes& block) {
  Given g{Given::parameter, {}, {}, block};
  const size_t skipped = sizes.size() - block.size();
  for (size_t d = 0; d < block.size(); ++d)
    g.sizes.push_back((sizes[skipped + d] + block[d] - 1) / block[d]);
  g.strides = contiguous(g.sizes);
  return g;
}

Case plain(const char* name, const Sizes& sizes) {
  Case c{name, sizes, {}};
  for (const Operand o : {kX, kQ, kY}) c.operands[o] = like_x(contiguous(sizes));
  return c;
}

Case random_case(std::mt19937& random) {
  const auto below = [&](int64_t n) { return int64_t(random() % uint64_t(n)); };
  Case c{"random", {}, {}};
  int64_t numel = 1;
  for (int64_t d = below(7); d > 0; --d) {
    const int64_t size = 1 + below(20);
    if (numel * size > 1500) break;
    numel *= size;
    c.sizes.push_back(size);
  }
  if (below(10) == 0)  // dimensions of one element do not count
    for (int i = 0; i < 70; ++i)
      c.sizes.insert(c.sizes.begin() + below(int64_t(c.sizes.size()) + 1), 1);
  const size_t dim = c.sizes.size();
  const auto some_strides = [&](const Sizes& sizes, int64_t zeros) {
    Sizes order = in_order(sizes.size()), padding(sizes.size(), 0);
    if (below(2)) std::shuffle(order.begin(), order.end(), random);
    for (int64_t& p : padding) p = below(3) ? 0 : below(3);
    Sizes strides = strides_of(sizes, order, padding);
    for (int64_t& s : strides)
      if (zeros && below(zeros) == 0) s = 0;
    return strides;
  };
  c.operands[kX] = like_x(some_strides(c.sizes, below(2) * 3));
  counted["expanded"] +=
      std::count(c.operands[kX].strides.begin(), c.operands[kX].strides.end(), 0);
  c.operands[kQ] = like_x(below(2) ? contiguous(c.sizes) : some_strides(c.sizes, 0));
  c.operands[kY] = like_x(some_strides(c.sizes, 0));
  for (const Operand o : {kScale, kZeroPoint, kState, kY}) {
    if (o == kY && below(3)) continue;  // else a fourth parameter
    if (o == kZeroPoint && below(2)) {
      c.operands[o] = c.operands[kScale];
      if (below(2)) c.operands[o].strides = some_strides(c.operands[o].sizes, 0);
      continue;
    }
    const bool may_be_short = below(3) == 0;
    Sizes block;
    for (size_t d = below(3) ? 0 : size_t(below(int64_t(dim) + 1)); d < dim; ++d) {
      const int64_t kind = below(4);
      int64_t b = kind == 0 ? 1 : kind == 1 ? c.sizes[d] : 1 + below(c.sizes[d]);
      while (!may_be_short && c.sizes[d] % b != 0) --b;
      block.push_back(b);
    }
    c.operands[o] = over(c.sizes, block);
    c.operands[o].strides = some_strides(c.operands[o].sizes, below(2) * 4);
    if (!may_be_short) c.operands[o].block.clear();
    counted["short"] += may_be_short;
    counted["lower rank"] += block.size() < dim;
  }
  constexpr Operand kLeads[][2] = {{kX, kQ}, {kQ, kX}, {kY, kX}};
  const auto& lead = kLeads[below(3)];
  c.first = lead[0];
  c.second = lead[1];
  return c;
}

void chosen_cases(std::mt19937& random) {
  {
    Case c = plain("0-dim", {});
    c.operands[kScale] = c.operands[kZeroPoint] = Given{Given::parameter, {}, {}, {}};
    const std::vector<Layout> layouts = check_case(c, random);
    check(layouts.size() == 1 && layouts[0].count == 1 && layouts[0].numel == 1, c, "one element");
  }
  for (const int64_t n : {1, 4, 5, 8, 9, 19, 20}) {
    Case c = plain("short last block", {3, n});
    c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, {2, 4});
    const size_t layouts = check_case(c, random).size();
    // Two along the rows, and along the columns, where a block is cut off and another one is whole.
    check(layouts == (n > 4 && n % 4 ? 4u : 2u), c, "the number of layouts");
  }
  for (const int64_t other : {2, 8, 12, 24, 6, 3}) {
    Case c = plain("two granularities", {2, 24});
    c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, {1, 4});
    c.operands[kState] = over(c.sizes, {1, other});
    const std::vector<Layout> layouts = check_case(c, random);
    const bool nests = other % 4 == 0 || 4 % other == 0;
    check((layouts.size() == 1) == nests, c, "one layout where blocks nest, else several");
    counted["nested"] += nests;
    counted["borders apart"] += !nests;
  }
  {  // as global_scale: one for all, or one for each slice
    Case c = plain("a third parameter", {4, 6, 10});
    c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, {1, 2, 5});
    for (const Sizes& block : {Sizes{4, 6, 10}, Sizes{1, 6, 10}, Sizes{10}, Sizes{}}) {
      c.operands[kState] = over(c.sizes, block);
      check_case(c, random);
    }
  }
  {  // kQ is the element's number, for random rounding, while x lies in another order
    Case c = plain("a logical index", {5, 6, 7});
    c.operands[kX] = c.operands[kY] = like_x({1, 35, 5});
    c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, {1, 6, 7});
    for (const Layout& layout : check_case(c, random)) {
      check(layout.dims[layout.count - 1].stride[kX] == 1, c, "x is not innermost");
      std::set<int64_t> numbers;
      for (const At& at : walked(layout)) numbers.insert(at[kQ]);
      check(numbers.size() == 210 && *numbers.rbegin() == 209, c, "an element's number");
    }
  }
  for (const int64_t n : {6, 7}) {  // two codes in a byte: an even number in a row
    Case c = plain("packed codes", {4, 3, n});
    c.first = kQ, c.second = kX;
    c.operands[kX] = like_x({1, 4 * n, 4});
    c.operands[kQ] = like_x({3 * (n + n % 2), n + n % 2, 1});
    for (const int64_t group : {2, 4, 12}) {
      c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, {1, 1, group});
      for (const Layout& layout : check_case(c, random)) {
        const Dim& inner = layout.dims[layout.count - 1];
        bool bytes = layout.offset[kQ] % 2 == 0;
        for (int32_t k = 0; k + 1 < layout.count; ++k) bytes &= layout.dims[k].stride[kQ] % 2 == 0;
        const bool rows_of_one = inner.stride[kQ] % 2 == 0;  // a last block of a single code
        check(bytes && (inner.stride[kQ] == 1 || rows_of_one), c, "codes that share a byte");
        ++counted["packed"];
      }
    }
  }
  // x repeats itself along an outer, a middle and the last dimension.
  for (int repeated = 0; repeated < 3; ++repeated) {
    Case c = plain("expanded", {4, 5, 6});
    Sizes& strides = c.operands[kX].strides;
    strides = repeated == 0 ? Sizes{0, 6, 1} : repeated == 1 ? Sizes{6, 0, 1} : Sizes{5, 1, 0};
    for (const Sizes& block : {Sizes{4, 5, 6}, Sizes{1, 5, 6}, Sizes{4, 1, 6}, Sizes{1, 1, 3}}) {
      c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, block);
      for (const Layout& layout : check_case(c, random)) {
        // Of the last one `second` says it: what is written there is contiguous.
        const Dim& inner = layout.dims[layout.count - 1];
        check(inner.stride[kX] != 0 || (repeated == 2 && inner.stride[kQ] == 1), c,
              "a repeated dimension is innermost");
        ++counted["repeated"];
      }
    }
  }
  {
    Case c = plain("only x says the order, not of the middle", {4, 5, 10});
    for (const Operand o : {kX, kQ, kY}) c.operands[o] = like_x({1, 0, 4});
    const std::vector<Layout> layouts = check_case(c, random);
    check(layouts.size() == 1 && layouts[0].dims[0].stride[kX] != 0 && layouts[0].count == 2, c,
          "x is one piece of memory");
  }
  {
    Case c = plain("one number everywhere", Sizes(62, 2));
    for (const Operand o : {kX, kQ, kY}) c.operands[o].strides.assign(62, 0);
    const Layout layout(axes_of(c), kX, kQ);
    check(layout.count == 1 && layout.numel == int64_t(1) << 62, c, "merged");
  }
  for (const int64_t columns : {64, 60, 61, 8, 7}) {
    Case c = plain("transposed with groups", {columns, 12});
    for (const Operand o : {kX, kQ, kY}) c.operands[o] = like_x({1, columns});
    for (const Sizes& block : {Sizes{1, 4}, Sizes{1, 12}, Sizes{1, 1}}) {
      c.operands[kScale] = c.operands[kZeroPoint] = over(c.sizes, block);
      check_case(c, random);
    }
  }
}

}  // namespace

int main(int, char** argv) {
  std::mt19937 random(uint32_t(std::atoll(argv[2])));
  chosen_cases(random);
  for (int64_t i = std::atoll(argv[1]); i > 0; --i) check_case(random_case(random), random);
  for (const auto& [name, count] : counted)
    std::printf("%s: %lld\n", name.c_str(), static_cast<long long>(count));
  std::printf("mistakes: %lld\n", static_cast<long long>(mistakes));
  return mistakes != 0;
}
