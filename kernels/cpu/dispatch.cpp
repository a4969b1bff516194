// The library's entry points: plain C, no Python, no torch. Each call runs the variant for the best instruction
// set that this processor has, or the one asked for.
#include "problem.h"

#define VLM_VARIANT(name)                              \
  namespace name {                                     \
  void run_scan(const VlmScan &, bool, int);           \
  void run_conv(const VlmConv &, bool, int);           \
  }

VLM_VARIANT(portable)
#if defined(__x86_64__)
VLM_VARIANT(v3)
VLM_VARIANT(v4)
#endif

#define VLM_EXPORT __attribute__((visibility("default")))

extern "C" {

// 0 portable, 3 x86-64-v3 (AVX2), 4 x86-64-v4 (AVX-512)
VLM_EXPORT int vlm_best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 3;
#endif
  return 0;
}

VLM_EXPORT int64_t vlm_abi() { return 3; }

VLM_EXPORT void vlm_scan(const VlmScan *p, int level, int backward, int stored) {
#if defined(__x86_64__)
  if (level == 4) return v4::run_scan(*p, backward, stored);
  if (level == 3) return v3::run_scan(*p, backward, stored);
#endif
  portable::run_scan(*p, backward, stored);
}

VLM_EXPORT void vlm_conv2(const VlmConv *p, int level, int backward, int stored) {
#if defined(__x86_64__)
  if (level == 4) return v4::run_conv(*p, backward, stored);
  if (level == 3) return v3::run_conv(*p, backward, stored);
#endif
  portable::run_conv(*p, backward, stored);
}
}
