// The CUDA runtime, pretended: device memory is host memory, copies are made, kernels do nothing and are counted by name.
// Preloaded, it takes the place of the static runtime's calls into libcudart that PyTorch's own libraries make.
// Signatures are those of cuda_runtime_api.h with every handle as void* and every enum as int.
#include "pretended.h"

#include <driver_types.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using Guard = std::lock_guard<std::recursive_mutex>;
using Counts = std::map<std::string, long>;
using OnWait = void (*)(const char* what, size_t bytes);

static std::recursive_mutex mutex;
static std::unordered_map<const void*, std::string> kernel_names;  // host stub -> mangled name
static std::unordered_map<const void*, size_t> variable_sizes;
static Counts calls, kernels;
static long launches = 0;
static OnWait on_wait = nullptr;
static thread_local int current_device = 0;

static const int ok = cudaSuccess, limit = cudaErrorMemoryAllocation, too_old = cudaErrorInsufficientDriver;
static const size_t small = 2u << 20;  // allocations up to this size begin as ones, copies on the device up to half of it are really made

static int counted(const char* call) {
  Guard guard(mutex);
  calls[call]++;
  return ok;
}

// A stream that is being captured as a graph. While one is, a thread that has not relaxed its rules may not wait for the device.
static std::atomic<void*> captured_stream{nullptr};
static std::atomic<bool> capture_lost{false};
static std::atomic<size_t> captures{0}, nodes{0};
static thread_local int capture_mode = cudaStreamCaptureModeGlobal;

// What the host waits for, or copies to or from it: told to Python, which knows the line.
static int told(const char* call, size_t bytes = 0) {
  counted(call);
  if (on_wait) on_wait(call, bytes);
  if (!captured_stream || capture_mode == cudaStreamCaptureModeRelaxed) return ok;
  capture_lost = true;
  return cudaErrorStreamCaptureUnsupported;
}

static int launched(const void* stub, const char* name = "unknown kernel") {
  Guard guard(mutex);
  auto found = kernel_names.find(stub);
  launches++;
  if (captured_stream) nodes++;
  kernels[found == kernel_names.end() ? name : found->second]++;
  return ok;
}

// A kernel started on another stream than the one that is captured would be no part of the graph.
static int launched_on(void* stream, const void* stub) {
  if (captured_stream && stream != captured_stream) return told("a kernel beside the capture");
  return launched(stub);
}

// ---- For the tests, by ctypes

PUBLIC void pretended_reset() {
  Guard guard(mutex);
  calls.clear();
  kernels.clear();
  launches = 0;
}
PUBLIC void pretended_launch(const char* name) { launched(nullptr, name); }  // cublas.cpp and driver.cpp count here
PUBLIC long pretended_launches() { return launches; }
PUBLIC void pretended_on_wait(OnWait act) { on_wait = act; }
PUBLIC const char* pretended_counts(int of_kernels) {  // lines of "count TAB name"
  static std::string text;
  Guard guard(mutex);
  text.clear();
  for (auto& [name, count] : of_kernels ? kernels : calls) text += std::to_string(count) + "\t" + name + "\n";
  return text.c_str();
}

// ---- Registration of kernels, and their launches

PUBLIC void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
PUBLIC void __cudaRegisterFatBinaryEnd(void**) {}
PUBLIC void __cudaUnregisterFatBinary(void**) {}
PUBLIC void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Guard guard(mutex);
  kernel_names[stub] = name;
}
PUBLIC void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t size, int, int) {
  Guard guard(mutex);
  variable_sizes[variable] = size;
}

struct Launch { dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Launch> pushed;  // by the <<<...>>> of a launch, popped by its stub

PUBLIC unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
PUBLIC int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Launch last = pushed.back();
  pushed.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *(void**)stream = last.stream;
  return ok;
}
PUBLIC int __cudaGetKernel(void** kernel, const void* stub) { *kernel = (void*)stub; return ok; }
PUBLIC int __cudaLaunchKernel(void* stub, dim3, dim3, void**, size_t, void* stream) { return launched_on(stream, stub); }
PUBLIC int cudaLaunchKernel(const void* stub, dim3, dim3, void**, size_t, void* stream) { return launched_on(stream, stub); }
PUBLIC int cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* stub, void**) { return launched_on(how->stream, stub); }
PUBLIC int cudaLaunchHostFunc(void*, void (*act)(void*), void* data) { act(data); return ok; }
PUBLIC int cudaStreamAddCallback(void* stream, void (*act)(void*, int, void*), void* data, unsigned) { act(stream, 0, data); return ok; }

