/* AVX-512 with VNNI: server processors since 2019 (Intel) and 2022 (AMD). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define ISA_AVX512 1
#define KERNELS kernels_avx512
#define ISA_NAME "avx512"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
