/* Products on the tile unit (AMX): 16 rows by 16 outputs by 64 bytes of inputs in one instruction.
 *
 * int8 takes it from more rows on than `int8_tile` has, since its sums are exact either way. Products of bfloat16 take
 * it at every number of rows, because the unit adds in an order of its own. Full precision, float32 inputs and bf16
 * weights, becomes three products of bfloat16: an input of 24 bits is the sum of three numbers of 8 bits, exactly, and
 * what the unit adds up is float32. That is a third of the unit's speed and still several times that of multiply-adds.
 * (The unit takes subnormal numbers for zero.) */
#pragma once
#include "linear_float.h"
#include "linear_int8.h"

#if ISA_AMX
#define AMX_ROWS 32             /* rows of a call: two tiles */
#define AMX_PANEL 64            /* rows that share one read of a block from memory */
#define AMX_BUFFER (192 << 10)  /* bytes of split inputs on the stack: what leaves room for weights in the L2 cache */

/* Tiles 0 to 3: sums, two by two; 4, 5: rows of x; 6, 7: 32 outputs' weights. */
static void amx_configure(int64_t rows)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    const int64_t first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i >= 6 ? 16 : i < 4 ? (i < 2 ? first : second) : i == 4 ? first : second);
    }
    _tile_loadconfig(&config);
}

/* sums[rows][32] += x @ weights of a block over `steps` times 64 bytes of inputs. x: `parts` matrices, `part` bytes
 * apart, whose products are added up. Rows are those of the configuration, more than 16 where `two`. */
#define AMX_TILE(name, multiply)                                                                                      \
    INLINE void name(const char *w, const char *x, int64_t stride, int64_t part, const int parts, int64_t steps,      \
                     const int two, int once, void *sums)                                                             \
    {                                                                                                                 \
        char *lower = (char *)sums + 16 * BLOCK * 4;                                                                  \
        _tile_loadd(0, sums, BLOCK * 4);                                                                              \
        _tile_loadd(1, (char *)sums + 64, BLOCK * 4);                                                                 \
        if (two) {                                                                                                    \
            _tile_loadd(2, lower, BLOCK * 4);                                                                         \
            _tile_loadd(3, lower + 64, BLOCK * 4);                                                                    \
        }                                                                                                             \
        for (int64_t step = 0; step < steps; step++, w += 16 * BLOCK * 4, x += 64) {                                  \
            if (once)                                                                                                 \
                for (int line = 0; line < 32; line++)                                                                 \
                    __builtin_prefetch(w + 4096 + 64 * line, 0, 2);                                                   \
            _tile_loadd(6, w, BLOCK * 4);                                                                             \
            _tile_loadd(7, w + 64, BLOCK * 4);                                                                        \
            for (int p = 0; p < parts; p++) {                                                                         \
                _tile_loadd(4, x + p * part, stride);                                                                 \
                multiply(0, 4, 6);                                                                                    \
                multiply(1, 4, 7);                                                                                    \
                if (two) {                                                                                            \
                    _tile_loadd(5, x + p * part + 16 * stride, stride);                                               \
                    multiply(2, 5, 6);                                                                                \
                    multiply(3, 5, 7);                                                                                \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        _tile_stored(0, sums, BLOCK * 4);                                                                             \
        _tile_stored(1, (char *)sums + 64, BLOCK * 4);                                                                \
        if (two) {                                                                                                    \
            _tile_stored(2, lower, BLOCK * 4);                                                                        \
            _tile_stored(3, lower + 64, BLOCK * 4);                                                                   \
        }                                                                                                             \
    }
AMX_TILE(amx_int8_tile, _tile_dpbsud) /* x signed, weights with their shift unsigned */
AMX_TILE(amx_bf16_tile, _tile_dpbf16ps)

static void amx_int8_linear(void *data, int thread, int threads)
{
    const struct int8_linear_args *a = data;
    const int64_t inputs = a->k4 * 4;
    if (inputs % 64) {
        int8_linear(data, thread, threads);
        return;
    }
    int64_t from, to, configured = 0;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    for (int64_t panel = 0; panel < a->m; panel += AMX_PANEL) {
        const int64_t end = panel + AMX_PANEL < a->m ? panel + AMX_PANEL : a->m;
        int32_t shift[AMX_PANEL], sums[AMX_ROWS][BLOCK] __attribute__((aligned(64)));
        for (int64_t row = panel; row < end; row++) /* unsigned: the sums may pass 2^31 and come back */
            shift[row - panel] = (int32_t)-(INT8_SHIFT * (uint32_t)sum_int8((const int8_t *)a->x + row * inputs, inputs));
        for (int64_t block = from; block < to; block++) {
            const char *w = (const char *)a->weight + block * inputs * BLOCK;
            const int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t row = panel; row < end; row += AMX_ROWS) {
                const int64_t rows = end - row < AMX_ROWS ? end - row : AMX_ROWS;
                if (rows != configured)
                    amx_configure(configured = rows);
                for (int64_t r = 0; r < rows; r++)
                    for (int j = 0; j < BLOCK; j++)
                        sums[r][j] = shift[row - panel + r];
                const char *x = (const char *)a->x + row * inputs;
                if (rows > 16)
                    amx_int8_tile(w, x, inputs, 0, 1, inputs / 64, 1, row == panel, sums);
                else
                    amx_int8_tile(w, x, inputs, 0, 1, inputs / 64, 0, row == panel, sums);
                for (int64_t r = 0; r < rows; r++)
                    finish_int8(a, row + r, column, columns, sums[r]);
            }
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
                const char *w = (const char *)a->weight + (block * a->k + k) * BLOCK * 2;
                const int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
                for (int64_t row = 0; row < panel_rows; row += AMX_ROWS) {
                    const int64_t rows = panel_rows - row < AMX_ROWS ? panel_rows - row : AMX_ROWS;
                    float sums[AMX_ROWS][BLOCK] __attribute__((aligned(64)));
                    float *out = a->out + (panel + row) * a->n + column;
                    if (rows != configured)
                        amx_configure(configured = rows);
                    for (int64_t r = 0; r < rows; r++) /* what is unfinished waits in `out`, to the bit */
                        for (int64_t j = 0; j < BLOCK; j += VL)
                            store(sums[r] + j, k && j < columns ? load_up_to(out + r * a->n + j, columns - j) : (vf){0});
                    const char *xr = x + row * stride;
                    if (rows > 16)
                        amx_bf16_tile(w, xr, stride, panel_rows * stride, parts, taken / 32, 1, row == 0, sums);
                    else
                        amx_bf16_tile(w, xr, stride, panel_rows * stride, parts, taken / 32, 0, row == 0, sums);
                    const int last = k + taken == a->k;
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t j = 0; j < columns; j += VL) {
                            vf y = load(sums[r] + j);
                            if (last && a->bias)
                                y = y + load_up_to(a->bias + column + j, columns - j);
                            store_up_to(out + r * a->n + j, y, columns - j);
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
