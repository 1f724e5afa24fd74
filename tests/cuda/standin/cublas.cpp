// cuBLAS and cuBLASLt, pretended: handles are a piece of memory, products are counted and not computed.
#include "pretended.h"

#include <cstdint>
#include <cstring>

extern "C" void pretended_launch(const char* name);

static int piece(void** handle) { *handle = calloc(1, 4096); return 0; }

PUBLIC int cublasCreate_v2(void** handle) { return piece(handle); }
PUBLIC int cublasDestroy_v2(void*) { return 0; }
PUBLIC int cublasSetStream_v2(void*, void*) { return 0; }
PUBLIC int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
PUBLIC int cublasSetMathMode(void* handle, int mode) { *(int*)handle = mode; return 0; }
PUBLIC int cublasGetMathMode(void* handle, int* mode) { *mode = *(int*)handle; return 0; }
PUBLIC int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
PUBLIC int cublasSetPointerMode_v2(void*, int) { return 0; }
PUBLIC int cublasSetSmCountTarget(void*, int) { return 0; }

#define PRODUCT(name) PUBLIC int name(...) { pretended_launch(#name); return 0; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

PUBLIC int cublasLtMatmulDescCreate(void** description, int, int) { return piece(description); }
PUBLIC int cublasLtMatmulDescDestroy(void* description) { free(description); return 0; }
PUBLIC int cublasLtMatmulDescSetAttribute(...) { return 0; }
PUBLIC int cublasLtMatmulPreferenceCreate(void** preference) { return piece(preference); }
PUBLIC int cublasLtMatmulPreferenceDestroy(void* preference) { free(preference); return 0; }
PUBLIC int cublasLtMatmulPreferenceSetAttribute(...) { return 0; }
PUBLIC int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) { return piece(layout); }
PUBLIC int cublasLtMatrixLayoutDestroy(void* layout) { free(layout); return 0; }
PUBLIC int cublasLtMatrixLayoutSetAttribute(...) { return 0; }

struct Heuristic { uint64_t algorithm[8], workspace; int state; float waves; int reserved[4]; };
PUBLIC int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return 0;
}
