// Operators that measure errors: measure, measure_limbs.
#include "given.h"

namespace quantkit {
namespace {

// The results: squares and squared_errors or (kLimbs) their digits, max_error, counts.
template <bool kLimbs>
struct Errors {
  static constexpr int kResults = kLimbs ? 3 : 4;
  static constexpr int kMaxAt = kResults - 2;
  Format format;
  Given given;
  int64_t q_min, q_max;
  bool round_first;
  Blocks blocks;  // each has sums
  std::vector<int64_t> limbs_sizes, counts_sizes;

  Errors(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
         int64_t q_min_, int64_t q_max_, const Text& name, const BlockSize& block_size,
         const std::optional<Tensor>& global_scale, bool round_first_, const BlockSize& over)
      : format(check_format(name.value)),
        given((check_options(x, q_min_, q_max_, format, round_first_), TensorInfo("x", x)),
              TensorInfo("x", x), scale, zero_point, format, block_size, global_scale),
        q_min(q_min_),
        q_max(q_max_),
        round_first(round_first_) {
    if (over) check_block_sizes(given.x, *over, true, "over");
    blocks = Blocks(given.x, over);
    limbs_sizes = counts_sizes = blocks.counts;
    limbs_sizes.insert(limbs_sizes.end(), {2, kDigits});
    counts_sizes.push_back(2);
  }

  Result result(int i) const {
    const auto of = [&](const char* name, int32_t dtype, const std::vector<int64_t>& shape) {
      return Result{name, dtype, shape.data(), int64_t(shape.size()), &given.x, true};
    };
    if (i == kMaxAt) return of("max_error", dtype_of(Type::f32), blocks.counts);
    if (i > kMaxAt) return of("counts", dtype_of(Type::i64), counts_sizes);
    if (kLimbs) return of("limbs", dtype_of(Type::i64), limbs_sizes);
    return of(i == 0 ? "squares" : "squared_errors", dtype_of(Type::f64), blocks.counts);
  }
  std::vector<const TensorInfo*> inputs() const { return given.inputs(); }
  const TensorInfo* in_place() const { return nullptr; }

  void run(const TensorInfo* outs, bool) const {
    const TensorInfo& max_error = outs[kMaxAt];
    const int64_t count = max_error.numel;
    if (count == 0) return;
    static_assert(sizeof(Measured) % 8 == 0, "words");
    const int64_t words = count * int64_t(sizeof(Measured) / 8);
    const Tensor scratch = empty_contiguous(given.x, &words, 1, dtype_of(Type::i64));
    const TensorInfo cleared("scratch", scratch);
    clear(cleared);
    Measured* const measured = reinterpret_cast<Measured*>(cleared.data);
    std::vector<Contiguous> results;  // made before anything is written
    results.reserve(kResults);
    for (int i = 0; i < kResults; ++i) results.emplace_back(outs[i]);
    if (given.x.numel > 0) add_errors(measured, count);
    const auto at = [&](int i) { return results[i].info.data; };
    MeasuredOut out{};
    if (kLimbs) {
      out.digits = reinterpret_cast<int64_t*>(at(0));
    } else {
      out.squares = reinterpret_cast<double*>(at(0));
      out.errors = reinterpret_cast<double*>(at(1));
    }
    out.max_error = reinterpret_cast<float*>(at(kMaxAt));
    out.counts = reinterpret_cast<int64_t*>(at(kMaxAt + 1));
    finish(measured, count, out, given.x);
    for (int i = 0; i < kResults; ++i)
      if (results[i].copy) copy(outs[i], results[i].info);
  }

 private:
  static void check_options(const Tensor& x, int64_t q_min, int64_t q_max, Format format,
                            bool round_first) {
    check_real(TensorInfo("x", x));
    check_q_range(q_min, q_max, format);
    check_round_first(round_first, format);
  }

  void add_errors(Measured* measured, int64_t count) const {
    const Converted loaded = loadable(given.x);
    const TensorInfo& x = loaded.info;
    Elementwise e{};
    e.operation = Operation::measure;
    e.format = format;
    e.x = x.data;
    e.x_type = x.kind();
    e.y_type = Type::f32;
    e.steps.round_first = round_first;
    e.q_min = static_cast<int32_t>(q_min);
    e.q_max = static_cast<int32_t>(q_max);
    std::vector<int64_t> strides(blocks.counts.size());
    int64_t stride = count;
    for (size_t d = 0; d < strides.size(); ++d) strides[d] = stride /= blocks.counts[d];
    Axes axes = axes_of(x, nullptr, nullptr);
    axes.add(kState, blocks.counts.data(), strides.data(), blocks.dim(), blocks.sizes.data());
    given.run(e, axes, x, kX, false, Type::f32,
              [&](const Elementwise& call) { quantkit::run(Measure{call, measured}, x); });
  }
};

}  // namespace

void implement_measure(Library& library) {
  using T = const Tensor&;
  using O = const std::optional<Tensor>&;
  using B = const BlockSize&;
  using F = const Text&;
  implement<Errors<false>, T, T, O, int64_t, int64_t, F, B, O, bool, B>(library, "measure");
  implement<Errors<true>, T, T, O, int64_t, int64_t, F, B, O, bool, B>(library, "measure_limbs");
}

}  // namespace quantkit
