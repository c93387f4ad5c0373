/* out = x @ weight.T + bias with int4 weights in groups along k, a bfloat16 scale each: W4A16 and W4A4 over one copy.
 *
 * W4A16 multiplies bfloat16 inputs: in pairs where there are dot products of them, which a table turns the nibbles
 * into; elsewhere in float32. W4A4 multiplies int8 (between -7 and 7) with the nibbles as they are, 8 too large, and
 * takes 8 times the sum of the group's inputs off. Either way a group's sum is one accumulator per output, scaled once. */
#pragma once
#include "simd.h"

#if ISA_AVX512
#define INT4_ROWS 8      /* rows that share one pass over a block */
#define INT4_COLUMNS(rows) NV /* vectors of its outputs at a time: what the registers hold */
#elif ISA_AVX2
#define INT4_ROWS 6
#define INT4_COLUMNS(rows) ((rows) == 1 ? NV : NV / 2)
#define INT4_BYTE_COLUMNS(rows) ((rows) <= 1 ? NV : (rows) <= 3 ? NV / 2 : NV / 4)
#elif ISA_DOTPROD
#define INT4_ROWS 6
#define INT4_COLUMNS(rows) ((rows) <= 3 ? NV : NV / 2)
#else
#define INT4_ROWS 1
#define INT4_COLUMNS(rows) NV
#endif
#ifndef INT4_BYTE_COLUMNS
#define INT4_BYTE_COLUMNS INT4_COLUMNS /* the same for W4A4 */
#endif
#define INT4_PANEL 64 /* rows that are prepared together */

typedef uint16_t vscale __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE int32_t word_at(const void *p)
{
    int32_t word;
    memcpy(&word, p, 4);
    return word;
}

/* total += sum * scale of the group, for one vector of outputs. */
INLINE void add_group(float *total, vf sum, const uint16_t *scale)
{
    vf widened = (vf)(__builtin_convertvector(*(const vscale *)scale, vi) << 16);
    store(total, fma_(sum, widened, load(total)));
}

#ifndef ISA_AVX2
#define ISA_AVX2 0
#endif

#if ISA_AVX512BF16
typedef uint16_t int4_input; /* bfloat16 */

/* totals[rows][32] of one block. x: bfloat16 [rows, k]. */
INLINE void int4_float_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale,
                            const int4_input *x, const int once, float (*totals)[BLOCK], const int rows)
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
        vf acc[INT4_ROWS][NV];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vf){0};
        for (int64_t k = from; k < from + a->group; k += 8, w += BLOCK * 4) {
            __m512i values_of[NV][4];
            UNROLL for (int v = 0; v < NV; v++) {
                prefetch_weight(w + 64 * v, once);
                __m512i nibbles = _mm512_loadu_si512(w + 64 * v);
                UNROLL for (int p = 0; p < 4; p++)
                    values_of[v][p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * p), table);
            }
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < 4; p++)
            {
                vi xr = splat_int(word_at(x + r * a->k + k + 2 * p));
                __asm__("" : "+v"(xr)); /* hides the broadcast from clang 16, which crashes on one of bf16 */
                UNROLL for (int v = 0; v < NV; v++)
                    acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)values_of[v][p], (__m512bh)xr);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV; v++)
            add_group(totals[r] + v * VL, acc[r][v], scale + v * VL);
    }
}
#else
typedef float int4_input; /* what round_int4 made of it */

/* A nibble as a float without a conversion: put into the low bits of 2^23 it is 2^23 + nibble * 16^place, and what is
 * subtracted leaves (nibble - 8) * 16^place, exactly. The input has been divided by 16^place (round_int4). Places are 0
 * and 1, so that the constants find registers. */
INLINE vf nibble_value(vi word, const int place)
{
    vf value = (vf)((word & splat_int(15 << 4 * place)) | splat_int(0x4b000000));
    return value - splat(8388608.0f + (float)(8 << 4 * place));
}

#define INT4_DECODED 64 /* inputs whose weights are decoded ahead of their products */

