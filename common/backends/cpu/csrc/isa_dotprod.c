/* NEON with its s8 x s8 dot product: ARMv8.2 servers (Kunpeng 920, Graviton 2, Ampere) and later. */
#include "kernels.h"
#if HAVE_DOTPROD
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define ISA_DOTPROD 1
#define KERNELS kernels_dotprod
#define ISA_NAME "dotprod"
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
