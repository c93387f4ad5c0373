/* out = x @ weight.T + bias with int4 weights in groups along k, a bfloat16 scale each and perhaps an offset: W4A16 and
 * W4A4 over one copy.
 *
 * Both multiply integers with the nibbles as they are, 8 too large, and take 8 times the sum of the group's inputs off.
 * W4A4 has one int8 digit for each input, W4A16 two of 7 bits; or all 14 as int16 with AVX2, for which pairs of those are
 * the fastest product. A group's sum is an exact integer, so its order is free; it is scaled once. */
#pragma once
#include "simd.h"

#if ISA_AVX512
#define INT4_ROWS(digits) ((digits) == 2 ? 6 : 8) /* that share one pass over a block */
#define INT4_COLUMNS(sums) NV /* vectors of its outputs at a time, of so many sums each: what the registers hold */
#elif ISA_AVX2
#define INT4_ROWS(digits) ((void)(digits), 6)
#define INT4_COLUMNS(sums) ((sums) <= 1 ? NV : (sums) <= 3 ? NV / 2 : NV / 4)
#elif ISA_DOTPROD
#define INT4_ROWS(digits) ((void)(digits), 6)
#define INT4_COLUMNS(sums) ((sums) <= (ISA_I8MM ? 2 : 3) ? NV : (sums) <= 6 ? NV / 2 : NV / 4)
#else
#define INT4_ROWS(digits) ((void)(digits), 1)
#define INT4_COLUMNS(sums) NV
#endif
#define INT4_INPUTS (ISA_I8MM ? 8 : 4) /* of an output that lie together */
#define INT4_MOST_ROWS 8
#define INT4_PANEL 10 /* tiles of rows between two reads of the weights */

typedef uint16_t vscale __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf widen_scale(const uint16_t *scale)
{
#if ISA_AVX512 /* by name: gcc 12 would take three more shuffles, */
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)scale)), 16);
#elif ISA_AVX2
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)scale)), 16);
#elif ISA_DOTPROD /* or a lane at a time */
    return (vf)vshlq_n_u32(vmovl_u16(vld1_u16(scale)), 16);
#else
    return (vf)(__builtin_convertvector(*(const vscale *)scale, vi) << 16);
#endif
}

INLINE int32_t word_at(const void *p)
{
    int32_t word;
    memcpy(&word, p, 4);
    return word;
}

/* Rows are divided evenly among as few tiles as there can be, of `most` rows: the first row of tile `tile`. */
INLINE int64_t int4_tiles(int64_t m, int64_t most) { return (m + most - 1) / most; }
INLINE int64_t int4_tile_row(int64_t m, int64_t most, int64_t tile) { return m * tile / int4_tiles(m, most); }

/* acc += the dot products of four nibbles (0 .. 15), `low` or `high` ones of 8 inputs, with four inputs each. */
INLINE vi add_nibbles(vi acc, vi low, vi high, vi x_low, vi x_high)
{
#if ISA_AVX512
    acc = (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)low, (__m512i)x_low);
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)high, (__m512i)x_high);
#elif ISA_AVXVNNI
    acc = (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)low, (__m256i)x_low);
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)high, (__m256i)x_high);
#elif ISA_AVX2 /* int16 sums of pairs, which int4_tile widens before they can overflow */
    acc = (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)low, (__m256i)x_low));
    KEEP(acc);
    return (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
#else
    typedef int8_t bytes __attribute__((vector_size(VL * 4)));
    bytes l = (bytes)low, h = (bytes)high, xl = (bytes)x_low, xh = (bytes)x_high;
    for (int lane = 0; lane < VL; lane++)
        for (int i = 4 * lane; i < 4 * lane + 4; i++)
            acc[lane] += l[i] * xl[i] + h[i] * xh[i];
    return acc;
#endif
}

#if ISA_AVX2 && !ISA_AVXVNNI
#define INT4_WIDENS 1 /* sums of 16 bits, */
#define INT4_STEP 512 /* after so many inputs: 512 / 4 pairs of at most 2 * 15 * 7 stay below 2^15 */
#else
#define INT4_WIDENS 0
#define INT4_STEP INT64_MAX
#endif

