/* out = x @ weight.T + bias with int4 weights in groups along k, a bfloat16 scale each: W4A16 and W4A4 over one copy.
 *
 * W4A16 multiplies bfloat16 inputs, which a table turns the nibbles into; W4A4 multiplies int8 (between -7 and 7) with
 * the nibbles as they are, 8 too large, and takes 8 times the sum of the group's inputs off. Either way a group's sum
 * is one accumulator per output, scaled once. */
#pragma once
#include "simd.h"

#if ISA_AVX512BF16
#define HAS_INT4 1
#define INT4_ROWS 8   /* rows that share one pass over a block */
#define INT4_PANEL 64 /* rows that are prepared together */

INLINE __m512i broadcast_word(const void *p)
{
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

/* total += sum * scale of the group, for 32 outputs. */
INLINE void add_group(float *total, __m512 sum0, __m512 sum1, const uint16_t *scale)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)scale));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(scale + 16)));
    __m512 scale0 = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    __m512 scale1 = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    _mm512_storeu_ps(total, _mm512_fmadd_ps(sum0, scale0, _mm512_loadu_ps(total)));
    _mm512_storeu_ps(total + 16, _mm512_fmadd_ps(sum1, scale1, _mm512_loadu_ps(total + 16)));
}

/* totals[rows][32] of one block. x: bfloat16 [rows, k]. */
INLINE void int4_bf16_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const uint16_t *x,
                           const int once, float (*totals)[BLOCK], const int rows)
{
    uint16_t values[32];
    for (int i = 0; i < 32; i++) { /* a nibble and one bit of the next choose among 32 words */
        float value = (float)(i % 16 - 8);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        values[i] = (uint16_t)(bits >> 16);
    }
    const __m512i table = _mm512_loadu_si512(values);
    for (int64_t from = 0; from < a->k; from += a->group, scale += BLOCK) {
        __m512 acc[INT4_ROWS][2];
        UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (int64_t k = from; k < from + a->group; k += 8, w += BLOCK * 4) {
            prefetch_weight(w, once);
            prefetch_weight(w + 64, once);
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64), d0[4], d1[4];
            UNROLL for (int p = 0; p < 4; p++) {
                d0[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w0, 4 * p), table);
                d1[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w1, 4 * p), table);
            }
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < 4; p++)
            {
                __m512i xr = (__m512i)broadcast_word(x + r * a->k + k + 2 * p);
                __asm__("" : "+v"(xr)); /* hides the broadcast from clang 16, which crashes on one of bf16 */
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], (__m512bh)d0[p], (__m512bh)xr);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], (__m512bh)d1[p], (__m512bh)xr);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) add_group(totals[r], acc[r][0], acc[r][1], scale);
    }
}

/* The same. x: int8 [rows, k] in the order of `prepare_int4`; sums [rows, groups]: 8 times the sum of a group of x. */
INLINE void int4_int8_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const int8_t *x,
                           const int32_t *sums, const int once, float (*totals)[BLOCK], const int rows)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    const int64_t groups = a->k / a->group;
    for (int64_t g = 0; g < groups; g++, scale += BLOCK) {
        __m512i acc[INT4_ROWS][2];
        UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_set1_epi32(-sums[r * groups + g]);
        for (int64_t k = g * a->group; k < (g + 1) * a->group; k += 8, w += BLOCK * 4) {
            prefetch_weight(w, once);
            prefetch_weight(w + 64, once);
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            __m512i low0 = _mm512_and_si512(w0, nibble), high0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), nibble);
            __m512i low1 = _mm512_and_si512(w1, nibble), high1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), nibble);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512i x0 = broadcast_word(x + r * a->k + k), x1 = broadcast_word(x + r * a->k + k + 4);
                acc[r][0] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[r][0], low0, x0), high0, x1);
                acc[r][1] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[r][1], low1, x0), high1, x1);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
            add_group(totals[r], _mm512_cvtepi32_ps(acc[r][0]), _mm512_cvtepi32_ps(acc[r][1]), scale);
    }
}

/* Each 8 inputs in the order in which the nibbles lie (pack_int4), and 8 times the sum of every group. */
static void prepare_int4(const struct int4_linear_args *a, const int8_t *x, int64_t rows, int8_t *ordered, int32_t *sums)
{
    static const int8_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int64_t i = 0; i < rows * a->k; i += 8)
        for (int j = 0; j < 8; j++)
            ordered[i + j] = x[i + order[j]];
    for (int64_t i = 0; i < rows * a->k; i += a->group) {
        int32_t sum = 0;
        for (int64_t j = 0; j < a->group; j++)
            sum += x[i + j];
        *sums++ = 8 * sum;
    }
}

INLINE void int4_rows(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const void *x,
                      const int32_t *sums, const int once, float (*totals)[BLOCK], int64_t rows)
{
#define INT4_CASE(n)                                                                                               \
    case n:                                                                                                        \
        if (sums)                                                                                                  \
            int4_int8_tile(a, w, scale, x, sums, once, totals, n);                                                 \
        else                                                                                                       \
            int4_bf16_tile(a, w, scale, x, once, totals, n);                                                       \
        break
    switch (rows) {
        INT4_CASE(1);
        INT4_CASE(2);
        INT4_CASE(3);
        INT4_CASE(4);
        INT4_CASE(5);
        INT4_CASE(6);
        INT4_CASE(7);
        INT4_CASE(8);
    }
#undef INT4_CASE
}

static void int4_linear(void *data, int thread, int threads)
{
    const struct int4_linear_args *a = data;
    const int64_t groups = a->k / a->group, x_bytes = a->x_scale ? 1 : 2;
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    int8_t *ordered = a->x_scale ? (int8_t *)a->scratch + thread * a->scratch_bytes : NULL;
    int32_t *all_sums = ordered ? (int32_t *)(ordered + INT4_PANEL * a->k) : NULL;
    for (int64_t panel = 0; panel < a->m; panel += INT4_PANEL) {
        int64_t panel_end = panel + INT4_PANEL < a->m ? panel + INT4_PANEL : a->m;
        const char *x = (const char *)a->x + panel * a->k * x_bytes;
        if (ordered) {
            prepare_int4(a, (const int8_t *)x, panel_end - panel, ordered, all_sums);
            x = (const char *)ordered;
        }
        for (int64_t block = from; block < to; block++) {
            const uint8_t *w = a->weight + block * a->k / 2 * BLOCK;
            const uint16_t *scale = a->w_scale + block * groups * BLOCK;
            int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t row = panel; row < panel_end; row += INT4_ROWS) {
                float totals[INT4_ROWS][BLOCK] __attribute__((aligned(64)));
                memset(totals, 0, sizeof totals);
                int64_t rows = panel_end - row < INT4_ROWS ? panel_end - row : INT4_ROWS;
                const int32_t *sums = ordered ? all_sums + (row - panel) * groups : NULL;
                if (a->m <= INT4_ROWS)
                    int4_rows(a, w, scale, x + (row - panel) * a->k * x_bytes, sums, 1, totals, rows);
                else
                    int4_rows(a, w, scale, x + (row - panel) * a->k * x_bytes, sums, 0, totals, rows);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t j = 0; j < columns; j += VL) {
                        vf y = load(totals[r] + j);
                        if (a->x_scale)
                            y = y * a->x_scale[row + r];
                        if (a->bias)
                            y = y + load_up_to(a->bias + column + j, columns - j);
                        store_up_to(a->out + (row + r) * a->n + column + j, y, columns - j);
                    }
            }
        }
    }
}
#else
#define int4_linear NULL
#endif
