// The errors of the contract, in the words of quantkit/_checks. Thrown before anything is written,
// as std::runtime_error, since torch 2.15 makes a RuntimeError of every other kind too.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor.h"

namespace quantkit {

using BlockSize = std::optional<std::vector<int64_t>>;
// How many blocks of a size a dimension has; the last one may be short.
inline int64_t blocks_in(int64_t size, int64_t block) {
  return block == -1 ? 1 : size / block + (size % block != 0);
}

// ---- values.cpp ---------------------------------------------------------------------------------

void check_real(const TensorInfo& t);
Format check_format(const std::string& name);
// That q may hold codes of the format.
void check_codes(const TensorInfo& q, Format format);
Type check_output_dtype(const std::optional<int32_t>& output_dtype);

// ---- sizes.cpp ----------------------------------------------------------------------------------

// short_blocks: the last block of a dimension may have fewer elements. name: of the argument.
void check_block_sizes(const TensorInfo& x, const std::vector<int64_t>& blocks, bool short_blocks,
                       const std::string& name = "block_size");

// ---- parameters.cpp -----------------------------------------------------------------------------

// The format of codes that contract 1's operators know by a dtype.
Format check_q_range(int64_t q_min, int64_t q_max, int32_t dtype);
void check_q_range(int64_t q_min, int64_t q_max, Format format);
// Whether a scale is one of codes.
bool is_coded(const TensorInfo& scale);
void check_parameters(const TensorInfo& x, const TensorInfo& scale, const TensorInfo& zero_point);
// Of contract 2; zero_point, global: null where there is none.
void check_parameters(const TensorInfo& x, const TensorInfo& scale, const TensorInfo* zero_point,
                      Format format, const BlockSize& block_size, const TensorInfo* global);
// A scale of scales, of these sizes.
void check_global(const TensorInfo& global, const TensorInfo& x, const int64_t* sizes, int64_t dim);

// ---- operators.cpp ------------------------------------------------------------------------------

void check_choice(const TensorInfo& x, const BlockSize& block_size, double eps, bool symmetric,
                  bool include_zero, bool short_blocks);
// That there are blocks, and elements in each, or no block at all.
void check_chosen_blocks(const TensorInfo& x, const BlockSize& block_size, bool short_blocks);
// What random rounding draws from: the seed, and the places of x's elements, a list of an offset and
// a stride for each dimension.
void check_draws(const TensorInfo& x, const std::optional<Tensor>& seed, const BlockSize& index);
// What the rule and the dtype of scales ask for.
struct ScaleChoice {
  bool half_range;
  Rule rule;
  Stored stored;
};
ScaleChoice check_rule(Format format, bool symmetric, double eps,
                       const std::optional<int32_t>& scale_dtype,
                       const std::optional<Text>& scale_rule, bool has_global);
void check_round_first(bool round_first, Format format, bool randomly = false);
// That x's last size fills bytes of codes.
void check_packing(const TensorInfo& x, Format format);
// A gradient of x, or of what had a mask of its shape.
void check_gradient(const TensorInfo& grad, const TensorInfo& x);
void check_mask(const TensorInfo& mask, const TensorInfo& grad);
// A linear layer of int8 codes; bias: null where there is none.
void check_linear(const TensorInfo& x, const TensorInfo& q, const TensorInfo& scale,
                  const TensorInfo* bias);

// ---- outputs.cpp --------------------------------------------------------------------------------

// An `out=` tensor against the result it is to hold.
void check_out(const TensorInfo& out, const int64_t* sizes, int64_t dim, int32_t dtype,
               const TensorInfo& like);
// No output shares memory with itself, another output or an input; in_place may be one of the
// inputs and be an output, element on element. Then autograd is told that the outputs will be
// written.
void claim_outs(const std::vector<const TensorInfo*>& outs,
                const std::vector<const TensorInfo*>& inputs, const TensorInfo* in_place = nullptr);

}  // namespace quantkit
