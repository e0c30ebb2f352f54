// Calls quantkit's operators through torch's dispatcher, without Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <iostream>
#include <optional>
#include <tuple>

namespace {

using Quantize = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                            at::ScalarType);
using ChooseQparams = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, at::OptionalIntArrayRef, int64_t,
                                                         int64_t, double, bool, bool);
using Dequantize = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&);
// SymInt[]? stands for block_size and index. Keyword arguments follow the others.
using Sizes = at::OptionalSymIntArrayRef;
using QuantizeFormat = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t,
                                  int64_t, c10::string_view, Sizes, const std::optional<at::Tensor>&,
                                  const std::optional<at::Tensor>&, Sizes, bool);

template <class Signature>
auto find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

}  // namespace

int main() {
  static const auto choose_qparams = find<ChooseQparams>("quantkit::choose_qparams");
  static const auto quantize = find<Quantize>("quantkit::quantize");
  static const auto dequantize = find<Dequantize>("quantkit::dequantize");

  const torch::NoGradGuard no_gradients;
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({64, 256});
  const std::vector<int64_t> per_channel = {1, -1};
  const auto [scale, zero_point] = choose_qparams.call(x, per_channel, -128, 127, 1e-8, true, false);
  const at::Tensor q = quantize.call(x, scale, zero_point, -128, 127, at::kChar);
  const at::Tensor x_hat = dequantize.call(q, scale, zero_point);

  // The formula, spelled out.
  const at::Tensor codes = (x / scale + zero_point).round().clamp(-128, 127).to(at::kChar);
  if (!q.equal(codes) || !x_hat.equal((q.to(at::kFloat) - zero_point) * scale)) {
    std::cerr << "the operators and the formula differ\n";
    return 1;
  }
  std::cout << "quantized " << x.numel() << " elements, largest error " << (x_hat - x).abs().max().item<float>()
            << "\n";

  // All formats have the overload "format". Two int4 codes share a byte.
  const auto quantize_format = find<QuantizeFormat>("quantkit::quantize", "format");
  const at::Tensor packed = quantize_format.call(x, scale * (127.0 / 7), std::nullopt, -8, 7, "int4", std::nullopt,
                                                 std::nullopt, std::nullopt, std::nullopt, false);
  std::cout << "int4: " << packed.sizes() << " " << packed.dtype() << "\n";

  try {
    quantize.call(x, scale, zero_point, 5, 3, at::kChar);
  } catch (const std::exception& error) {
    std::cout << "refused: " << std::string(error.what()).substr(0, 60) << "\n";
    return 0;
  }
  std::cerr << "q_min above q_max was taken\n";
  return 1;
}
