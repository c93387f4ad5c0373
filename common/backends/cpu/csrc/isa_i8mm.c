/* NEON with its products of 2 by 8 by 2 int8 matrices: ARMv8.6 servers (Graviton 3, Grace, Ampere One) and later. */
#include "kernels.h"
#if HAVE_I8MM
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
#define ISA_DOTPROD 1
#define ISA_I8MM 1
#define KERNELS kernels_i8mm
#define ISA_NAME "i8mm"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
