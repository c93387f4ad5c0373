/* out = (x @ weight.T) * x_scale * w_scale + bias with int8 operands and exact int32 sums.
 *
 * A decode pass is bound by reading the weights: each thread walks its blocks of 32 outputs from first byte to last,
 * and up to 8 rows share what was read. Longer inputs go in panels that stay in the L2 cache. */
#pragma once
#include "simd.h"

#define INT8_ROWS 8    /* rows that share one pass over a block */
#define INT8_PANEL 64  /* rows whose activations stay in the L2 cache meanwhile */
#if ISA_DOTPROD
#define INT8_SHIFT 0u  /* what int8_tile left added to the weights */
#else
#define INT8_SHIFT 128u
#endif

INLINE int32_t four(const int8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

/* sums[rows][32] of (weight + INT8_SHIFT) * x over one block. */
INLINE void int8_tile(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k4, const int rows,
                      const int once, int32_t (*sums)[BLOCK])
{
    (void)once;
#if ISA_AVX512
    __m512i acc[INT8_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < k4; k++, w += BLOCK * 4) {
        prefetch_weight(w, once);
        prefetch_weight(w + 64, once);
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512i xr = _mm512_set1_epi32(four(x + r * stride + 4 * k));
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, xr);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, xr);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        _mm512_storeu_si512(sums[r], acc[r][0]);
        _mm512_storeu_si512(sums[r] + 16, acc[r][1]);
    }
#elif ISA_AVXVNNI
    for (int half = 0; half < BLOCK; half += 16)
        for (int r0 = 0; r0 < rows; r0 += 4) {
            __m256i acc[4][2];
            UNROLL for (int r = 0; r < 4; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
            for (int64_t k = 0; k < k4; k++) {
                const uint8_t *p = w + k * BLOCK * 4 + half * 4;
                __m256i w0 = _mm256_loadu_si256((const void *)p), w1 = _mm256_loadu_si256((const void *)(p + 32));
                UNROLL for (int r = 0; r < 4; r++) {
                    int row = r0 + r < rows ? r0 + r : r0;
                    __m256i xr = _mm256_set1_epi32(four(x + row * stride + 4 * k));
                    acc[r][0] = _mm256_dpbusd_avx_epi32(acc[r][0], w0, xr);
                    acc[r][1] = _mm256_dpbusd_avx_epi32(acc[r][1], w1, xr);
                }
            }
            UNROLL for (int r = 0; r < 4; r++) if (r0 + r < rows) {
                _mm256_storeu_si256((void *)(sums[r0 + r] + half), acc[r][0]);
                _mm256_storeu_si256((void *)(sums[r0 + r] + half + 8), acc[r][1]);
            }
        }
#elif ISA_AVX2
    /* Through int16, where a product of u8 and s8 and a sum of two fit; pairs are added at the end. */
    for (int quarter = 0; quarter < BLOCK; quarter += 8)
        for (int r0 = 0; r0 < rows; r0 += 4) {
            __m256i acc[4][2];
            UNROLL for (int r = 0; r < 4; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
            for (int64_t k = 0; k < k4; k++) {
                const uint8_t *p = w + k * BLOCK * 4 + quarter * 4;
                __m256i w0 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
                __m256i w1 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(p + 16)));
                UNROLL for (int r = 0; r < 4; r++) {
                    int row = r0 + r < rows ? r0 + r : r0;
                    __m256i xr = _mm256_cvtepi8_epi16(_mm_set1_epi32(four(x + row * stride + 4 * k)));
                    acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(w0, xr));
                    acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(w1, xr));
                }
            }
            UNROLL for (int r = 0; r < 4; r++) if (r0 + r < rows) {
                /* hadd works within 128-bit halves: put the four pairs back in order. */
                __m256i pairs = _mm256_hadd_epi32(acc[r][0], acc[r][1]);
                _mm256_storeu_si256((void *)(sums[r0 + r] + quarter), _mm256_permute4x64_epi64(pairs, 0xd8));
            }
        }
#elif ISA_DOTPROD
    /* Both operands are signed: the shift of the weights is taken off as they are read. One or two rows take the block
     * at once, more take 16 outputs by 4 rows. */
    enum { MOST = 16 }; /* accumulators */
    const int wide = rows <= 2 ? 8 : 4, high = MOST / wide;
    UNROLL for (int v0 = 0; v0 < 8; v0 += wide) UNROLL for (int r0 = 0; r0 < rows; r0 += high) {
        const int taken = rows - r0 < high ? rows - r0 : high;
        int32x4_t acc[MOST];
        UNROLL for (int i = 0; i < wide * taken; i++) acc[i] = vdupq_n_s32(0);
        for (int64_t k = 0; k < k4; k++) {
            int8x16_t weights[8];
            const uint8_t *p = w + k * BLOCK * 4 + v0 * 16;
            UNROLL for (int v = 0; v < wide; v++)
                weights[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + v * 16), vdupq_n_u8(128)));
            UNROLL for (int r = 0; r < taken; r++) {
                int8x16_t xr = vreinterpretq_s8_s32(vdupq_n_s32(four(x + (r0 + r) * stride + 4 * k)));
                UNROLL for (int v = 0; v < wide; v++) acc[r * wide + v] = vdotq_s32(acc[r * wide + v], weights[v], xr);
            }
        }
        UNROLL for (int r = 0; r < taken; r++) UNROLL for (int v = 0; v < wide; v++)
            vst1q_s32(sums[r0 + r] + (v0 + v) * 4, acc[r * wide + v]);
    }