// ---- Devices

static const char* default_name() {
  switch (capability()) {
    case 75: return "Tesla T4";
    case 80: return "NVIDIA A100-SXM4-80GB";
    case 89: return "NVIDIA GeForce RTX 4070";
    case 90: return "NVIDIA H100 80GB HBM3";
    default: return "Pretended GPU";
  }
}

PUBLIC int cudaGetDeviceCount(int* count) {
  *count = driver_version() < 13000 ? 0 : device_count();
  return driver_version() < 13000 ? too_old : ok;
}
PUBLIC int cudaGetDevice(int* device) { *device = current_device; return ok; }
PUBLIC int cudaSetDevice(int device) { current_device = device; return ok; }
PUBLIC int cudaDriverGetVersion(int* version) { *version = driver_version(); return ok; }
PUBLIC int cudaRuntimeGetVersion(int* version) { *version = 13000; return ok; }
PUBLIC int cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  const int sm = capability();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", setting("PRETEND_NAME", default_name()));
  p->major = sm / 10, p->minor = sm % 10, p->pciBusID = device + 1, p->totalGlobalMem = total_memory();
  p->multiProcessorCount = sm == 90 ? 132 : sm == 89 ? 46 : sm == 75 ? 40 : 108;
  p->warpSize = 32, p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = sm == 75 ? 1024 : sm == 89 ? 1536 : 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->totalConstMem = 65536, p->textureAlignment = 512;
  p->sharedMemPerBlock = 49152, p->sharedMemPerMultiprocessor = 228 << 10;
  p->sharedMemPerBlockOptin = sm >= 90 ? 232448 : sm == 80 ? 166912 : sm == 75 ? 65536 : 101376;
  p->l2CacheSize = 50 << 20, p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->memoryPoolsSupported = 1;
  p->cooperativeLaunch = 1, p->clusterLaunch = sm >= 90;
  return ok;
}
PUBLIC int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrClockRate: *value = 1500000; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return ok;
}
PUBLIC int cudaDeviceGetPCIBusId(char* id, int size, int device) { snprintf(id, size, "0000:%02x:00.0", device + 1); return ok; }
PUBLIC int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return ok;
}
PUBLIC int cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return ok; }
PUBLIC int cudaDeviceEnablePeerAccess(int, unsigned) { return ok; }
PUBLIC int cudaDeviceSynchronize() { return told("cudaDeviceSynchronize"); }
PUBLIC int cudaGetLastError() { return ok; }
PUBLIC int cudaPeekAtLastError() { return ok; }
PUBLIC int cudaProfilerStart() { return ok; }
PUBLIC int cudaProfilerStop() { return ok; }

// ---- Properties of kernels

PUBLIC int cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->binaryVersion = a->ptxVersion = capability() == 89 ? 86 : capability();  // the wheel runs sm_86's code there
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 232448;
  return ok;
}
PUBLIC int cudaFuncSetAttribute(const void*, int, int) { return ok; }
PUBLIC int cudaKernelSetAttributeForDevice(void*, int, int, int) { return ok; }
PUBLIC int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t, unsigned) {
  const int most = 2048 / (threads > 0 ? threads : 1);
  *blocks = most < 1 ? 1 : most > 16 ? 16 : most;
  return ok;
}
PUBLIC int cudaGetSymbolAddress(void** address, const void* symbol) {
  auto found = variable_sizes.find(symbol);
  *address = calloc(1, found == variable_sizes.end() || !found->second ? 4096 : found->second);
  return ok;
}
PUBLIC int cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, int) { return ok; }

// ---- Memory

static std::map<void*, size_t> blocks;
static size_t in_use = 0;

