/* out = x @ weight.T + bias, summed in float32, the weights stored as float32 or as bf16.
 *
 * Each output is one chain of multiply-adds per 256 inputs, and the chains' results are added in order: the same sum
 * for every number of rows, and a smaller rounding error than one long chain. 256 inputs are also what keeps a
 * block's weights and 8 rows of activations in the L1 cache for long inputs. */
#pragma once
#include "simd.h"

/* Rows of a tile, and its vectors of outputs, of which a block of 32 has NV: what the registers hold. Few rows take
 * the whole block, so that enough chains are under way to hide the latency of a multiply-add. */
#if ISA_AVX512
#define FLOAT_ROWS 8
#define FLOAT_COLUMNS(rows) NV
#elif ISA_AVX2
#define FLOAT_ROWS 6
#define FLOAT_COLUMNS(rows) ((rows) <= 3 ? NV : NV / 2)
#define FLOAT_WIDTH 16
#elif ISA_DOTPROD
#define FLOAT_ROWS 6
#define FLOAT_COLUMNS(rows) ((rows) <= 3 ? NV : NV / 2)
#define FLOAT_WIDTH 16
#else
#define FLOAT_ROWS 1
#define FLOAT_COLUMNS(rows) NV
#endif
#ifndef FLOAT_WIDTH
#define FLOAT_WIDTH BLOCK /* outputs that lie together */
#endif
#define FLOAT_PANEL 64
#define FLOAT_CHUNK 256

/* What a product reads: weights and activations in 32-bit words, of one float32 or of a pair of bf16 along k. */
enum operands {
    F32_F32,   /* float32 both */
    BF16_F32,  /* weights in pairs, activations in float32 */
    BF16_BF16, /* pairs both, where there is an instruction for it */
};

typedef int32_t word __attribute__((may_alias));
typedef float float_word __attribute__((may_alias));

/* Vector v of a block's outputs: their float32, or one half of their pairs widened. group: words between two groups
 * of FLOAT_WIDTH outputs. */
INLINE vf float_weight(const word *weight, int64_t group, int v, const enum operands operands, const int half)
{
    vi both = *(const vi_any *)(weight + v * VL / FLOAT_WIDTH * group + v * VL % FLOAT_WIDTH);
    return (vf)(operands == F32_F32 ? both : half ? both & splat_int((int32_t)0xffff0000) : both << 16);
}

/* acc[rows][columns] += one step along k: a float32 input, or a pair. The halves of a pair come one after the other:
 * the order of a chain is that of its inputs. */
INLINE void float_step(const word *weight, int64_t group, const enum operands operands, const word *x, int64_t stride,
                       const int rows, const int columns, vf (*acc)[NV])
{
    const int inputs = operands == F32_F32 ? 1 : 2;
    if (operands == BF16_BF16) {
#if ISA_AVX512BF16
        vi w[NV];
        UNROLL for (int v = 0; v < NV; v++) w[v] = *(const vi_any *)(weight + v * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vi xr = splat_int(x[r * stride]);
            __asm__("" : "+v"(xr)); /* hides the broadcast from clang 16, which crashes on one of bf16 */
            UNROLL for (int v = 0; v < NV; v++)
                acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)w[v], (__m512bh)xr);
        }
#endif
        return;
    }
    if (rows <= 3 && columns > 2) /* the inputs stay in registers, and one vector of weights at a time */
        UNROLL for (int half = 0; half < inputs; half++) {
            vf xr[FLOAT_ROWS];
            UNROLL for (int r = 0; r < rows; r++) xr[r] = splat(((const float_word *)x)[r * stride + half]);
            UNROLL for (int v = 0; v < columns; v++) {
                vf w = float_weight(weight, group, v, operands, half);
                UNROLL for (int r = 0; r < rows; r++) {
                    acc[r][v] = fma_(xr[r], w, acc[r][v]);
                    KEEP(acc[r][v]);
                }
            }
        }
    else /* the weights stay, and one input at a time */
        UNROLL for (int half = 0; half < inputs; half++) {
            vf w[NV];
            UNROLL for (int v = 0; v < columns; v++) w[v] = float_weight(weight, group, v, operands, half);
            UNROLL for (int r = 0; r < rows; r++) {
                vf xr = splat(((const float_word *)x)[r * stride + half]);
                UNROLL for (int v = 0; v < columns; v++) {
                    acc[r][v] = fma_(xr, w[v], acc[r][v]);
                    KEEP(acc[r][v]);
                }
            }
        }
}