#include "linear_int4_arm.h"
#include "linear_int4_avx2.h"

/* totals[rows][32] of one block. x, x_scale and sums begin with the tile's first row; has_offset is whether there is one. */
INLINE void int4_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const uint16_t *offset,
                      const int8_t *x, const float *x_scale, const int32_t *sums, float (*totals)[BLOCK], const int rows,
                      const int digits, const int has_offset)
{
    const int parts = rows * digits, columns = INT4_COLUMNS(parts), widens = INT4_WIDENS;
    const int64_t groups = a->k / a->group;
    const vi nibble = splat_int(0x0f0f0f0f);
    for (int64_t g = 0; g < groups; g++, scale += BLOCK, w += BLOCK * a->group / 2, x += rows * digits * a->group)
        UNROLL for (int v0 = 0; v0 < NV; v0 += columns) {
            vi acc[INT4_MOST_ROWS * 2][NV], wide[INT4_MOST_ROWS * 2][NV]; /* the last digit's sum takes 8 times the inputs off */
            UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++)
                acc[c][v] = wide[c][v] = splat_int(c % digits == digits - 1 ? sums[c / digits * groups + g] : 0);
            const uint8_t *p = w + v0 * VL * 4;
            const int8_t *xk = x;
            if (INT4_LANES)
                add_group(acc, p, xk, a->group, parts, columns, v0 == 0);
            for (int64_t left = INT4_LANES ? 0 : a->group; left > 0; left -= widens ? INT4_STEP : a->group) {
                if (widens)
                    UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++) acc[c][v] = (vi){0};
                for (int64_t k = widens && left > INT4_STEP ? INT4_STEP : left; k > 0; k -= 8, p += BLOCK * 4) {
                    if (v0 == 0) {
                        prefetch_weight(p, 1);
                        prefetch_weight(p + 64, 1);
                    }
                    vi low[NV], high[NV];
                    UNROLL for (int v = 0; v < columns; v++) {
                        vi word = *(const vi_any *)(p + v * VL * 4);
                        low[v] = word & nibble;
                        high[v] = (word >> 4) & nibble;
                    }
                    UNROLL for (int c = 0; c < parts; c++, xk += 8) {
                        vi x_low = splat_int(word_at(xk)), x_high = splat_int(word_at(xk + 4));
                        UNROLL for (int v = 0; v < columns; v++)
                        {
                            acc[c][v] = add_nibbles(acc[c][v], low[v], high[v], x_low, x_high);
                            KEEP(acc[c][v]);
                        }
                    }
                }
#if INT4_WIDENS
                if (widens)
                    UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++)
                    wide[c][v] += (vi)_mm256_madd_epi16((__m256i)acc[c][v], _mm256_set1_epi16(1));
#endif
            }
            if (widens)
                UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++) acc[c][v] = wide[c][v];
#if ISA_DOTPROD
            __asm__("" : "+r"(x_scale), "+r"(sums)); /* or gcc fetches them for all columns, and spills */
#endif
            UNROLL for (int v = 0; v < columns; v++) {
                const int j = (v0 + v) * VL;
                const vf factor = widen_scale(scale + j);
                const vf added = has_offset ? widen_scale(offset + g * BLOCK + j) * splat(-0.125f) : (vf){0};
                UNROLL for (int r = 0; r < rows; r++) {
                    vi exact = acc[r * digits][v];
                    if (digits == 2) /* unsigned: half of it may pass 2^31 and come back */
                        exact = (vi)(((vu)exact << INT4_DIGIT_BITS) + (vu)acc[r * digits + 1][v]);
                    vf sum = __builtin_convertvector(exact, vf), total = load(totals[r] + j);
                    if (digits == 2) /* by a power of two: exact */
                        sum = sum * splat(x_scale[r * groups + g]);
                    vf x_sum = digits == 2 ? splat(x_scale[(a->m + r) * groups + g])
                                           : __builtin_convertvector(splat_int(sums[r * groups + g]), vf);
                    total = fma_(sum, factor, total);
                    store(totals[r] + j, has_offset ? fma_(x_sum, added, total) : total);
                }
            }
        }
}