static bool on_device(const void* p) {
  Guard guard(mutex);
  auto after = blocks.upper_bound((void*)p);
  return after != blocks.begin() && (--after, (char*)p < (char*)after->first + after->second);
}
static void* pages(size_t bytes, int access) {
  void* p = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
// Small tensors begin as ones, not zeros: counts that are read back and divided by, and token ids that are none of <pad>, are common.
static void fill(void* p, size_t bytes) {
  if (bytes <= small) for (size_t i = 0; i < bytes / 8; i++) ((int64_t*)p)[i] = 1;
}

PUBLIC int cudaMalloc(void** p, size_t bytes) {
  Guard guard(mutex);
  *p = in_use + bytes > total_memory() ? nullptr : pages(bytes, PROT_READ | PROT_WRITE);
  if (!*p) return limit;
  fill(*p, bytes);
  blocks[*p] = bytes, in_use += bytes;
  return counted("cudaMalloc");
}
PUBLIC int cudaFree(void* p) {
  Guard guard(mutex);
  auto found = blocks.find(p);
  if (found == blocks.end()) return ok;
  munmap(p, found->second), in_use -= found->second, blocks.erase(found);
  return counted("cudaFree");
}
PUBLIC int cudaMallocAsync(void** p, size_t bytes, void*) { return cudaMalloc(p, bytes); }
PUBLIC int cudaFreeAsync(void* p, void*) { return cudaFree(p); }
PUBLIC int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  const size_t others = size_t(atof(setting("PRETEND_USED_GB", "0")) * 1e9);  // by other programs
  *total = total_memory(), *free_bytes = *total - in_use - others;
  return ok;
}
PUBLIC int cudaHostAlloc(void** p, size_t bytes, unsigned) { *p = calloc(1, bytes); return counted("cudaHostAlloc"); }
PUBLIC int cudaFreeHost(void* p) { free(p); return ok; }
PUBLIC int cudaHostRegister(void*, size_t, unsigned) { return ok; }
PUBLIC int cudaHostUnregister(void*) { return ok; }

static int copied(void* to, const void* from, size_t bytes) {
  const bool down = on_device(to), up = on_device(from);
  if (!(down && up) || bytes <= small / 2) memcpy(to, from, bytes);
  if (down && up) return launched(nullptr, "memcpy, device to device");
  return told(down ? "copy to the device" : up ? "copy to the host" : "copy on the host", bytes);
}
PUBLIC int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) { return copied(to, from, bytes); }
PUBLIC int cudaMemcpy(void* to, const void* from, size_t bytes, int) { return copied(to, from, bytes); }
PUBLIC int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void*) { return copied(to, from, bytes); }
PUBLIC int cudaMemsetAsync(void* p, int value, size_t bytes, void*) {
  if (bytes <= small / 2) memset(p, value, bytes);
  return launched(nullptr, "memset");
}
PUBLIC int cudaMemset(void* p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }
PUBLIC int cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (a->type == cudaMemoryTypeDevice) a->devicePointer = (void*)p;
  return ok;
}

// ---- Streams and events: everything is done at once, in the order of the calls

static std::atomic<long> next_handle{0x1000};

PUBLIC int cudaStreamCreate(void** stream) { *stream = (void*)(next_handle += 16); return ok; }
PUBLIC int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
PUBLIC int cudaStreamCreateWithPriority(void** stream, unsigned, int) { return cudaStreamCreate(stream); }
PUBLIC int cudaStreamDestroy(void*) { return ok; }
PUBLIC int cudaStreamGetPriority(void*, int* priority) { *priority = 0; return ok; }
PUBLIC int cudaStreamIsCapturing(void* stream, int* status) {
  *status = stream && stream == captured_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return ok;
}
PUBLIC int cudaStreamGetCaptureInfo(void* stream, int* status, unsigned long long* id, void*, void*, void*, size_t*) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = captures;
  return ok;
}
PUBLIC int cudaStreamBeginCapture(void* stream, int) {
  if (captured_stream || !stream) return cudaErrorStreamCaptureUnsupported;
  captures++, nodes = 0, capture_lost = false, captured_stream = stream;
  return ok;
}
PUBLIC int cudaStreamEndCapture(void*, void** graph) {
  captured_stream = nullptr;
  *graph = capture_lost ? nullptr : (void*)captures.load();
  return capture_lost ? cudaErrorStreamCaptureInvalidated : ok;
}
PUBLIC int cudaGraphGetNodes(void*, void*, size_t* count) { *count = nodes; return ok; }
PUBLIC int cudaGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) { *ready = graph; return ok; }
PUBLIC int cudaGraphLaunch(void*, void*) { return launched(nullptr, "a graph"); }
PUBLIC int cudaGraphDestroy(void*) { return ok; }
PUBLIC int cudaGraphExecDestroy(void*) { return ok; }
PUBLIC int cudaStreamQuery(void*) { return ok; }
PUBLIC int cudaStreamSynchronize(void*) { return told("cudaStreamSynchronize"); }
PUBLIC int cudaStreamWaitEvent(void*, void*, unsigned) { return counted("cudaStreamWaitEvent"); }
PUBLIC int cudaThreadExchangeStreamCaptureMode(int* mode) { std::swap(*mode, capture_mode); return ok; }
PUBLIC int cudaEventCreate(void** event) { *event = (void*)(next_handle += 16); return ok; }
PUBLIC int cudaEventCreateWithFlags(void** event, unsigned) { return cudaEventCreate(event); }
PUBLIC int cudaEventDestroy(void*) { return ok; }
PUBLIC int cudaEventQuery(void*) { return ok; }
PUBLIC int cudaEventRecord(void*, void*) { return counted("cudaEventRecord"); }
PUBLIC int cudaEventRecordWithFlags(void*, void*, unsigned) { return counted("cudaEventRecord"); }
PUBLIC int cudaEventSynchronize(void*) { return told("cudaEventSynchronize"); }
PUBLIC int cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1.0f; return ok; }

