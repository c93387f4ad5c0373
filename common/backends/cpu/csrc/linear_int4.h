/* out = x @ weight.T + bias with int4 weights in groups along k, a bfloat16 scale each and perhaps an offset: W4A16 and
 * W4A4 over one copy.
 *
 * Both multiply integers with the nibbles as they are, 8 too large, and take 8 times the sum of the group's inputs off.
 * W4A4 has one int8 digit for each input, W4A16 two of 7 bits; or all 14 as int16 where pairs of those are the fastest
 * product (AVX2). A group's sum is an exact integer, so its order is free; it is scaled once. */
#pragma once
#include "simd.h"

#if ISA_AVX512
#define INT4_ROWS(digits) ((digits) == 2 ? 6 : 8) /* that share one pass over a block */
#define INT4_COLUMNS(sums, whole) NV /* vectors of its outputs at a time, of so many sums each: what the registers hold */
#elif ISA_AVX2
#define INT4_ROWS(digits) ((void)(digits), 6)
#define INT4_COLUMNS(sums, whole) ((sums) <= 1 ? NV : (whole) || (sums) <= 3 ? NV / 2 : NV / 4)
#elif ISA_DOTPROD
#define INT4_ROWS(digits) ((void)(digits), 6)
#define INT4_COLUMNS(sums, whole) ((sums) <= (ISA_I8MM ? 2 : 3) ? NV : (sums) <= 6 ? NV / 2 : NV / 4)
#else
#define INT4_ROWS(digits) ((void)(digits), 1)
#define INT4_COLUMNS(sums, whole) NV
#endif
#define INT4_INPUTS (ISA_I8MM ? 8 : 4) /* of an output that lie together */
#define INT4_MOST_ROWS 8
#define INT4_PANEL 10 /* tiles of rows between two reads of the weights */

typedef uint16_t vscale __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf widen_scale(const uint16_t *scale)
{
#if ISA_DOTPROD /* which gcc would take apart lane by lane */
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

/* Rows are divided evenly among as few tiles as there can be: the first row of tile `tile`. */
INLINE int64_t int4_tiles(int64_t m, int digits) { return (m + INT4_ROWS(digits) - 1) / INT4_ROWS(digits); }
INLINE int64_t int4_tile_row(int64_t m, int digits, int64_t tile) { return m * tile / int4_tiles(m, digits); }

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
#define INT4_WHOLE(digits) ((digits) == 2) /* inputs are one int16 instead of two digits */

/* acc[rows][columns] += the products of 8 inputs: pairs of nibbles, one in each half of 32 bits, with pairs of int16. */
INLINE void add_pairs(vi (*acc)[NV], const uint8_t *p, const int8_t *x, const int rows, const int columns)
{
    UNROLL for (int pair = 0; pair < 4; pair++) {
        __m256i nibbles[NV];
        UNROLL for (int v = 0; v < columns; v++)
            nibbles[v] = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256((const void *)(p + v * VL * 4)), 4 * pair),
                                          _mm256_set1_epi16(15));
        UNROLL for (int r = 0; r < rows; r++) {
            __m256i xr = _mm256_set1_epi32(word_at(x + 16 * r + 4 * pair));
            UNROLL for (int v = 0; v < columns; v++)
            {
                acc[r][v] += (vi)_mm256_madd_epi16(nibbles[v], xr);
                KEEP(acc[r][v]);
            }
        }
    }
}
#else
#define INT4_WIDENS 0
#define INT4_STEP INT64_MAX
#define INT4_WHOLE(digits) 0
#define add_pairs(...) (void)0
#endif

#if ISA_DOTPROD
#define INT4_LANES 1 /* the inputs of two sums lie in one register, and the product instructions take their parts of it */

/* acc[4][columns] of two sums, or of one, += the products of 8 inputs. */
INLINE void add_lanes(vi (*acc)[NV], const int v, int8x16_t low, int8x16_t high, int8x16_t x, const int both)
{
#if ISA_I8MM /* of two sums and two outputs: both outputs of the one, then both of the other */
    (void)both;
    acc[0][v] = (vi)vmmlaq_s32((int32x4_t)acc[0][v], x, low);
    acc[1][v] = (vi)vmmlaq_s32((int32x4_t)acc[1][v], x, high);
    KEEP(acc[0][v]);
    KEEP(acc[1][v]);
#else
    acc[0][v] = (vi)vdotq_laneq_s32((int32x4_t)acc[0][v], low, x, 0);
    acc[0][v] = (vi)vdotq_laneq_s32((int32x4_t)acc[0][v], high, x, 1);
    KEEP(acc[0][v]);
    if (both) {
        acc[1][v] = (vi)vdotq_laneq_s32((int32x4_t)acc[1][v], low, x, 2);
        acc[1][v] = (vi)vdotq_laneq_s32((int32x4_t)acc[1][v], high, x, 3);
        KEEP(acc[1][v]);
    }
#endif
}