/* The values of n inputs of NV / 2 vectors of outputs. */
NOINLINE void decode_int4(const uint8_t *p, int64_t n, int once, vf (*values)[NV / 2])
{
    static const int8_t order[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* nibble -> input, see pack_int4 */
    for (int64_t i = 0; i < n; i += 8, p += BLOCK * 4) {
        if (once)
            prefetch_weight(p, 1);
        UNROLL for (int v = 0; v < NV / 2; v++) {
            vi word = *(const vi_any *)(p + v * VL * 4);
            UNROLL for (int nibble = 0; nibble < 8; nibble++) {
                values[i + order[nibble]][v] = nibble_value(word, nibble % 2);
                word = nibble % 2 ? (vi)((vu)word >> 8) : word;
            }
        }
    }
}

/* acc[rows][NV / 2] += x[rows][n] @ values */
INLINE void decoded_tile(const vf (*values)[NV / 2], const float *x, int64_t stride, int64_t n, const int rows,
                         vf (*sums)[NV])
{
    vf acc[INT4_ROWS][NV / 2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV / 2; v++) acc[r][v] = sums[r][v];
    for (int64_t i = 0; i < n; i++)
        UNROLL for (int r = 0; r < rows; r++) {
            vf xr = splat(x[r * stride + i]);
            UNROLL for (int v = 0; v < NV / 2; v++) {
                acc[r][v] = fma_(xr, values[i][v], acc[r][v]);
                KEEP(acc[r][v]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < NV / 2; v++) sums[r][v] = acc[r][v];
}

NOINLINE void decoded_products(const vf (*values)[NV / 2], const float *x, int64_t stride, int64_t n, int rows,
                               vf (*sums)[NV])
{
    switch (rows) {
    case 3: decoded_tile(values, x, stride, n, 3, sums); break;
    case 4: decoded_tile(values, x, stride, n, 4, sums); break;
    case 5: decoded_tile(values, x, stride, n, 5, sums); break;
    default: decoded_tile(values, x, stride, n, 6, sums); break;
    }
}

/* totals[rows][32] of one block. */
INLINE void int4_float_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale,
                            const int4_input *x, const int once, float (*totals)[BLOCK], const int rows)
{
    const int columns = INT4_COLUMNS(rows), first_decoded = ISA_AVX2 && rows > 2;
    for (int64_t from = 0; from < a->k; from += a->group, scale += BLOCK, w += BLOCK * a->group / 2)
        UNROLL for (int v0 = 0; v0 < NV; v0 += columns) {
            vf acc[INT4_ROWS][NV];
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++) acc[r][v] = (vf){0};
            const uint8_t *p = w + v0 * VL * 4;
            const int4_input *xk = x + from;
            if (first_decoded) /* more registers are needed than there are: the values go through the L1 cache */
                for (int64_t k = 0; k < a->group;) {
                    vf values[INT4_DECODED][NV / 2];
                    int64_t taken = a->group - k < INT4_DECODED ? a->group - k : INT4_DECODED;
                    decode_int4(p, taken, once, values);
                    decoded_products(values, xk, a->k, taken, rows, acc);
                    p += taken / 2 * BLOCK;
                    xk += taken;
                    k += taken;
                }
            else
                for (int64_t k = 0; k < a->group; k += 8, p += BLOCK * 4, xk += 8) {
                    vi word[NV];
                    UNROLL for (int v = 0; v < columns; v++) {
                        if (v0 == 0)
                            prefetch_weight(p + v * VL * 4, once);
                        word[v] = *(const vi_any *)(p + v * VL * 4);
                    }
                    UNROLL for (int i = 0; i < 8; i++) { /* the inputs in the order that both ways share */
                        const int nibble = i % 2 * 4 + i / 2;
                        UNROLL for (int v = 0; v < columns; v++) {
                            vf value = nibble_value((vi)((vu)word[v] >> (nibble / 2 * 8)), nibble % 2);
                            UNROLL for (int r = 0; r < rows; r++) {
                                acc[r][v] = fma_(splat(xk[r * a->k + i]), value, acc[r][v]);
                                KEEP(acc[r][v]);
                            }
                        }
                    }
                }
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                add_group(totals[r] + (v0 + v) * VL, acc[r][v], scale + (v0 + v) * VL);
        }
}
#endif

/* acc += the dot products of four nibbles (0 .. 15), `low` or `high` ones of 8 inputs, with four inputs each. */
INLINE vi add_nibbles(vi acc, vi low, vi high, vi x_low, vi x_high)
{
#if ISA_AVX512
    acc = (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)low, (__m512i)x_low);
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)high, (__m512i)x_high);
#elif ISA_AVXVNNI
    acc = (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)low, (__m256i)x_low);
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)high, (__m256i)x_high);
#elif ISA_AVX2 /* int16 sums of pairs, which int4_int8_tile widens before they can overflow */
    acc = (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)low, (__m256i)x_low));
    KEEP(acc);
    return (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
#elif ISA_DOTPROD
    int32x4_t sum = vdotq_s32((int32x4_t)acc, (int8x16_t)low, (int8x16_t)x_low);
    return (vi)vdotq_s32(sum, (int8x16_t)high, (int8x16_t)x_high);
#else
    typedef int8_t bytes __attribute__((vector_size(VL * 4)));
    bytes l = (bytes)low, h = (bytes)high, xl = (bytes)x_low, xh = (bytes)x_high;
    for (int lane = 0; lane < VL; lane++)
        for (int i = 4 * lane; i < 4 * lane + 4; i++)
            acc[lane] += l[i] * xl[i] + h[i] * xh[i];
    return acc;
#endif
}

