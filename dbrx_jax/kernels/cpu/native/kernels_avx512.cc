#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define DBRX_LANES 16
namespace dbrx {
namespace {
#include "common.h"
#include "float32.h"
#include "matmul.h"
}  // namespace
const Kernels kAvx512 = kKernels;
}  // namespace dbrx
#endif