INLINE int8x16_t two_inputs(const int8_t *x, const int both)
{
    return both ? vld1q_s8(x) : vcombine_s8(vld1_s8(x), vdup_n_s8(0));
}

/* acc[parts][columns] += the products of a group's inputs; it begins the same for all outputs. What waits in registers is what there is less of: inputs, or
 * weights. */
INLINE void add_group(vi (*acc)[NV], const uint8_t *p, const int8_t *x, int64_t group, const int parts, const int columns,
                      const int first)
{
    const int pairs = (parts + 1) / 2;
    const uint8x16_t nibble = vdupq_n_u8(15);
    vi sums[INT4_MOST_ROWS * 2][NV];
    UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++) sums[c][v] = acc[c][v];
#if ISA_I8MM
    UNROLL for (int c = 0; c < pairs; c++) UNROLL for (int v = 0; v < columns; v++) {
        const vi second = 2 * c + 1 < parts ? acc[2 * c + 1][v] : (vi){0};
        sums[2 * c][v] = sums[2 * c + 1][v] = (vi)vzip1q_s64((int64x2_t)acc[2 * c][v], (int64x2_t)second);
    }
#endif
    for (int64_t k = 0; k < group; k += 8, p += BLOCK * 4, x += 8 * parts) {
        if (first) {
            prefetch_weight(p, 1);
            prefetch_weight(p + 64, 1);
        }
        if (pairs <= 3) {
            int8x16_t xr[3];
            UNROLL for (int c = 0; c < pairs; c++) xr[c] = two_inputs(x + 16 * c, 2 * c + 1 < parts);
            UNROLL for (int v = 0; v < columns; v++) {
                const uint8x16_t bytes = vld1q_u8(p + 16 * v);
                const int8x16_t low = (int8x16_t)vandq_u8(bytes, nibble), high = (int8x16_t)vshrq_n_u8(bytes, 4);
                UNROLL for (int c = 0; c < pairs; c++) add_lanes(sums + 2 * c, v, low, high, xr[c], 2 * c + 1 < parts);
            }
        } else {
            int8x16_t low[NV], high[NV];
            UNROLL for (int v = 0; v < columns; v++) {
                const uint8x16_t bytes = vld1q_u8(p + 16 * v);
                low[v] = (int8x16_t)vandq_u8(bytes, nibble);
                high[v] = (int8x16_t)vshrq_n_u8(bytes, 4);
            }
            UNROLL for (int c = 0; c < pairs; c++) {
                const int8x16_t xr = two_inputs(x + 16 * c, 2 * c + 1 < parts);
                UNROLL for (int v = 0; v < columns; v++)
                    add_lanes(sums + 2 * c, v, low[v], high[v], xr, 2 * c + 1 < parts);
            }
        }
    }
    UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++) {
#if ISA_I8MM
        const int64x2_t low = (int64x2_t)sums[c / 2 * 2][v], high = (int64x2_t)sums[c / 2 * 2 + 1][v];
        acc[c][v] = (vi)(c % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
#else
        acc[c][v] = sums[c][v];
#endif
    }
}
#else
#define INT4_LANES 0
#define add_group(...) (void)0
#endif