INLINE void int4_rows(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const uint16_t *offset,
                      const int8_t *x, const float *x_scale, const int32_t *sums, float (*totals)[BLOCK],
                      const int digits, const int has_offset, int64_t rows)
{
#define INT4_CASE(n)                                                                                        \
    case n:                                                                                                \
        if (INT4_WHOLE && digits == 2)                                                                     \
            int4_pairs(a, w, scale, offset, x, x_scale, sums, totals, n, has_offset);                      \
        else                                                                                               \
            int4_tile(a, w, scale, offset, x, x_scale, sums, totals, n, digits, has_offset);               \
        break
    switch (rows) {
        INT4_CASE(1);
#if ISA_AVX512 || ISA_AVX2 || ISA_DOTPROD
        INT4_CASE(2);
        INT4_CASE(3);
        INT4_CASE(4);
        INT4_CASE(5);
        INT4_CASE(6);
#endif
    }
#if ISA_AVX512
    if (digits == 1)
        switch (rows) {
            INT4_CASE(7);
            INT4_CASE(8);
        }
#endif
#undef INT4_CASE
}

/* Results of the rows from `row` on, and of a block's outputs. */
INLINE void int4_finish(const struct int4_linear_args *a, int64_t row, int64_t rows, int64_t column, float (*totals)[BLOCK])
{
    const int64_t columns = a->n - column < BLOCK ? a->n - column : BLOCK;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < columns; j += VL) {
            vf y = load(totals[r] + j);
            if (a->digits == 1)
                y = y * a->x_scale[row + r];
            if (a->bias)
                y = y + load_up_to(a->bias + column + j, columns - j);
            store_up_to(a->out + (row + r) * a->n + column + j, y, columns - j);
        }
}

INLINE void int4_blocks(const struct int4_linear_args *a, const int digits, const int has_offset, int thread, int threads)
{
    const int64_t groups = a->k / a->group, most = INT4_ROWS(digits), tiles = int4_tiles(a->m, most);
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < tiles; panel += INT4_PANEL)
        for (int64_t block = from; block < to; block++) {
            const uint8_t *w = a->weight + block * a->k / 2 * BLOCK;
            const uint16_t *scale = a->w_scale + block * groups * BLOCK;
            const uint16_t *offset = has_offset ? a->offset + block * groups * BLOCK : NULL;
            for (int64_t tile = panel; tile < tiles && tile < panel + INT4_PANEL; tile++) {
                const int64_t row = int4_tile_row(a->m, most, tile), rows = int4_tile_row(a->m, most, tile + 1) - row;
                float totals[INT4_MOST_ROWS][BLOCK] __attribute__((aligned(64)));
                memset(totals, 0, sizeof totals);
                int4_rows(a, w, scale, offset, a->x + row * digits * a->k, a->x_scale + row * groups, a->sums + row * groups,
                          totals, digits, has_offset, rows);
                int4_finish(a, row, rows, block * BLOCK, totals);
            }
        }
}

IN_ORDER static void int4_linear(void *data, int thread, int threads)
{
    const struct int4_linear_args *a = data;
    if (a->digits == 2)
        a->offset ? int4_blocks(a, 2, 1, thread, threads) : int4_blocks(a, 2, 0, thread, threads);
    else
        a->offset ? int4_blocks(a, 1, 1, thread, threads) : int4_blocks(a, 1, 0, thread, threads);
}

/* Integers of n inputs from i on, or of the VL lanes, as int4_tile reads them: `unit` inputs of every row at a time, a
 * multiple of `stride` bytes apart. */
INLINE void store_inputs(int8_t *q, int64_t stride, const int64_t unit, int64_t i, vi values, int64_t n, const int digits)
{
#if INT4_WHOLE
    if (digits == 2) { /* inputs 0 and 2, 4 and 6, 1 and 3, 5 and 7 are the nibbles of 16 bits, see pack_int4 */
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)values),
                                        _mm256_extracti128_si256((__m256i)values, 1));
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        _mm_storeu_si128((void *)(q + i / 8 * stride), _mm_shuffle_epi8(words, order));
        return;
    }
