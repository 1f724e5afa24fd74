// libnvidia-ml.so.1, pretended: it counts the devices and knows nothing of what else runs on them.
#include "pretended.h"

PUBLIC int nvmlInit() { return 0; }
PUBLIC int nvmlInit_v2() { return 0; }
PUBLIC int nvmlShutdown() { return 0; }
PUBLIC int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = driver_version(); return 0; }
PUBLIC int nvmlDeviceGetCount_v2(int* count) { *count = device_count(); return 0; }
PUBLIC int nvmlDeviceGetHandleByIndex_v2(unsigned, void** handle) { *handle = (void*)0x20; return 0; }
PUBLIC int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** handle) { *handle = (void*)0x20; return 0; }
PUBLIC int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { *count = 0; return 0; }
PUBLIC int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return 0; }
PUBLIC int nvmlDeviceGetNvLinkRemoteDeviceType(...) { return 3; }  // not supported
PUBLIC int nvmlDeviceGetNvLinkRemotePciInfo_v2(...) { return 3; }
