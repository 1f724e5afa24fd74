// libcuda.so.1, pretended: what Triton's launcher and PyTorch's lazily loaded driver calls ask for. Triton's kernels are compiled for real,
// loaded as nothing and counted by name.
#include "pretended.h"

#include <dlfcn.h>
#include <cstdio>

template <class F> static F of_runtime(const char* name) { return (F)dlsym(RTLD_DEFAULT, name); }

static int counted(void* kernel) {
  static auto count = of_runtime<void (*)(const char*)>("pretended_launch");
  if (count) count((const char*)kernel);
  return 0;
}

PUBLIC int cuInit(unsigned) { return driver_version() < 13000 ? 803 : 0; }
PUBLIC int cuDriverGetVersion(int* version) { *version = driver_version(); return 0; }
PUBLIC int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
PUBLIC int cuDeviceGetCount(int* count) { *count = device_count(); return 0; }
PUBLIC int cuDeviceGetAttribute(int* value, int attribute, int device) {
  static auto ask = of_runtime<int (*)(int*, int, int)>("cudaDeviceGetAttribute");
  *value = 0;
  return ask ? ask(value, attribute, device) : 0;
}
PUBLIC int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
PUBLIC int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)0x10; return 0; }
PUBLIC int cuCtxGetCurrent(void** context) { *context = (void*)0x10; return 0; }
PUBLIC int cuCtxGetLimit(size_t* value, int) { *value = 1024; return 0; }
PUBLIC int cuPointerGetAttribute(void* value, int, unsigned long long p) { *(unsigned long long*)value = p; return 0; }

static char kernels[65536][96];  // a kernel's handle is its name
PUBLIC int cuModuleLoadData(void** module, const void*) { *module = (void*)0x100; return 0; }
PUBLIC int cuModuleGetFunction(void** kernel, void*, const char* name) {
  static int next = 0;
  snprintf(kernels[next], sizeof kernels[next], "triton %s", name);
  *kernel = kernels[next];
  next = (next + 1) % 65536;
  return 0;
}
PUBLIC int cuFuncGetAttribute(int* value, int attribute, void*) { *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; return 0; }
PUBLIC int cuLaunchKernel(void* kernel, ...) { return counted(kernel); }
PUBLIC int cuLaunchKernelEx(const void*, void* kernel, void**, void**) { return counted(kernel); }

#define IGNORED(name) PUBLIC int name(...) { return 0; }
IGNORED(cuCtxGetDevice)
IGNORED(cuCtxPushCurrent_v2)
IGNORED(cuCtxSetCurrent)
IGNORED(cuCtxSetLimit)
IGNORED(cuCtxSynchronize)
IGNORED(cuFuncGetModule)
IGNORED(cuFuncSetAttribute)
IGNORED(cuFuncSetCacheConfig)
IGNORED(cuGetErrorString)
IGNORED(cuLaunchCooperativeKernel)
IGNORED(cuLibraryGetKernel)
IGNORED(cuLibraryLoadData)
IGNORED(cuLinkAddData_v2)
IGNORED(cuLinkComplete)
IGNORED(cuLinkCreate_v2)
IGNORED(cuMemAlloc_v2)
IGNORED(cuMemFree_v2)
IGNORED(cuMemcpyDtoH_v2)
IGNORED(cuMemcpyHtoD_v2)
IGNORED(cuModuleLoad)
IGNORED(cuModuleLoadDataEx)
IGNORED(cuModuleUnload)
IGNORED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
IGNORED(cuOccupancyMaxActiveClusters)
IGNORED(cuStreamGetCtx)
IGNORED(cuStreamSynchronize)
IGNORED(cuTensorMapEncodeIm2col)
IGNORED(cuTensorMapEncodeIm2colWide)
IGNORED(cuTensorMapEncodeTiled)
