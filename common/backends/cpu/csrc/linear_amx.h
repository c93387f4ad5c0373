/* Products on the tile unit (AMX): 16 rows by 16 outputs by 64 bytes of inputs in one instruction.
 *
 * int8 takes it from more rows on than `int8_tile` has, since its sums are exact either way. Products of bfloat16 take
 * it at every number of rows, because the unit adds in an order of its own. Full precision, float32 inputs and bf16
 * weights, becomes three products of bfloat16: an input of 24 bits is the sum of three numbers of 8 bits, exactly, and
 * what the unit adds up is float32. That is a third of the unit's speed and still several times that of multiply-adds.
 * (The unit takes subnormal numbers for zero.) */
#pragma once
#include "amx.h"
#include "linear_float.h"
#include "linear_int8.h"

#if ISA_AMX
#define AMX_PANEL 64            /* rows that share one read of a block from memory */
#define AMX_BUFFER (512 << 10)  /* bytes of split inputs on the stack: what leaves room for weights in the L2 cache */

/* What a call of a tile does: sums[rows][32] = begin + x @ weights of a block over `steps` times 64 bytes of inputs. Strides
 * are in bytes. */
struct amx_tile {
    const char *w, *x, *begin;
    char *sums;
    int64_t next;                      /* from w to the weights of the next block */
    int64_t stride, part, steps;       /* x: matrices, `part` apart, whose products are added up */
    int64_t begin_stride, begin_right; /* from row to row, and to the right half */
    int64_t sums_stride;
};