/* Inputs after which sums must be widened: 512 / 4 pairs of at most 2 * 15 * 7 stay below 2^15. */
#if ISA_AVX2 && !ISA_AVXVNNI
#define INT4_STEP 512
#else
#define INT4_STEP INT64_MAX
#endif

/* totals[rows][32] of one block. x: int8 [rows, k] in the order of `prepare_int4`; sums [rows, groups]: 8 times the sum
 * of a group of x. */
INLINE void int4_int8_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const int8_t *x,
                           const int32_t *sums, const int once, float (*totals)[BLOCK], const int rows)
{
    const int columns = INT4_BYTE_COLUMNS(rows);
    const int64_t groups = a->k / a->group;
    const vi nibble = splat_int(0x0f0f0f0f);
    for (int64_t g = 0; g < groups; g++, scale += BLOCK, w += BLOCK * a->group / 2)
        UNROLL for (int v0 = 0; v0 < NV; v0 += columns) {
            vi acc[INT4_ROWS][NV];
#if ISA_AVX2 && !ISA_AVXVNNI
            vi wide[INT4_ROWS][NV];
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                wide[r][v] = splat_int(-sums[r * groups + g]);
#else
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                acc[r][v] = splat_int(-sums[r * groups + g]);
#endif
            const uint8_t *p = w + v0 * VL * 4;
            const int8_t *xk = x + g * a->group;
            for (int64_t left = a->group; left > 0; left -= INT4_STEP) {
#if ISA_AVX2 && !ISA_AVXVNNI
                UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++) acc[r][v] = (vi){0};
#endif
                for (int64_t k = left < INT4_STEP ? left : INT4_STEP; k > 0; k -= 8, p += BLOCK * 4, xk += 8) {
                    if (v0 == 0) {
                        prefetch_weight(p, once);
                        prefetch_weight(p + 64, once);
                    }
                    vi low[NV], high[NV];
                    UNROLL for (int v = 0; v < columns; v++) {
                        vi word = *(const vi_any *)(p + v * VL * 4);
                        low[v] = word & nibble;
                        high[v] = (word >> 4) & nibble;
                    }
                    UNROLL for (int r = 0; r < rows; r++) {
                        vi x_low = splat_int(word_at(xk + r * a->k)), x_high = splat_int(word_at(xk + r * a->k + 4));
                        UNROLL for (int v = 0; v < columns; v++)
                        {
                            acc[r][v] = add_nibbles(acc[r][v], low[v], high[v], x_low, x_high);
                            KEEP(acc[r][v]);
                        }
                    }
                }
#if ISA_AVX2 && !ISA_AVXVNNI
                UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                    wide[r][v] += (vi)_mm256_madd_epi16((__m256i)acc[r][v], _mm256_set1_epi16(1));
#endif
            }
#if ISA_AVX2 && !ISA_AVXVNNI
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++) acc[r][v] = wide[r][v];
#endif
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
                add_group(totals[r] + (v0 + v) * VL, __builtin_convertvector(acc[r][v], vf), scale + (v0 + v) * VL);
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
            int4_float_tile(a, w, scale, x, once, totals, n);                                                       \
        break
    switch (rows) {
        INT4_CASE(1);
#if INT4_ROWS >= 6
        INT4_CASE(2);
        INT4_CASE(3);
        INT4_CASE(4);
        INT4_CASE(5);
        INT4_CASE(6);
#endif
#if INT4_ROWS >= 8
        INT4_CASE(7);
        INT4_CASE(8);
#endif
    }
#undef INT4_CASE
}

static void int4_linear(void *data, int thread, int threads)
{
    const struct int4_linear_args *a = data;
    const int64_t groups = a->k / a->group, x_bytes = a->x_scale ? 1 : (int64_t)sizeof(int4_input);
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
            const int64_t tiles = (panel_end - panel + INT4_ROWS - 1) / INT4_ROWS;
            for (int64_t tile = 0, row = panel; tile < tiles; tile++) {
                float totals[INT4_ROWS][BLOCK] __attribute__((aligned(64)));
                memset(totals, 0, sizeof totals);
                int64_t rows = panel + (panel_end - panel) * (tile + 1) / tiles - row;
                const int32_t *sums = ordered ? all_sums + (row - panel) * groups : NULL;
                if (tile == 0 && panel_end == a->m)
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
                row += rows;
            }
        }
    }
}
