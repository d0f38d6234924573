// Interface of the kernels for small batches, which are compiled once for each instruction set (kernels_*.cc).
#pragma once

#include <stdint.h>

namespace dbrx {

enum class Kind { kFloat32, kBfloat16, kInt8, kInt4, kFp8 };
enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// A weight of `outputs` by `inputs` numbers; inputs are summed over. In memory it is (outputs, inputs), or
// (inputs, outputs) for kernels that contract rows. int4 has two inputs in a byte, the first in the low bits.
struct Weight {
  Kind kind;
  bool scale_is_bfloat16;
  int64_t outputs, inputs;
  int64_t groups;      // of inputs, with a scale for each output; 1: one scale per output
  const void* values;
  const void* scale;   // (outputs, groups), or (groups, outputs); null without scales

  int64_t group() const { return inputs / groups; }
};

constexpr int64_t kColumnAlignment = 32;  // rows of sums that AddRows writes to are padded to a multiple of it

// The kernels of one instruction set. A row's results do not depend on the other rows of a call, nor on how a caller
// cuts outputs into calls.
struct Kernels {
  // Bytes of a row of x as DotRows (contracts_rows false) or AddRows read it.
  int64_t (*prepared_bytes)(const Weight&, bool contracts_rows);
  // Writes a row of x, of inputs numbers, in that form.
  void (*prepare)(const Weight&, bool contracts_rows, const void* x, bool x_is_bfloat16, void* prepared);
  // sums[r][m - first] = x[r] . w[m], scaled, for a weight (outputs, inputs) and outputs first <= m < last.
  void (*dot_rows)(const Weight&, int64_t first, int64_t last, const void* const* x, int64_t rows, float* const* sums);
  // sums[r][m - first] = sum over c of x[r][c] w[c][m], scaled, for a weight (inputs, outputs).
  void (*add_rows)(const Weight&, int64_t first, int64_t last, const void* const* x, int64_t rows, float* const* sums);
  // gate[i] = activation(gate[i]) * up[i]; reads and writes up to the next multiple of kColumnAlignment.
  void (*gate)(Activation, float* gate, const float* up, int64_t count);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
extern const Kernels kAvx512Bfloat16;  // for x in bfloat16, which it multiplies as such, and any weight but float32
#endif

}  // namespace dbrx
