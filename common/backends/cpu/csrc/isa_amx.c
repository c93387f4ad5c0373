/* AVX-512 with the tile unit (AMX) for int8 and bf16: Intel's server processors since 2023. */
#include "kernels.h"
#if HAVE_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
#endif
#define ISA_AVX512 1
#define ISA_AVX512BF16 1
#define ISA_AMX 1
#define KERNELS kernels_amx
#define ISA_NAME "amx"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