#else
    for (int r = 0; r < rows; r++) {
        int32_t acc[BLOCK] = {0};
        for (int64_t k = 0; k < k4; k++) {
            const uint8_t *p = w + k * BLOCK * 4;
            const int8_t *xr = x + r * stride + 4 * k;
            for (int j = 0; j < BLOCK; j++)
                acc[j] += p[4 * j] * xr[0] + p[4 * j + 1] * xr[1] + p[4 * j + 2] * xr[2] + p[4 * j + 3] * xr[3];
        }
        memcpy(sums[r], acc, sizeof acc);
    }
#endif
}

/* Rows must be a constant for the accumulators to live in registers. */
INLINE void int8_rows(const uint8_t *w, const int8_t *x, int64_t stride, int64_t k4, int64_t rows,
                      const int once, int32_t (*sums)[BLOCK])
{
    switch (rows) {
    case 1: int8_tile(w, x, stride, k4, 1, once, sums); break;
    case 2: int8_tile(w, x, stride, k4, 2, once, sums); break;
    case 3: int8_tile(w, x, stride, k4, 3, once, sums); break;
    case 4: int8_tile(w, x, stride, k4, 4, once, sums); break;
    case 5: int8_tile(w, x, stride, k4, 5, once, sums); break;
    case 6: int8_tile(w, x, stride, k4, 6, once, sums); break;
    case 7: int8_tile(w, x, stride, k4, 7, once, sums); break;
    default: int8_tile(w, x, stride, k4, 8, once, sums); break;
    }
}

/* What the shift of the weights adds to every sum of this row is INT8_SHIFT times this. */
INLINE int32_t sum_int8(const int8_t *x, int64_t n)
{
    int32_t sum = 0;
    int64_t i = 0;
#if ISA_AVX512
    __m512i acc = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    for (; i + 64 <= n; i += 64)
        acc = _mm512_dpbusd_epi32(acc, ones, _mm512_loadu_si512(x + i));
    sum = _mm512_reduce_add_epi32(acc);
#endif
    for (; i < n; i++)
        sum += x[i];
    return sum;
}

static void int8_linear(void *data, int thread, int threads)
{
    const struct int8_linear_args *a = data;
    int64_t from, to, stride = a->k4 * 4;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < a->m; panel += INT8_PANEL) {
        int64_t panel_end = panel + INT8_PANEL < a->m ? panel + INT8_PANEL : a->m;
        int32_t x_sum[INT8_PANEL];
        for (int64_t row = panel; row < panel_end; row++)
            x_sum[row - panel] = sum_int8(a->x + row * stride, stride);
        for (int64_t block = from; block < to; block++) {
            const uint8_t *w = a->weight + block * a->k4 * BLOCK * 4;
            int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t row = panel; row < panel_end; row += INT8_ROWS) {
                int32_t sums[INT8_ROWS][BLOCK] __attribute__((aligned(64)));
                int64_t rows = panel_end - row < INT8_ROWS ? panel_end - row : INT8_ROWS;
                if (a->m <= INT8_ROWS)
                    int8_rows(w, a->x + row * stride, stride, a->k4, rows, 1, sums);
                else
                    int8_rows(w, a->x + row * stride, stride, a->k4, rows, 0, sums);
                for (int64_t r = 0; r < rows; r++) {
                    int64_t at = (row + r) * a->n + column;
                    /* Unsigned, because the shifted sum may pass 2^31 and come back. */
                    uint32_t shift = INT8_SHIFT * (uint32_t)x_sum[row + r - panel];
                    for (int j = 0; j < BLOCK; j++)
                        sums[r][j] = (int32_t)((uint32_t)sums[r][j] - shift);
                    if (a->accumulators) {
                        memcpy(a->accumulators + at, sums[r], (size_t)columns * sizeof(int32_t));
                        continue;
                    }
                    vf x_scale = splat(a->x_scale[row + r]);
                    for (int64_t j = 0; j < columns; j += VL) {
                        vf y = __builtin_convertvector(*(const vi_any *)(sums[r] + j), vf) * x_scale;
                        y = y * load_up_to(a->w_scale + column + j, columns - j);
                        if (a->bias)
                            y = y + load_up_to(a->bias + column + j, columns - j);
                        store_up_to(a->out + at + j, y, columns - j);
                    }
                }
            }
        }
    }
}
