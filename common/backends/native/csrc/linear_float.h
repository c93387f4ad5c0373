/* out = x @ weight.T + bias in float32, the weights stored as float32 or as bf16.
 *
 * Each output is one chain of fused multiply-adds per 256 inputs, and the chains' results are added in order: the
 * same sum for every number of rows, and a smaller rounding error than one long chain. 256 inputs are also what
 * keeps a block's weights and 8 rows of activations in the L1 cache for long inputs. */
#pragma once
#include "simd.h"

#if ISA_AVX512
#define FLOAT_ROWS 8
#elif ISA_AVX2
#define FLOAT_ROWS 2
#else
#define FLOAT_ROWS 1
#endif
#define FLOAT_PANEL 64
#define FLOAT_CHUNK 256

/* sums[rows][32] (+)= x[rows][k] @ one block's chunk. */
INLINE void float_tile(const void *weight, const int bf16, const float *x, int64_t stride, int64_t k, const int rows,
                       const int add, const int once, float (*sums)[BLOCK])
{
    vf acc[FLOAT_ROWS][NV];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vf){0};
    for (int64_t i = 0; i < k; i++) {
        vf w[NV];
        if (bf16) {
            const int32_t *pairs = (const int32_t *)weight + i * (BLOCK / 2);
            prefetch_weight(pairs, once);
            UNROLL for (int v = 0; v < NV / 2; v++) {
                vi both = *(const vi_any *)(pairs + v * VL);
                w[v] = (vf)(both << 16);
                w[v + NV / 2] = (vf)(both & splat_int((int32_t)0xffff0000));
            }
        } else {
            const float *p = (const float *)weight + i * BLOCK;
            prefetch_weight(p, once);
            prefetch_weight(p + 16, once);
            UNROLL for (int v = 0; v < NV; v++) w[v] = load(p + v * VL);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf xr = splat(x[r * stride + i]);
            UNROLL for (int v = 0; v < NV; v++) acc[r][v] = fma_(xr, w[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++)
    {
        float *s = sums[r] + v * VL;
        store(s, add ? load(s) + acc[r][v] : acc[r][v]);
    }
}

INLINE void float_rows(const void *w, const int bf16, const float *x, int64_t stride, int64_t k, int64_t rows,
                       int add, const int once, float (*sums)[BLOCK])
{
    switch (rows) {
    case 1: float_tile(w, bf16, x, stride, k, 1, add, once, sums); break;
#if FLOAT_ROWS >= 2
    case 2: float_tile(w, bf16, x, stride, k, 2, add, once, sums); break;
#endif
#if FLOAT_ROWS >= 8
    case 3: float_tile(w, bf16, x, stride, k, 3, add, once, sums); break;
    case 4: float_tile(w, bf16, x, stride, k, 4, add, once, sums); break;
    case 5: float_tile(w, bf16, x, stride, k, 5, add, once, sums); break;
    case 6: float_tile(w, bf16, x, stride, k, 6, add, once, sums); break;
    case 7: float_tile(w, bf16, x, stride, k, 7, add, once, sums); break;
    default: float_tile(w, bf16, x, stride, k, 8, add, once, sums); break;
#endif
    }
}

INLINE void float_linear(const struct float_linear_args *a, const int bf16, int thread, int threads)
{
    const int64_t width = bf16 ? 2 : 4; /* bytes per weight */
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < a->m; panel += FLOAT_PANEL) {
        int64_t panel_rows = a->m - panel < FLOAT_PANEL ? a->m - panel : FLOAT_PANEL;
        for (int64_t block = from; block < to; block++) {
            const char *w = (const char *)a->weight + block * a->k * BLOCK * width;
            float sums[FLOAT_PANEL][BLOCK] __attribute__((aligned(64)));
            for (int64_t chunk = 0; chunk < a->k; chunk += FLOAT_CHUNK) {
                int64_t k = a->k - chunk < FLOAT_CHUNK ? a->k - chunk : FLOAT_CHUNK;
                for (int64_t row = 0; row < panel_rows; row += FLOAT_ROWS) {
                    int64_t rows = panel_rows - row < FLOAT_ROWS ? panel_rows - row : FLOAT_ROWS;
                    const char *wc = w + chunk * BLOCK * width;
                    const float *x = a->x + (panel + row) * a->k + chunk;
                    if (a->m <= FLOAT_ROWS)
                        float_rows(wc, bf16, x, a->k, k, rows, chunk > 0, 1, sums + row);
                    else
                        float_rows(wc, bf16, x, a->k, k, rows, chunk > 0, 0, sums + row);
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

static void bf16_linear(void *data, int thread, int threads) { float_linear(data, 1, thread, threads); }
static void f32_linear(void *data, int thread, int threads) { float_linear(data, 0, thread, threads); }
