/* out = x @ weight.T + bias, summed in float32, the weights stored as float32 or as bf16.
 *
 * Each output is one chain of multiply-adds per 256 inputs, and the chains' results are added in order: the same sum
 * for every number of rows, and a smaller rounding error than one long chain. 256 inputs are also what keeps a
 * block's weights and 8 rows of activations in the L1 cache for long inputs. */
#pragma once
#include "simd.h"

/* Rows that share one read of a chunk, and vectors of their 32 outputs that are widened at a time: what the
 * registers hold. */
#if ISA_AVX512
#define FLOAT_ROWS 8
#define FLOAT_COLUMNS 2
#elif ISA_AVX2 || ISA_DOTPROD
#define FLOAT_ROWS 2
#define FLOAT_COLUMNS 1
#else
#define FLOAT_ROWS 1
#define FLOAT_COLUMNS 1
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

/* acc[rows][32] += one step along k: a float32 input, or a pair. */
INLINE void float_step(const word *weight, const enum operands operands, const word *x, int64_t stride,
                       const int rows, vf (*acc)[NV])
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
    /* The halves of a pair one after the other: the order of a chain is that of its inputs. */
    UNROLL for (int v0 = 0; v0 < NV; v0 += FLOAT_COLUMNS) UNROLL for (int half = 0; half < inputs; half++) {
        vf w[FLOAT_COLUMNS];
        UNROLL for (int v = 0; v < FLOAT_COLUMNS; v++) {
            vi both = *(const vi_any *)(weight + (v0 + v) * VL);
            w[v] = (vf)(inputs == 1 ? both : half ? both & splat_int((int32_t)0xffff0000) : both << 16);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf xr = splat(((const float_word *)x)[r * stride + half]);
            UNROLL for (int v = 0; v < FLOAT_COLUMNS; v++) acc[r][v0 + v] = fma_(xr, w[v], acc[r][v0 + v]);
        }
    }
}

/* sums[rows][32] (+)= x[rows][k] @ one block's chunk. */
INLINE void float_tile(const word *weight, const enum operands operands, const word *x, int64_t stride,
                       int64_t k, const int rows, const int add, const int once, float (*sums)[BLOCK])
{
    vf acc[FLOAT_ROWS][NV];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vf){0};
    const int inputs = operands == F32_F32 ? 1 : 2; /* of a step */
    for (; k >= inputs; k -= inputs, weight += BLOCK, x += operands == BF16_F32 ? 2 : 1) {
        prefetch_weight(weight, once);
        prefetch_weight(weight + 16, once);
        float_step(weight, operands, x, stride, rows, acc);
    }
    if (k) { /* the last of an odd number: its pair ends with a zero, which float32 activations do not have */
        word last[FLOAT_ROWS][2];
        UNROLL for (int r = 0; r < rows; r++) {
            last[r][0] = x[r * stride];
            last[r][1] = 0;
        }
        float_step(weight, operands, last[0], 2, rows, acc);
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++)
    {
        float *s = sums[r] + v * VL;
        store(s, add ? load(s) + acc[r][v] : acc[r][v]);
    }
}

INLINE void float_rows(const word *w, const enum operands operands, const word *x, int64_t stride, int64_t k,
                       int64_t rows, int add, const int once, float (*sums)[BLOCK])
{
#define ROWS(n) case n: float_tile(w, operands, x, stride, k, n, add, once, sums); break
    switch (rows) {
    ROWS(1);
#if FLOAT_ROWS >= 2
    ROWS(2);
#endif
#if FLOAT_ROWS >= 8
    ROWS(3); ROWS(4); ROWS(5); ROWS(6); ROWS(7); ROWS(8);
#endif
    }
#undef ROWS
}

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
                for (int64_t row = 0; row < panel_rows; row += FLOAT_ROWS) {
                    int64_t rows = panel_rows - row < FLOAT_ROWS ? panel_rows - row : FLOAT_ROWS;
                    const word *wc = w + chunk / inputs * BLOCK;
                    const word *x = (const word *)a->x + (panel + row) * stride + chunk / per_word;
                    if (a->m <= FLOAT_ROWS)
                        float_rows(wc, operands, x, stride, k, rows, chunk > 0, 1, sums + row);
                    else
                        float_rows(wc, operands, x, stride, k, rows, chunk > 0, 0, sums + row);
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
