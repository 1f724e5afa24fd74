// What the parts of the stand-in share.
#pragma once
#include <cstddef>
#include <cstdlib>

#define PUBLIC extern "C" __attribute__((visibility("default")))

// The card, by environment variables; see ../README.md.
inline const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}
inline int capability() { return atoi(setting("PRETEND_SM", "90")); }  // 75, 80, 89, 90
inline int device_count() { return atoi(setting("PRETEND_N", "1")); }
inline size_t total_memory() { return size_t(atof(setting("PRETEND_GB", "80")) * 1e9); }
inline int driver_version() { return atoi(setting("PRETEND_DRIVER", "13000")); }  // below 13000: too old for this CUDA
