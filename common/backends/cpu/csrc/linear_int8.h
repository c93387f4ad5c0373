/* out = (x @ weight.T) * x_scale * w_scale + bias with int8 operands and exact int32 sums.
 *
 * A decode pass is bound by reading the weights: each thread walks its outputs from first byte to last, and a tile of
 * rows shares what was read. More rows than a tile take a chunk of inputs at a time, whose weights stay in the L1 cache
 * from tile to tile. Sums of integers are exact, so their order is free.
 *
 * Each instruction set reads a layout of its own (`struct layout`, which packing asks for):
 *   dot products of four (VNNI)   x stays int8, weights are 128 too large, and the row's sum undoes that;
 *   pairs of int16 (AVX2)         both operands are widened, x once per call, the weights as they are read. Two
 *                                 instructions a pair, as many as `maddubs` on |x| and sign(w, x) would need with its
 *                                 `sign`, on fewer multiplier slots, and -128 is a value as any other. Wide inputs
 *                                 (`digits`) come as int16 and cost the same;
 *   dot products of aarch64       both operands are signed;
 *   products of 2 by 8 (i8mm)     two rows with two outputs, 8 inputs of each: x is copied in that order once per call. */
#pragma once
#include "simd.h"

#if ISA_AVX512
#define INT8_ROWS 8      /* rows of a tile: what the registers hold */
#define INT8_WIDTH 32    /* outputs of a tile */
#define INT8_INPUTS 4    /* inputs of an output that lie together */
#define INT8_SHIFT 128u  /* what the packed weights are too large by */
#elif ISA_AVXVNNI
#define INT8_ROWS 6
#define INT8_WIDTH 16
#define INT8_INPUTS 4
#define INT8_SHIFT 128u
#elif ISA_AVX2
#define INT8_ROWS 6
#define INT8_WIDTH 16
#define INT8_INPUTS 2
#define INT8_SHIFT 0u
#define INT8_WIDENS 1    /* x is widened to int16 first */
#elif ISA_I8MM
#define INT8_ROWS 6
#define INT8_WIDTH 16
#define INT8_INPUTS 8
#define INT8_SHIFT 0u
#define INT8_TOGETHER 2  /* rows that one instruction multiplies: x is copied so that they lie together */
#define INT8_CHUNK 1024
#elif ISA_DOTPROD
#define INT8_ROWS 6
#define INT8_WIDTH 16
#define INT8_INPUTS 4
#define INT8_SHIFT 0u
#else
#define INT8_ROWS 4
#define INT8_WIDTH 8
#define INT8_INPUTS 4
#define INT8_SHIFT 0u
#endif
#ifndef INT8_WIDENS
#define INT8_WIDENS 0
#endif
#ifndef INT8_TOGETHER
#define INT8_TOGETHER 1
#endif
#ifndef INT8_CHUNK
#define INT8_CHUNK 512   /* inputs whose weights all tiles of a panel read before the next */
#endif
#define INT8_PANEL 64    /* rows between two reads of the weights */
#define INT8_COPIES (INT8_WIDENS || INT8_TOGETHER > 1) /* whether x is copied, once per call, for the tiles to read */

#if INT8_WIDENS
typedef int16_t int8_input;
#else
typedef int8_t int8_input;
#endif
#define INT8_BUFFER ((int64_t)(65536 / sizeof(int8_input))) /* copied inputs on the stack: 64 KiB */

