#include "kernels.h"
#define DBRX_LANES 8
namespace dbrx {
namespace {
#include "common.h"
#include "float32.h"
#include "matmul.h"
}  // namespace
const Kernels kPortable = kKernels;
}  // namespace dbrx
