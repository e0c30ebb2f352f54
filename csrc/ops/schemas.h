// The schema of every operator; quantkit/operators.py has the same ones, and a test compares them.
#pragma once

namespace quantkit {

constexpr const char* kSchemas[] = {
    "choose_qparams(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool symmetric, "
    "bool include_zero=False) -> (Tensor, Tensor)",
    "choose_qparams.out(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, bool include_zero=False, *, Tensor(a!) scale, Tensor(b!) zero_point) -> ()",

    "quantize(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max, ScalarType dtype) "
    "-> Tensor",
    "quantize.out(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max, ScalarType "
    "dtype, *, Tensor(a!) out) -> ()",

    "dequantize(Tensor q, Tensor scale, Tensor zero_point) -> Tensor",
    "dequantize.out(Tensor q, Tensor scale, Tensor zero_point, *, Tensor(a!) out) -> ()",

    "dynamic_quantize(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, ScalarType dtype, bool include_zero=False) -> (Tensor, Tensor, Tensor)",
    "dynamic_quantize.out(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, ScalarType dtype, bool include_zero=False, *, Tensor(a!) q, Tensor(b!) scale, "
    "Tensor(c!) zero_point) -> ()",

    "quantize_dequantize(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, ScalarType dtype, bool include_zero=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "quantize_dequantize.out(Tensor x, int[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, ScalarType dtype, bool include_zero=False, *, Tensor(a!) q, Tensor(b!) x_hat, "
    "Tensor(c!) scale, Tensor(d!) zero_point) -> ()",

    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max) -> Tensor",
    "fake_quantize.out(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max, *, "
    "Tensor(a!) out) -> ()",

    // The same without a gradient (autograd costs every call), with the mask of its gradient, and
    // the gradient.
    "_fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max) -> Tensor",
    "_fake_quantize.out(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max, *, "
    "Tensor(a!) out) -> ()",
    "_fake_quantize_masked(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max) -> "
    "(Tensor, Tensor)",
    "_fake_quantize_masked.out(Tensor x, Tensor scale, Tensor zero_point, int q_min, int q_max, "
    "*, Tensor(a!) out, Tensor(b!) mask) -> ()",
    "_masked_gradient(Tensor grad, Tensor mask) -> Tensor",
    "_masked_gradient.out(Tensor grad, Tensor mask, *, Tensor(a!) out) -> ()",

    // Contract 2: codes of any format, by float32 steps.
    "choose_qparams.format(Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, bool "
    "symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, str? "
    "scale_rule=None, Tensor? global_scale=None) -> (Tensor, Tensor)",
    "choose_qparams.format_out(Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, "
    "bool symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, str? "
    "scale_rule=None, Tensor? global_scale=None, Tensor(a!) scale, Tensor(b!) zero_point) -> ()",

    "quantize.format(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str "
    "format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False) -> Tensor",
    "quantize.format_out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str "
    "format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False, Tensor(a!) out) -> ()",

    "dequantize.format(Tensor q, Tensor scale, Tensor? zero_point, str format, *, SymInt[]? "
    "block_size=None, Tensor? global_scale=None, ScalarType? output_dtype=None) -> Tensor",
    "dequantize.format_out(Tensor q, Tensor scale, Tensor? zero_point, str format, *, SymInt[]? "
    "block_size=None, Tensor? global_scale=None, ScalarType? output_dtype=None, Tensor(a!) out) "
    "-> ()",

    "dynamic_quantize.format(Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, "
    "bool symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, str? "
    "scale_rule=None, Tensor? global_scale=None, Tensor? seed=None, SymInt[]? index=None, bool "
    "round_first=False) -> (Tensor, Tensor, Tensor)",
    "dynamic_quantize.format_out(Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, "
    "bool symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, str? "
    "scale_rule=None, Tensor? global_scale=None, Tensor? seed=None, SymInt[]? index=None, bool "
    "round_first=False, Tensor(a!) q, Tensor(b!) scale, Tensor(c!) zero_point) -> ()",

    "quantize_dequantize.format(Tensor x, SymInt[]? block_size, int q_min, int q_max, float eps, "
    "bool symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, str? "
    "scale_rule=None, Tensor? global_scale=None, Tensor? seed=None, SymInt[]? index=None, bool "
    "round_first=False, ScalarType? output_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "quantize_dequantize.format_out(Tensor x, SymInt[]? block_size, int q_min, int q_max, float "
    "eps, bool symmetric, str format, *, bool include_zero=False, ScalarType? scale_dtype=None, "
    "str? scale_rule=None, Tensor? global_scale=None, Tensor? seed=None, SymInt[]? index=None, "
    "bool round_first=False, ScalarType? output_dtype=None, Tensor(a!) q, Tensor(b!) x_hat, "
    "Tensor(c!) scale, Tensor(d!) zero_point) -> ()",

    "fake_quantize.format(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str "
    "format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False) -> Tensor",
    "fake_quantize.format_out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, "
    "str format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False, Tensor(a!) out) -> ()",
    "_fake_quantize.format(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str "
    "format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False) -> Tensor",
    "_fake_quantize.format_out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, "
    "str format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? seed=None, "
    "SymInt[]? index=None, bool round_first=False, Tensor(a!) out) -> ()",
    "_fake_quantize_masked.format(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int "
    "q_max, str format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? "
    "seed=None, SymInt[]? index=None, bool round_first=False) -> (Tensor, Tensor)",
    "_fake_quantize_masked.format_out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int "
    "q_max, str format, *, SymInt[]? block_size=None, Tensor? global_scale=None, Tensor? "
    "seed=None, SymInt[]? index=None, bool round_first=False, Tensor(a!) out, Tensor(b!) mask) -> "
    "()",

    "aminmax(Tensor x, SymInt[]? block_size) -> (Tensor, Tensor)",
    "aminmax.out(Tensor x, SymInt[]? block_size, *, Tensor(a!) min, Tensor(b!) max) -> ()",
    // Exact sums of errors.
    "measure(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str format, *, "
    "SymInt[]? block_size=None, Tensor? global_scale=None, bool round_first=False, SymInt[]? "
    "over=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "measure.out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str format, *, "
    "SymInt[]? block_size=None, Tensor? global_scale=None, bool round_first=False, SymInt[]? "
    "over=None, Tensor(a!) squares, Tensor(b!) squared_errors, Tensor(c!) max_error, Tensor(d!) "
    "counts) -> ()",
    "measure_limbs(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str format, "
    "*, SymInt[]? block_size=None, Tensor? global_scale=None, bool round_first=False, SymInt[]? "
    "over=None) -> (Tensor, Tensor, Tensor)",
    "measure_limbs.out(Tensor x, Tensor scale, Tensor? zero_point, int q_min, int q_max, str "
    "format, *, SymInt[]? block_size=None, Tensor? global_scale=None, bool round_first=False, "
    "SymInt[]? over=None, Tensor(a!) limbs, Tensor(b!) max_error, Tensor(c!) counts) -> ()",

    "linear_w8a8(Tensor x, Tensor q, Tensor scale, Tensor? bias=None) -> Tensor",
    "linear_w8a8.out(Tensor x, Tensor q, Tensor scale, Tensor? bias=None, *, Tensor(a!) out) -> ()",

    // Programs exported by contract 1 hold it: the gradient from x and the parameters.
    "_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int q_min, "
    "int q_max) -> Tensor",
    "_fake_quantize_backward.out(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int "
    "q_min, int q_max, *, Tensor(a!) out) -> ()",
};

}  // namespace quantkit