INLINE int32_t four(const void *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

/* Inputs of an output as they are packed: whole groups of those that lie together. */
INLINE int64_t packed_inputs(const struct int8_linear_args *a)
{
    return (a->k4 * 4 + INT8_INPUTS - 1) / INT8_INPUTS * INT8_INPUTS;
}

/* sums[rows][INT8_WIDTH] += (weight + INT8_SHIFT) * x over k inputs, a multiple of 4 and of INT8_INPUTS. x: rows `stride`
 * apart; or pairs of them two strides apart, 8 inputs of the one and then of the other, and `rows` is even. */
INLINE void int8_tile(const uint8_t *w, const int8_input *x, int64_t stride, int64_t k, const int rows,
                      const int once, int32_t (*sums)[INT8_WIDTH])
{
    (void)once;
#if ISA_AVX512
    __m512i acc[INT8_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++)
        acc[r][v] = _mm512_loadu_si512(sums[r] + 16 * v);
    for (int64_t i = 0; i < k; i += 4, w += 128) {
        prefetch_weight(w, once);
        prefetch_weight(w + 64, once);
        __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512i xr = _mm512_set1_epi32(four(x + r * stride + i));
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, xr);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, xr);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++)
        _mm512_storeu_si512(sums[r] + 16 * v, acc[r][v]);
#elif ISA_AVX2
    __m256i acc[INT8_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++)
        acc[r][v] = _mm256_loadu_si256((const void *)(sums[r] + 8 * v));
    for (int64_t i = 0; i < k; i += 4, w += 64) {
        prefetch_weight(w, once);
#if ISA_AVXVNNI
        __m256i w0 = _mm256_loadu_si256((const void *)w), w1 = _mm256_loadu_si256((const void *)(w + 32));
        UNROLL for (int r = 0; r < rows; r++) {
            __m256i xr = _mm256_set1_epi32(four(x + r * stride + i));
            acc[r][0] = _mm256_dpbusd_avx_epi32(acc[r][0], w0, xr);
            acc[r][1] = _mm256_dpbusd_avx_epi32(acc[r][1], w1, xr);
        }
#else
        UNROLL for (int pair = 0; pair < 2; pair++) {
            const uint8_t *p = w + 32 * pair;
            __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
            __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(p + 16)));
            UNROLL for (int r = 0; r < rows; r++) {
                __m256i xr = _mm256_set1_epi32(four(x + r * stride + i + 2 * pair));
                acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(w0, xr));
                acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(w1, xr));
                KEEP(acc[r][0]);
                KEEP(acc[r][1]);
            }
        }
#endif
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++)
        _mm256_storeu_si256((void *)(sums[r] + 8 * v), acc[r][v]);
#elif ISA_I8MM
    int32x4_t acc[INT8_ROWS / 2][8]; /* of two rows and two outputs: both of the one row, then both of the other */
    UNROLL for (int r = 0; r < rows; r += 2) UNROLL for (int v = 0; v < 4; v++) {
        int64x2_t row = vreinterpretq_s64_s32(vld1q_s32(sums[r] + 4 * v));
        int64x2_t next = vreinterpretq_s64_s32(vld1q_s32(sums[r + 1] + 4 * v));
        acc[r / 2][2 * v] = vreinterpretq_s32_s64(vzip1q_s64(row, next));
        acc[r / 2][2 * v + 1] = vreinterpretq_s32_s64(vzip2q_s64(row, next));
    }
    for (int64_t i = 0; i < k; i += 8, w += 128) {
        int8x16_t xr[INT8_ROWS / 2];
        UNROLL for (int r = 0; r < rows; r += 2) xr[r / 2] = vld1q_s8(x + r * stride + 2 * i);
        UNROLL for (int v = 0; v < 8; v++) {
            int8x16_t weights = vld1q_s8((const int8_t *)w + 16 * v);
            UNROLL for (int p = 0; p < rows / 2; p++) acc[p][v] = vmmlaq_s32(acc[p][v], xr[p], weights);
        }
    }
    UNROLL for (int r = 0; r < rows; r += 2) UNROLL for (int v = 0; v < 4; v++) {
        int64x2_t first = vreinterpretq_s64_s32(acc[r / 2][2 * v]), second = vreinterpretq_s64_s32(acc[r / 2][2 * v + 1]);
        vst1q_s32(sums[r] + 4 * v, vreinterpretq_s32_s64(vzip1q_s64(first, second)));
        vst1q_s32(sums[r + 1] + 4 * v, vreinterpretq_s32_s64(vzip2q_s64(first, second)));
    }
