/* Included last by each isa_*.c: every kernel compiled for that instruction set, and the table of them. */
#include "attention.h"
#include "linear_float.h"
#include "linear_int4.h"
#include "linear_int8.h"
#include "linear_amx.h"
#include "linear_amx_int4.h"
#include "read.h"
#include "rows.h"

const struct kernels KERNELS = {
    ISA_NAME, {INT8_WIDTH, INT8_INPUTS, FLOAT_WIDTH, INT4_INPUTS, INT8_SHIFT}, INT8_WIDENS,
    int8_linear, f32_linear, bf16_linear, rounded_linear, round_bf16, embed_bf16, embed_f32, quantize, norm,
    swiglu, rope, attention, argmax, top_k, read_memory, hadamard,
    digits, int4_linear, int4_inputs, exp_array,
};
