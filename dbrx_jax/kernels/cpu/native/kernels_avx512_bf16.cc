#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define DBRX_LANES 16
namespace dbrx {
namespace {
#include "common.h"
#include "bfloat16.h"
#include "matmul.h"
}  // namespace
const Kernels kAvx512Bfloat16 = kKernels;
}  // namespace dbrx
#endif