#elif ISA_DOTPROD
    int32x4_t acc[INT8_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) acc[r][v] = vld1q_s32(sums[r] + 4 * v);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) { /* a register of x holds four operands */
        int8x16_t xr[INT8_ROWS];
        UNROLL for (int r = 0; r < rows; r++) xr[r] = vld1q_s8(x + r * stride + i);
#define LANE(lane)                                                                                                     \
    UNROLL for (int v = 0; v < 4; v++, w += 16) {                                                                      \
        const int8x16_t weights = vld1q_s8((const int8_t *)w);                                                         \
        UNROLL for (int r = 0; r < rows; r++) acc[r][v] = vdotq_laneq_s32(acc[r][v], weights, xr[r], lane);            \
    }
        LANE(0) LANE(1) LANE(2) LANE(3)
#undef LANE
    }
    for (; i < k; i += 4, w += 64) {
        int8x16_t weights[4];
        UNROLL for (int v = 0; v < 4; v++) weights[v] = vld1q_s8((const int8_t *)w + 16 * v);
        UNROLL for (int r = 0; r < rows; r++) {
            int8x16_t xr = vreinterpretq_s8_s32(vdupq_n_s32(four(x + r * stride + i)));
            UNROLL for (int v = 0; v < 4; v++) acc[r][v] = vdotq_s32(acc[r][v], weights[v], xr);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 4; v++) vst1q_s32(sums[r] + 4 * v, acc[r][v]);
#else
    for (int r = 0; r < rows; r++) {
        const int8_t *p = (const int8_t *)w;
        for (int64_t i = 0; i < k; i += 4, p += 4 * INT8_WIDTH) {
            const int8_t *xr = x + r * stride + i;
            for (int j = 0; j < INT8_WIDTH; j++)
                sums[r][j] += p[4 * j] * xr[0] + p[4 * j + 1] * xr[1] + p[4 * j + 2] * xr[2] + p[4 * j + 3] * xr[3];
        }
    }
#endif
}

/* Rows must be a constant for the accumulators to live in registers. */
#if !ISA_I8MM /* whose loads come in pairs otherwise */
IN_ORDER
#endif
NOINLINE void int8_rows(const uint8_t *w, const int8_input *x, int64_t stride, int64_t k, int64_t rows,
                        int once, int32_t (*sums)[INT8_WIDTH])
{
#define ROWS(n) case n: once ? int8_tile(w, x, stride, k, n, 1, sums) : int8_tile(w, x, stride, k, n, 0, sums); break
    switch (rows) {
    ROWS(2); ROWS(4);
#if INT8_TOGETHER == 1
    ROWS(1); ROWS(3);
#if INT8_ROWS >= 6
    ROWS(5);
#endif
#endif
#if INT8_ROWS >= 6
    ROWS(6);
#endif
#if INT8_ROWS >= 8
    ROWS(7); ROWS(8);
#endif
    }
#undef ROWS
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
#elif ISA_AVXVNNI
    vi acc = {0};
    for (; i + 32 <= n; i += 32)
        acc = (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, _mm256_set1_epi8(1), _mm256_loadu_si256((const void *)(x + i)));
    for (int lane = 0; lane < VL; lane++)
        sum += acc[lane];
#endif
    for (; i < n; i++)
        sum += x[i];
    return sum;
}

/* Whether x has two rows of digits, one after the other, for each row of the result. */
INLINE int has_digits(const struct int8_linear_args *a) { return a->wide && !INT8_WIDENS; }

/* Results of the rows from `row` on, and of up to `width` outputs from `column` on. sums: int32 [rows, or twice that of
 * digits][width]. Those of both digits are one sum of int32 again: exactly what the whole numbers would have given. */
