/* The kernels for AVX2 and FMA. The pragma comes first: it must hold for all that is included. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA_AVX2 1
#define KERNELS kernels_avx2
#define ISA_NAME "avx2"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