/* totals[rows][32] of one block. x, x_scale and sums begin with the tile's first row; has_offset is whether there is one. */
INLINE void int4_tile(const struct int4_linear_args *a, const uint8_t *w, const uint16_t *scale, const uint16_t *offset,
                      const int8_t *x, const float *x_scale, const int32_t *sums, float (*totals)[BLOCK], const int rows,
                      const int digits, const int has_offset)
{
    const int whole = INT4_WHOLE(digits), per_row = whole ? 1 : digits, parts = rows * per_row;
    const int columns = INT4_COLUMNS(parts, whole), widens = INT4_WIDENS && !whole;
    const int64_t groups = a->k / a->group;
    const vi nibble = splat_int(0x0f0f0f0f);
    for (int64_t g = 0; g < groups; g++, scale += BLOCK, w += BLOCK * a->group / 2, x += rows * digits * a->group)
        UNROLL for (int v0 = 0; v0 < NV; v0 += columns) {
            vi acc[INT4_MOST_ROWS * 2][NV], wide[INT4_MOST_ROWS * 2][NV]; /* the last digit's sum takes 8 times the inputs off */
            UNROLL for (int c = 0; c < parts; c++) UNROLL for (int v = 0; v < columns; v++)
                acc[c][v] = wide[c][v] = splat_int(c % per_row == per_row - 1 ? sums[c / per_row * groups + g] : 0);
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
                    if (whole) {
                        add_pairs(acc, p, xk, rows, columns);
                        xk += 16 * rows;
                        continue;
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
                    vi exact = acc[r * per_row][v];
                    if (per_row == 2) /* unsigned: half of it may pass 2^31 and come back */
                        exact = (vi)(((vu)exact << INT4_DIGIT_BITS) + (vu)acc[r * per_row + 1][v]);
                    vf sum = __builtin_convertvector(exact, vf), total = load(totals[r] + j);
                    vf x_sum = __builtin_convertvector(splat_int(sums[r * groups + g]), vf);
                    if (digits == 2) { /* by a power of two: exact */
                        sum = sum * splat(x_scale[r * groups + g]);
                        x_sum = x_sum * splat(x_scale[r * groups + g]);
                    }
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
#define INT4_CASE(n) \
    case n: int4_tile(a, w, scale, offset, x, x_scale, sums, totals, n, digits, has_offset); break
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

INLINE void int4_blocks(const struct int4_linear_args *a, const int digits, const int has_offset, int thread, int threads)
{
    const int64_t groups = a->k / a->group, tiles = int4_tiles(a->m, digits);
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < tiles; panel += INT4_PANEL)
        for (int64_t block = from; block < to; block++) {
            const uint8_t *w = a->weight + block * a->k / 2 * BLOCK;
            const uint16_t *scale = a->w_scale + block * groups * BLOCK;
            const uint16_t *offset = has_offset ? a->offset + block * groups * BLOCK : NULL;
            int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t tile = panel; tile < tiles && tile < panel + INT4_PANEL; tile++) {
                const int64_t row = int4_tile_row(a->m, digits, tile), rows = int4_tile_row(a->m, digits, tile + 1) - row;
                float totals[INT4_MOST_ROWS][BLOCK] __attribute__((aligned(64)));
                memset(totals, 0, sizeof totals);
                int4_rows(a, w, scale, offset, a->x + row * digits * a->k, a->x_scale + row * groups, a->sums + row * groups,
                          totals, digits, has_offset, rows);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t j = 0; j < columns; j += VL) {
                        vf y = load(totals[r] + j);
                        if (digits == 1)
                            y = y * a->x_scale[row + r];
                        if (a->bias)
                            y = y + load_up_to(a->bias + column + j, columns - j);
                        store_up_to(a->out + (row + r) * a->n + column + j, y, columns - j);
                    }
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

/* Integers of n inputs from i on, or of the VL lanes, as int4_tile reads them: 8 inputs of every row at a time, a multiple of
 * `stride` bytes apart. */
INLINE void store_inputs(int8_t *q, int64_t stride, int64_t i, vi values, int64_t n, const int digits)
{
#if INT4_WIDENS
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
            memcpy(q + (i + j) / 8 * stride + digit * 8 + (i + j) % 8, (const char *)&bytes[digit] + j, VL < 8 ? VL : 8);
}

/* max|x| of a group, NaN above infinity, as the bits of a float. */
INLINE uint32_t peak_bits(const float *x, int64_t n)
{
    vi top = {0};
    for (int64_t i = 0; i < n; i += VL)
        top = max_int(top, (vi)load_up_to(x + i, n - i) & splat_int(0x7fffffff));
    return (uint32_t)max_int_lanes(top);
}

/* The operand of int4_linear. Of floats it makes integers of 14 bits, X = 128 u + l, by a power of two that a group
 * shares: 32 times as fine as bfloat16 at the group's peak, and as fine at a 32nd of it. */
static void int4_inputs(void *data, int thread, int threads)
{
    const struct int4_inputs_args *a = data;
    const int digits = a->scale ? 2 : 1;
    const int64_t groups = a->k / a->group;
    int64_t from, to, tile = 0;
    share(groups, thread, threads, &from, &to); /* not rows: those of a tile lie in the same lines */
    for (int64_t row = 0; row < a->m; row++) {
        while (int4_tile_row(a->m, digits, tile + 1) <= row)
            tile++;
        const int64_t first = int4_tile_row(a->m, digits, tile);
        const int64_t stride = (int4_tile_row(a->m, digits, tile + 1) - first) * digits * 8;
        int8_t *q = a->q + first * digits * a->k + (row - first) * digits * 8;
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
                store_inputs(q, stride, k, whole, n, digits);
                sum += whole;
            }
            a->sums[row * groups + g] = -8 * sum_int_lanes(sum);
        }
    }
}
