#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#error "The compiled kernels are written for x86-64 and GCC. Without them fastcls runs PyTorch's operators."
#endif

#define EXPORT __attribute__((visibility("default")))

/* What the Python side asks before it calls anything: the layout of the structures, and what this CPU can run. */
EXPORT int32_t fastcls_interface(void) { return 2; }

EXPORT int32_t fastcls_runs_here(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

EXPORT int32_t fastcls_has_bfloat16(void) { return __builtin_cpu_supports("avx512bf16"); }
