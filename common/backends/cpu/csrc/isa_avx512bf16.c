/* AVX-512 with VNNI and dot products of bf16: server processors since 2020 (Intel) and 2022 (AMD). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif
#define ISA_AVX512 1
#define ISA_AVX512BF16 1
#define KERNELS kernels_avx512bf16
#define ISA_NAME "avx512bf16"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
