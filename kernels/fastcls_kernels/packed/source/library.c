#include <cpuid.h>

#include "common.h"

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#error "The compiled kernels are written for x86-64 and GCC. Without them fastcls runs PyTorch's operators."
#endif

/* What the Python side asks before it calls anything: the layout of the structures, and what this CPU can run. */
EXPORT int32_t fastcls_interface(void) { return 4; }

/* One bit of cpuid's leaf 7, which GCC's own names do not all reach. */
static int has(unsigned subleaf, int is_eax, int bit) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) return 0;
  return ((is_eax ? eax : edx) >> bit) & 1;
}

EXPORT int32_t fastcls_has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
EXPORT int32_t fastcls_has_avx512_vnni(void) { return __builtin_cpu_supports("avx512vnni"); }
EXPORT int32_t fastcls_has_avx512_bf16(void) { return __builtin_cpu_supports("avx512bf16"); }
EXPORT int32_t fastcls_has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
EXPORT int32_t fastcls_has_avx_vnni(void) { return has(1, 1, 4); }
EXPORT int32_t fastcls_has_amx_bf16(void) { return has(0, 0, 22); }