// ---- The driver's entry points that PyTorch asks the runtime for: virtual memory, for expandable segments

static std::map<uint64_t, size_t> physical;  // handle -> bytes

static int granularity(size_t* bytes, const void*, int) { *bytes = small; return ok; }
static int reserve(uint64_t* p, size_t bytes, size_t, uint64_t, unsigned long long) {
  Guard guard(mutex);
  *p = (uint64_t)pages(bytes, PROT_NONE);
  if (!*p) return limit;
  blocks[(void*)*p] = bytes;
  return ok;
}
static int create(uint64_t* handle, size_t bytes, const void*, unsigned long long) {
  Guard guard(mutex);
  if (in_use + bytes > total_memory()) return limit;
  *handle = (next_handle += 16), physical[*handle] = bytes, in_use += bytes;
  return counted("cuMemCreate");
}
static int map_pages(uint64_t p, size_t bytes, size_t, uint64_t, unsigned long long) {
  if (mprotect((void*)p, bytes, PROT_READ | PROT_WRITE)) return 1;
  fill((void*)p, bytes);
  return ok;
}
static int unmap_pages(uint64_t p, size_t bytes) {
  madvise((void*)p, bytes, MADV_DONTNEED);
  return mprotect((void*)p, bytes, PROT_NONE);
}
static int release(uint64_t handle) {
  Guard guard(mutex);
  in_use -= physical[handle], physical.erase(handle);
  return ok;
}
static int give_back(uint64_t p, size_t bytes) {
  Guard guard(mutex);
  blocks.erase((void*)p), munmap((void*)p, bytes);
  return ok;
}
static int nothing() { return ok; }
static int not_supported() { return 801; }
static int same_device(int* device, int ordinal) { *device = ordinal; return ok; }
static int no_attribute(int* value, int, int) { *value = 0; return ok; }
static int context_state(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return ok;
}
static int current_context(void** context) { *context = (void*)0x10; return ok; }

PUBLIC int cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long, int* status) {
  static const std::map<std::string, void*> known = {
      {"cuMemGetAllocationGranularity", (void*)granularity}, {"cuMemAddressReserve", (void*)reserve}, {"cuMemCreate", (void*)create},
      {"cuMemMap", (void*)map_pages}, {"cuMemUnmap", (void*)unmap_pages}, {"cuMemRelease", (void*)release},
      {"cuMemAddressFree", (void*)give_back}, {"cuMemSetAccess", (void*)nothing}, {"cuDeviceGet", (void*)same_device},
      {"cuDeviceGetAttribute", (void*)no_attribute}, {"cuDevicePrimaryCtxGetState", (void*)context_state},
      {"cuCtxGetCurrent", (void*)current_context}};
  auto found = known.find(name);
  const bool virtual_memory = !strncmp(name, "cuMem", 5) || !strncmp(name, "cuMulticast", 11);
  *entry = found != known.end() ? found->second : virtual_memory ? (void*)not_supported : (void*)nothing;
  if (status) *status = 0;
  return ok;
}