/* Rows are those of the configuration, more than 16 where `two`. */
#define AMX_TILE(name, multiply)                                                                                      \
    INLINE void name(const struct amx_tile *t, const int parts, const int two)                                        \
    {                                                                                                                 \
        const char *w = t->w, *x = t->x;                                                                              \
        const char *lower = t->begin + 16 * t->begin_stride;                                                          \
        _tile_loadd(0, t->begin, t->begin_stride);                                                                    \
        _tile_loadd(1, t->begin + t->begin_right, t->begin_stride);                                                   \
        if (two) {                                                                                                    \
            _tile_loadd(2, lower, t->begin_stride);                                                                   \
            _tile_loadd(3, lower + t->begin_right, t->begin_stride);                                                  \
        }                                                                                                             \
        for (int64_t step = 0; step < t->steps; step++, w += 16 * BLOCK * 4, x += 64) {                               \
            __builtin_prefetch(w + t->next, 0, 2); /* two lines of 32: the hardware's prefetcher goes on from them, */ \
            __builtin_prefetch(w + t->next + 1024, 0, 2); /* and more would be in the way of the tiles' own loads */  \
            _tile_loadd(6, w, BLOCK * 4);                                                                             \
            _tile_loadd(7, w + 64, BLOCK * 4);                                                                        \
            for (int p = 0; p < parts; p++) {                                                                         \
                _tile_loadd(4, x + p * t->part, t->stride);                                                           \
                multiply(0, 4, 6);                                                                                    \
                multiply(1, 4, 7);                                                                                    \
                if (two) {                                                                                            \
                    _tile_loadd(5, x + p * t->part + 16 * t->stride, t->stride);                                      \
                    multiply(2, 5, 6);                                                                                \
                    multiply(3, 5, 7);                                                                                \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        _tile_stored(0, t->sums, t->sums_stride);                                                                     \
        _tile_stored(1, t->sums + 64, t->sums_stride);                                                                \
        if (two) {                                                                                                    \
            _tile_stored(2, t->sums + 16 * t->sums_stride, t->sums_stride);                                           \
            _tile_stored(3, t->sums + 16 * t->sums_stride + 64, t->sums_stride);                                      \
        }                                                                                                             \
    }
AMX_TILE(amx_int8_tile, _tile_dpbsud) /* x signed, weights with their shift unsigned */
AMX_TILE(amx_bf16_tile, _tile_dpbf16ps)

static void amx_int8_linear(void *data, int thread, int threads)
{
    const struct int8_linear_args *a = data;
    const int64_t inputs = a->k4 * 4, digits = has_digits(a), m = a->m << digits;
    if (inputs % 64) {
        int8_linear(data, thread, threads);
        return;
    }
    int64_t from, to, configured = 0;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < m; panel += AMX_PANEL) {
        const int64_t end = panel + AMX_PANEL < m ? panel + AMX_PANEL : m;
        int32_t shift[AMX_PANEL][16] __attribute__((aligned(64))), sums[AMX_ROWS][BLOCK] __attribute__((aligned(64)));
        for (int64_t row = panel; row < end; row++) { /* unsigned: the sums may pass 2^31 and come back */
            uint32_t sum = (uint32_t)sum_int8((const int8_t *)a->x + row * inputs, inputs);
            *(vi *)shift[row - panel] = splat_int((int32_t)-(INT8_SHIFT * sum));
        }
        for (int64_t block = from; block < to; block++)
            for (int64_t row = panel; row < end; row += AMX_ROWS) {
                const int64_t rows = end - row < AMX_ROWS ? end - row : AMX_ROWS;
                if (rows != configured)
                    amx_configure(configured = rows);
                struct amx_tile t = {
                    .w = (const char *)a->weight + block * inputs * BLOCK, .next = inputs * BLOCK,
                    .x = (const char *)a->x + row * inputs, .stride = inputs, .steps = inputs / 64,
                    .begin = (const char *)shift[row - panel], .begin_stride = sizeof *shift,
                    .sums = (char *)sums, .sums_stride = sizeof *sums,
                };
                if (rows > 16)
                    amx_int8_tile(&t, 1, 1);
                else
                    amx_int8_tile(&t, 1, 0);
                finish_int8(a, row >> digits, rows >> digits, block * BLOCK, sums[0], BLOCK);
            }
    }
    _tile_release();
}

/* x = high + middle + low, each of 8 bits, cut off rather than rounded: so nothing overflows. Of what is not finite the
 * rest is zero. parts: bfloat16 [3][rows][k], from float32 rows `stride` apart; k is a multiple of 32. */
static void amx_split(const float *x, int64_t stride, int64_t rows, int64_t k, uint16_t *parts)
{
    const vi high_half = splat_int((int32_t)0xffff0000), exponent = splat_int(0x7f800000);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i += VL) {
            vf rest = load(x + r * stride + i);
            const vi finite = ((vi)rest & exponent) != exponent;
            for (int p = 0; p < 3; p++) {
                vi cut = (vi)rest & high_half;
                if (p == 0) /* a NaN must not become an infinity */
                    cut |= ~finite & (((vi)rest & splat_int(0xffff)) != 0) & splat_int(0x400000);
                _mm256_storeu_si256((void *)(parts + (p * rows + r) * k + i),
                                    _mm512_cvtepi32_epi16((__m512i)((vu)cut >> 16)));
                rest = (vf)((vi)(rest - (vf)cut) & finite);
            }
        }
}

INLINE void amx_float_linear(const struct float_linear_args *a, const int parts, int thread, int threads)
{
    int64_t from, to, configured = 0;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    uint16_t split[AMX_BUFFER / 2] __attribute__((aligned(64)));
    static const float zeros[BLOCK] __attribute__((aligned(64)));
    for (int64_t panel = 0; panel < a->m; panel += AMX_PANEL) {
        const int64_t end = panel + AMX_PANEL < a->m ? panel + AMX_PANEL : a->m, panel_rows = end - panel;
        const int64_t most = parts == 1 ? a->k : AMX_BUFFER / 6 / panel_rows / 32 * 32;
        for (int64_t k = 0; k < a->k; k += most) {
            const int64_t taken = a->k - k < most ? a->k - k : most, stride = (parts == 1 ? a->k : taken) * 2;
            const char *x = (const char *)a->x + panel * stride;
            if (parts > 1) {
                amx_split((const float *)a->x + panel * a->k + k, a->k, panel_rows, taken, split);
                x = (const char *)split;
            }
            for (int64_t block = from; block < to; block++) {
                const int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
                for (int64_t row = 0; row < panel_rows; row += AMX_ROWS) {
                    const int64_t rows = panel_rows - row < AMX_ROWS ? panel_rows - row : AMX_ROWS;
                    float sums[AMX_ROWS][BLOCK] __attribute__((aligned(64)));
                    float *out = a->out + (panel + row) * a->n + column;
                    if (rows != configured)
                        amx_configure(configured = rows);
                    struct amx_tile t = {
                        .w = (const char *)a->weight + (block * a->k + k) * BLOCK * 2, .next = a->k * BLOCK * 2,
                        .x = x + row * stride, .stride = stride, .part = panel_rows * stride, .steps = taken / 32, .begin = (const char *)zeros,
                        .sums = (char *)out, .sums_stride = a->n * (int64_t)sizeof *out,
                    };
                    if (columns < BLOCK) {
                        t.sums = (char *)sums;
                        t.sums_stride = sizeof *sums;
                    }
                    if (k) { /* what is unfinished waits in `out`, to the bit */
                        for (int64_t r = 0; r < rows && columns < BLOCK; r++)
                            memcpy(sums[r], out + r * a->n, (size_t)columns * sizeof *out);
                        t.begin = t.sums;
                        t.begin_stride = t.sums_stride;
                        t.begin_right = 64;
                    }
                    if (rows > 16)
                        amx_bf16_tile(&t, parts, 1);
                    else
                        amx_bf16_tile(&t, parts, 0);
                    for (int64_t r = 0; r < rows && columns < BLOCK; r++)
                        memcpy(out + r * a->n, sums[r], (size_t)columns * sizeof *out);
                    for (int64_t r = 0; r < rows && a->bias && k + taken == a->k; r++)
                        for (int64_t j = 0; j < columns; j += VL) {
                            float *y = out + r * a->n + j;
                            vf sum = load_up_to(y, columns - j) + load_up_to(a->bias + column + j, columns - j);
                            store_up_to(y, sum, columns - j);
                        }
                }
            }
        }
    }
    _tile_release();
}

/* Inputs that no tile takes whole go another way, at every number of rows. */
static void amx_bf16_linear(void *data, int thread, int threads)
{
    const struct float_linear_args *a = data;
    if (a->k % 32)
        bf16_linear(data, thread, threads);
    else
        amx_float_linear(a, 3, thread, threads);
}

static void amx_rounded_linear(void *data, int thread, int threads)
{
    const struct float_linear_args *a = data;
    if (a->k % 32)
        rounded_linear(data, thread, threads);
    else
        amx_float_linear(a, 1, thread, threads);
}

#define int8_linear amx_int8_linear
#define bf16_linear amx_bf16_linear
#undef rounded_linear
#define rounded_linear amx_rounded_linear
#endif