#endif
    const vi upper = (values + splat_int(1 << INT4_DIGIT_BITS >> 1)) >> INT4_DIGIT_BITS;
    const vb bytes[2] = {narrow(digits == 2 ? upper : values), narrow(values - (upper << INT4_DIGIT_BITS))};
    for (int digit = 0; digit < digits; digit++)
        for (int j = 0; j < VL && j < n; j += VL < 8 ? VL : 8)
            memcpy(q + (i + j) / unit * stride + digit * unit + (i + j) % unit, (const char *)&bytes[digit] + j, VL < 8 ? VL : 8);
}

/* max|x| of a group, NaN above infinity, as the bits of a float. */
INLINE uint32_t peak_bits(const float *x, int64_t n)
{
    vi top = {0};
    for (int64_t i = 0; i < n; i += VL)
        top = max_int(top, (vi)load_up_to(x + i, n - i) & splat_int(0x7fffffff));
    return (uint32_t)max_int_lanes(top);
}

/* The operand of int4_linear, in tiles of `most` rows, `unit` inputs at a time. Of floats it makes integers of 14 bits,
 * X = 128 u + l, by a power of two that a group shares: 32 times as fine as bfloat16 at the group's peak, and as fine at a
 * 32nd of it. */
INLINE void make_inputs(const struct int4_inputs_args *a, const int digits, const int64_t most, const int64_t unit, int thread,
                        int threads)
{
    const int64_t groups = a->k / a->group;
    int64_t from, to, tile = 0;
    share(groups, thread, threads, &from, &to); /* not rows: those of a tile lie in the same lines */
    for (int64_t row = 0; row < a->m; row++) {
        while (int4_tile_row(a->m, most, tile + 1) <= row)
            tile++;
        const int64_t first = int4_tile_row(a->m, most, tile);
        const int64_t stride = (int4_tile_row(a->m, most, tile + 1) - first) * digits * unit;
        int8_t *q = a->q + first * digits * a->k + (row - first) * digits * unit;
        for (int64_t g = from; g < to; g++) {
            const int64_t at = row * a->k + g * a->group;
            float inverse = 1;
            if (digits == 2) {
                uint32_t peak = peak_bits((const float *)a->x + at, a->group), exponent = peak >> 23;
                exponent = exponent < 27 ? 27 : exponent; /* what is smaller than 2^-100 stays so many steps */
                uint32_t scale = (exponent - 12) << 23, up = (254 + 12 - exponent) << 23;
                if (exponent == 255) /* infinity and NaN become the scale, and with it the row */
                    scale = peak, up = 0;
                memcpy(a->scale + row * groups + g, &scale, 4);
                memcpy(&inverse, &up, 4);
            }
            vi sum = {0};
            for (int64_t i = 0; i < a->group; i += VL) {
                const int64_t n = a->group - i < VL ? a->group - i : VL, k = g * a->group + i;
                vi whole;
                if (!inverse)
                    whole = (vi){0};
                else if (digits == 2)
                    whole = round_to_int(load_up_to((const float *)a->x + at + i, n) * splat(inverse));
                else {
                    vb bytes = {0};
                    memcpy(&bytes, (const int8_t *)a->x + at + i, n < VL ? (size_t)n : sizeof bytes);
                    whole = __builtin_convertvector(bytes, vi);
                }
                store_inputs(q, stride, unit, k, whole, n, digits);
                sum += whole;
            }
            const int32_t total = -8 * sum_int_lanes(sum);
            a->sums[row * groups + g] = total;
            if (digits == 2)
                a->scale[(a->m + row) * groups + g] = (float)total * a->scale[row * groups + g];
        }
    }
}

static void int4_inputs(void *data, int thread, int threads)
{
    const struct int4_inputs_args *a = data;
    make_inputs(a, a->scale ? 2 : 1, INT4_ROWS(a->scale ? 2 : 1), 8, thread, threads);
}