INLINE void finish_int8(const struct int8_linear_args *a, int64_t row, int64_t rows, int64_t column, const int32_t *sums,
                        const int64_t width)
{
    const int digits = has_digits(a);
    for (int64_t j = 0; j < width && column + j < a->n; j += VL) {
        const int64_t left = a->n - column - j;
        const vf scale = load_up_to(a->w_scale + column + j, left);
        const vf bias = a->bias ? load_up_to(a->bias + column + j, left) : (vf){0};
        float *out = a->out + row * a->n + column + j;
        for (int64_t r = 0; r < rows; r++, out += a->n) {
            vi sum = *(const vi_any *)(sums + (r << digits) * width + j);
            if (digits) /* unsigned: what is shifted may pass 2^31 and come back */
                sum = (vi)(((vu)sum << DIGIT_BITS) + (vu)*(const vi_any *)(sums + (2 * r + 1) * width + j));
            vf y = __builtin_convertvector(sum, vf) * splat(a->x_scale[row + r]) * scale;
            store_up_to(out, a->bias ? y + bias : y, left);
        }
    }
}

/* The rows [first, last) of x with INT8_WIDTH outputs. The sums begin at zero, or at those of the inputs before `k`; inputs
 * [k, k_end) are added. x has a row of zeros more where rows are multiplied two by two and one is left. */
INLINE void int8_outputs(const struct int8_linear_args *a, int64_t group, int64_t first, int64_t last, int64_t k,
                         int64_t k_end, const int8_input *x, int64_t stride, int64_t chunk_stride, const int32_t *x_sum)
{
    const int64_t inputs = packed_inputs(a), column = group * INT8_WIDTH, rows = last - first;
    const int64_t columns = a->n - column < INT8_WIDTH ? a->n - column : INT8_WIDTH;
    const int64_t units = (rows + INT8_TOGETHER - 1) / INT8_TOGETHER, most = INT8_ROWS / INT8_TOGETHER;
    const int64_t tiles = (units + most - 1) / most, chunk = tiles == 1 && !chunk_stride ? inputs : INT8_CHUNK;
    int32_t sums[INT8_PANEL][INT8_WIDTH] __attribute__((aligned(64)));
    /* What is unfinished waits where the result will be: an int32 takes a float's place. */
    int32_t *waiting = (int32_t *)a->out + first * a->n + column;
    for (int64_t r = 0; r < units * INT8_TOGETHER; r++) {
        uint32_t shift = INT8_SHIFT && !k ? INT8_SHIFT * (uint32_t)x_sum[r] : 0; /* the sums may pass 2^31 and come back */
        if (!k || r >= rows)
            for (int j = 0; j < INT8_WIDTH; j++)
                sums[r][j] = (int32_t)-shift;
        else
            memcpy(sums[r], waiting + r * a->n, (size_t)columns * sizeof(int32_t));
    }
    const uint8_t *w = a->weight + (group * inputs + k) * INT8_WIDTH;
    for (; k < k_end; k += chunk, w += chunk * INT8_WIDTH, x += chunk_stride ? chunk_stride : chunk) {
        int64_t taken = k_end - k < chunk ? k_end - k : chunk;
        for (int64_t tile = 0, row = 0; tile < tiles; tile++) {
            int64_t next = units * (tile + 1) / tiles * INT8_TOGETHER;
            int8_rows(w, x + row * stride, stride, taken, next - row, tile == 0, sums + row);
            row = next;
        }
    }
    if (k_end == inputs)
        finish_int8(a, first >> has_digits(a), rows >> has_digits(a), column, sums[0], INT8_WIDTH);
    else
        for (int64_t r = 0; r < rows; r++)
            memcpy(waiting + r * a->n, sums[r], (size_t)columns * sizeof(int32_t));
}

