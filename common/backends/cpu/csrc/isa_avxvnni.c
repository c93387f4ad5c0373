/* AVX2 with its 256-bit u8 x s8 dot product (client processors without AVX-512). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif
#define ISA_AVX2 1
#define ISA_AVXVNNI 1
#define KERNELS kernels_avxvnni
#define ISA_NAME "avxvnni"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
