// The refusals of the contract, in the words of quantkit/_checks.py. Thrown before anything is written, as
// std::runtime_error, since torch 2.15 makes a RuntimeError of every other kind too.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor.h"

namespace quantkit {

using BlockSize = std::optional<std::vector<int64_t>>;

void check_real(const View& t);
void check_q_range(int64_t q_min, int64_t q_max, int32_t dtype);
void check_parameters(const View& x, const View& scale, const View& zero_point);
void check_choice(const View& x, const BlockSize& block_size, double eps, bool symmetric,
                  bool include_zero);
void check_gradient(const View& grad, const View& x);

// An `out=` tensor against the result it is to hold.
void check_out(const View& out, const int64_t* sizes, int64_t dim, int32_t dtype, const View& like);
// No output shares memory with itself, another output or an input; in_place may be one of the inputs
// and be an output, element on element. Then autograd is told that the outputs will be written.
void claim_outs(const std::vector<const View*>& outs, const std::vector<const View*>& inputs,
                const View* in_place = nullptr);

}  // namespace quantkit