#if INT8_TOGETHER == 2
/* Inputs [from, end) of x, [chunks][pairs of rows][INT8_CHUNK / 8][2][8], zeros behind the last row and input. */
static void copy_int8(const struct int8_linear_args *a, int64_t first, int64_t rows, int64_t from, int64_t end,
                      int8_t *copy)
{
    const int64_t inputs = a->k4 * 4;
    for (; from < end; from += INT8_CHUNK)
        for (int64_t r = 0; r < rows; r += 2, copy += 2 * INT8_CHUNK) {
            const int8_t *row = (const int8_t *)a->x + (first + r) * inputs + from, *next = row + inputs;
            const int64_t chunk_end = end < inputs ? end : inputs;
            const int64_t taken = chunk_end - from < INT8_CHUNK ? chunk_end - from : INT8_CHUNK;
            int64_t i = 0;
            for (; i + 8 <= taken; i += 8) {
                memcpy(copy + 2 * i, row + i, 8);
                if (r + 1 < rows)
                    memcpy(copy + 2 * i + 8, next + i, 8);
                else
                    memset(copy + 2 * i + 8, 0, 8);
            }
            if (i < taken) { /* four more */
                memset(copy + 2 * i, 0, 16);
                memcpy(copy + 2 * i, row + i, 4);
                if (r + 1 < rows)
                    memcpy(copy + 2 * i + 8, next + i, 4);
            }
        }
}
#elif INT8_WIDENS
/* Inputs [from, end) of x, int16, [chunks][rows][INT8_CHUNK]: rows a constant apart, so that a tile needs no address for
 * each of them. */
static void copy_int8(const struct int8_linear_args *a, int64_t first, int64_t rows, int64_t from, int64_t end,
                      int16_t *wide)
{
    for (; from < end; from += INT8_CHUNK)
        for (int64_t r = 0; r < rows; r++, wide += INT8_CHUNK) {
            int64_t taken = end - from < INT8_CHUNK ? end - from : INT8_CHUNK, i = 0;
            int64_t at = (first + r) * a->k4 * 4 + from;
            if (a->wide) {
                memcpy(wide, (const int16_t *)a->x + at, (size_t)taken * sizeof *wide);
                continue;
            }
            const int8_t *source = (const int8_t *)a->x + at;
            for (; i + 16 <= taken; i += 16)
                _mm256_storeu_si256((void *)(wide + i),
                                    _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(source + i))));
            for (; i < taken; i++)
                wide[i] = source[i];
        }
}
#endif

INLINE void int8_panel(const struct int8_linear_args *a, int64_t first, int64_t last, int64_t from, int64_t to)
{
    const int64_t inputs = packed_inputs(a);
#if INT8_COPIES
    int8_input copy[INT8_BUFFER] __attribute__((aligned(64)));
    const int64_t rows = last - first, room = (rows + INT8_TOGETHER - 1) / INT8_TOGETHER * INT8_TOGETHER;
    const int64_t most = INT8_BUFFER / INT8_CHUNK / room * INT8_CHUNK;
    for (int64_t k = 0; k < inputs; k += most) {
        int64_t k_end = k + most < inputs ? k + most : inputs;
        copy_int8(a, first, rows, k, k_end, copy);
        for (int64_t group = from; group < to; group++)
            int8_outputs(a, group, first, last, k, k_end, copy, INT8_CHUNK, room * INT8_CHUNK, NULL);
    }
#else
    const int8_t *x = a->x;
    int32_t x_sum[INT8_PANEL];
    for (int64_t row = first; INT8_SHIFT && row < last; row++)
        x_sum[row - first] = sum_int8(x + row * inputs, inputs);
    for (int64_t group = from; group < to; group++)
        int8_outputs(a, group, first, last, 0, inputs, x + first * inputs, inputs, 0, x_sum);
#endif
}

static void int8_linear(void *data, int thread, int threads)
{
    const struct int8_linear_args *a = data;
    int64_t from, to, rows = a->m << has_digits(a);
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    const int64_t groups = (a->n + INT8_WIDTH - 1) / INT8_WIDTH;
    from *= BLOCK / INT8_WIDTH;
    to *= BLOCK / INT8_WIDTH;
    for (int64_t panel = 0; panel < rows; panel += INT8_PANEL)
        int8_panel(a, panel, panel + INT8_PANEL < rows ? panel + INT8_PANEL : rows, from, to < groups ? to : groups);
}