/* sums[rows][32] (+)= x[rows][k] @ one block's chunk. */
INLINE void float_tile(const word *weight, int64_t group, const enum operands operands, const word *x, int64_t stride,
                       int64_t k, const int rows, const int add, const int once, float (*sums)[BLOCK])
{
    const int columns = FLOAT_COLUMNS(rows), inputs = operands == F32_F32 ? 1 : 2; /* of a step */
    UNROLL for (int v0 = 0; v0 < NV; v0 += columns) {
        vf acc[FLOAT_ROWS][NV];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++) acc[r][v] = (vf){0};
        const word *w = weight + v0 * VL / FLOAT_WIDTH * group + v0 * VL % FLOAT_WIDTH, *xk = x;
        int64_t left = k;
        for (; left >= inputs; left -= inputs, w += FLOAT_WIDTH, xk += operands == BF16_F32 ? 2 : 1) {
            UNROLL for (int line = 0; line < columns * VL; line += 16)
                prefetch_weight(w + line / FLOAT_WIDTH * group + line % FLOAT_WIDTH, once);
            float_step(w, group, operands, xk, stride, rows, columns, acc);
        }
        if (left) { /* the last of an odd number: its pair ends with a zero, which float32 activations do not have */
            word last[FLOAT_ROWS][2];
            UNROLL for (int r = 0; r < rows; r++) {
                last[r][0] = xk[r * stride];
                last[r][1] = 0;
            }
            float_step(w, group, operands, last[0], 2, rows, columns, acc);
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
        {
            float *s = sums[r] + (v0 + v) * VL;
            store(s, add ? load(s) + acc[r][v] : acc[r][v]);
        }
    }
}

INLINE void float_rows(const word *w, int64_t group, const enum operands operands, const word *x, int64_t stride,
                       int64_t k, int64_t rows, int add, int once, float (*sums)[BLOCK])
{
#define ROWS(n)                                                                \
    case n:                                                                    \
        if (once)                                                              \
            float_tile(w, group, operands, x, stride, k, n, add, 1, sums);     \
        else                                                                   \
            float_tile(w, group, operands, x, stride, k, n, add, 0, sums);     \
        break
    switch (rows) {
    ROWS(1);
#if FLOAT_ROWS >= 6
    ROWS(2); ROWS(3); ROWS(4); ROWS(5); ROWS(6);
#endif
#if FLOAT_ROWS >= 8
    ROWS(7); ROWS(8);
#endif
    }
#undef ROWS
}

/* Functions by themselves: inlined into their loops they find fewer registers. */
#define FLOAT_ROWS_OF(name, operands)                                                                                \
    NOINLINE void name(const word *w, int64_t group, const word *x, int64_t stride, int64_t k, int64_t rows, int add, \
                       int once, float (*sums)[BLOCK])                                                               \
    {                                                                                                                \
        float_rows(w, group, operands, x, stride, k, rows, add, once, sums);                                         \
    }
FLOAT_ROWS_OF(f32_rows, F32_F32)
IN_ORDER FLOAT_ROWS_OF(bf16_rows, BF16_F32)
#if ISA_AVX512BF16
FLOAT_ROWS_OF(rounded_rows, BF16_BF16)
#else
#define rounded_rows bf16_rows
#endif

INLINE void float_linear(const struct float_linear_args *a, const enum operands operands, int thread, int threads)
{
    const int64_t inputs = operands == F32_F32 ? 1 : 2, words = (a->k + inputs - 1) / inputs; /* of an output */
    const int64_t stride = operands == BF16_BF16 ? words : a->k, per_word = operands == BF16_BF16 ? 2 : 1;
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < a->m; panel += FLOAT_PANEL) {
        int64_t panel_rows = a->m - panel < FLOAT_PANEL ? a->m - panel : FLOAT_PANEL;
        for (int64_t block = from; block < to; block++) {
            const word *w = (const word *)a->weight + block * words * BLOCK;
            float sums[FLOAT_PANEL][BLOCK] __attribute__((aligned(64)));
            for (int64_t chunk = 0; chunk < a->k; chunk += FLOAT_CHUNK) {
                int64_t k = a->k - chunk < FLOAT_CHUNK ? a->k - chunk : FLOAT_CHUNK;
                const int64_t tiles = (panel_rows + FLOAT_ROWS - 1) / FLOAT_ROWS;
                for (int64_t tile = 0, row = 0; tile < tiles; tile++, row = panel_rows * tile / tiles) {
                    int64_t rows = panel_rows * (tile + 1) / tiles - row;
                    const word *wc = w + chunk / inputs * FLOAT_WIDTH;
                    const word *x = (const word *)a->x + (panel + row) * stride + chunk / per_word;
                    const int once = tile == 0 && panel + FLOAT_PANEL >= a->m;
                    (operands == F32_F32 ? f32_rows : operands == BF16_F32 ? bf16_rows : rounded_rows)(
                        wc, words * FLOAT_WIDTH, x, stride, k, rows, chunk > 0, once, sums + row);
                }
            }
            int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t row = 0; row < panel_rows; row++)
                for (int64_t j = 0; j < columns; j += VL) {
                    vf y = load(sums[row] + j);
                    if (a->bias)
                        y = y + load_up_to(a->bias + column + j, columns - j);
                    store_up_to(a->out + (panel + row) * a->n + column + j, y, columns - j);
                }
        }
    }
}

static void f32_linear(void *data, int thread, int threads) { float_linear(data, F32_F32, thread, threads); }
static void bf16_linear(void *data, int thread, int threads) { float_linear(data, BF16_F32, thread, threads); }
#if ISA_AVX512BF16
static void rounded_linear(void *data, int thread, int threads) { float_linear(data, BF16_BF16, thread, threads); }
#else
#define rounded_linear bf16_linear /* of inputs that happen to have 8 bits */
#endif
