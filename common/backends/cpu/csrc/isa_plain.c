/* The kernels for any machine: 128-bit vectors, which every x86-64 and aarch64 has. */
#define KERNELS kernels_plain
#define ISA_NAME "plain"
#include "kernel_table.h"
