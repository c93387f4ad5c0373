/* int4 products of many rows on the tile unit (AMX), with the bits that linear_int4.h gives.
 *
 * The nibbles of some groups become signed bytes in the L1 cache, once for all rows of a panel. A group's sums leave the
 * tiles as int32, and are scaled and added in float32 as there: sum by sum in the same order, so the number of rows may
 * decide which of the two multiplies. A group of 32 inputs fills half of a tile. */
#pragma once
#include "linear_int4.h"

#if ISA_AMX
#define AMX_INT4_ROWS 16        /* of a tile */
#define AMX_INT4_PANEL 64       /* rows that share one read of a block */
#define AMX_INT4_BUFFER 8192    /* bytes of expanded weights */

/* Inputs of a tile; or 0, where the vector unit is as fast or the groups are no tiles. */
INLINE int64_t amx_int4_step(int64_t m, int64_t group, int64_t digits)
{
    const int64_t from = (group < 64 ? 10 : group < 128 ? 6 : 5) + 2 * (digits == 1); /* rows */
    return m < from || group % 32 || group * BLOCK > AMX_INT4_BUFFER ? 0 : group % 64 ? 32 : 64;
}

/* Tiles 0 and 1: sums of the only or the upper digit, 2 and 3 of the lower; 4, 5: digits of x; 6, 7: 32 outputs' weights. */
static void amx_int4_configure(int64_t rows, int64_t step)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = i == 4 || i == 5 ? (uint16_t)step : 64;
        config.rows[i] = (uint8_t)(i < 6 ? rows : step / 4);
    }
    __asm__("" : "+m"(config)); /* all of it is read, of which gcc's intrinsic does not tell */
    _tile_loadconfig(&config);
}

/* Nibbles as packed to signed bytes, [k / 4][32][4]. */
INLINE void amx_int4_expand(const uint8_t *w, int64_t k, int8_t *wide)
{
    const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t i = 0; i < k; i += 8, w += 4 * BLOCK, wide += 8 * BLOCK)
        UNROLL for (int v = 0; v < 2; v++) {
            const __m512i bytes = _mm512_loadu_si512(w + 64 * v);
            prefetch_weight(w + 64 * v, 1);
            const __m512i low = _mm512_and_si512(bytes, nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
            _mm512_store_si512(wide + 64 * v, _mm512_sub_epi8(low, eight));
            _mm512_store_si512(wide + 4 * BLOCK + 64 * v, _mm512_sub_epi8(high, eight));
        }
}

/* sums[digits][16][32] of a group: x, of as many rows as are configured, with the weights of a block. */
INLINE void amx_int4_group(const int8_t *x, const int8_t *wide, int64_t rows, int64_t group, int64_t step, const int digits,
                           int32_t (*sums)[AMX_INT4_ROWS][BLOCK])
{
    _tile_zero(0);
    _tile_zero(1);
    if (digits == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < group; i += step, x += rows * digits * step, wide += step * BLOCK) {
        _tile_loadd(6, wide, 4 * BLOCK);
        _tile_loadd(7, wide + 64, 4 * BLOCK);
        _tile_loadd(4, x, digits * step);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (digits == 2) {
            _tile_loadd(5, x + step, digits * step);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], sizeof **sums);
    _tile_stored(1, sums[0][0] + 16, sizeof **sums);
    if (digits == 2) {
        _tile_stored(2, sums[1], sizeof **sums);
        _tile_stored(3, sums[1][0] + 16, sizeof **sums);
    }
}

/* totals[rows][32] += the sums of a group. x_scale: of the tile's first row and this group. */
INLINE void amx_int4_add(const struct int4_linear_args *a, int32_t (*sums)[AMX_INT4_ROWS][BLOCK], const uint16_t *scale,
                         const uint16_t *offset, const float *x_scale, const int32_t *x_sums, int64_t rows,
                         float (*totals)[BLOCK], const int digits, const int has_offset)
{
    const int64_t groups = a->k / a->group;
    vf factor[2], added[2];
    UNROLL for (int v = 0; v < 2; v++) {
        factor[v] = widen_scale(scale + v * VL);
        added[v] = has_offset ? widen_scale(offset + v * VL) * splat(-0.125f) : (vf){0};
    }
    for (int64_t r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < 2; v++) {
            vi exact = *(const vi *)(sums[0][r] + v * VL);
            if (digits == 2)
                exact = (vi)(((vu)exact << INT4_DIGIT_BITS) + *(const vu *)(sums[1][r] + v * VL));
            vf sum = __builtin_convertvector(exact, vf);
            if (digits == 2)
                sum = sum * splat(x_scale[r * groups]);
            vf total = fma_(sum, factor[v], load(totals[r] + v * VL));
            if (has_offset)
                total = fma_(digits == 2 ? splat(x_scale[(a->m + r) * groups])
                                         : __builtin_convertvector(splat_int(x_sums[r * groups]), vf), added[v], total);
            store(totals[r] + v * VL, total);
        }
}

INLINE void amx_int4_blocks(const struct int4_linear_args *a, const int64_t step, const int digits, const int has_offset,
                            int thread, int threads)
{
    const int64_t groups = a->k / a->group, span = AMX_INT4_BUFFER / BLOCK / a->group, most = AMX_INT4_ROWS;
    const int64_t tiles = int4_tiles(a->m, most), panel_tiles = AMX_INT4_PANEL / AMX_INT4_ROWS;
    int64_t from, to, configured = 0;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    int8_t wide[AMX_INT4_BUFFER] __attribute__((aligned(64)));
    float totals[AMX_INT4_PANEL][BLOCK] __attribute__((aligned(64)));
    int32_t sums[2][2][AMX_INT4_ROWS][BLOCK] __attribute__((aligned(64)));
    for (int64_t panel = 0; panel < tiles; panel += panel_tiles) {
        const int64_t end = panel + panel_tiles < tiles ? panel + panel_tiles : tiles;
        const int64_t first = int4_tile_row(a->m, most, panel), last = int4_tile_row(a->m, most, end);
        for (int64_t block = from; block < to; block++) {
            const uint8_t *w = a->weight + block * a->k / 2 * BLOCK;
            memset(totals, 0, (size_t)(last - first) * sizeof *totals);
            for (int64_t g = 0; g < groups; g += span) {
                const int64_t taken = groups - g < span ? groups - g : span;
                amx_int4_expand(w + g * a->group / 2 * BLOCK, taken * a->group, wide);
                for (int64_t tile = panel; tile < end; tile++) {
                    const int64_t row = int4_tile_row(a->m, most, tile), rows = int4_tile_row(a->m, most, tile + 1) - row;
                    if (rows != configured)
                        amx_int4_configure(configured = rows, step);
                    for (int64_t i = g; i <= g + taken; i++) { /* tiles run while the sums before are added */
                        if (i < g + taken)
                            amx_int4_group(a->x + (row * a->k + i * rows * a->group) * digits, wide + (i - g) * a->group * BLOCK,
                                           rows, a->group, step, digits, sums[i & 1]);
                        if (i == g)
                            continue;
                        const int64_t done = i - 1, at = (block * groups + done) * BLOCK;
                        amx_int4_add(a, sums[done & 1], a->w_scale + at, has_offset ? a->offset + at : NULL,
                                     a->x_scale + (digits == 2 ? row * groups + done : 0), a->sums + row * groups + done, rows,
                                     totals + row - first, digits, has_offset);
                    }
                }
            }
            for (int64_t row = first; row < last; row++)
                int4_finish(a, row, 1, block * BLOCK, totals + row - first);
        }
    }
    _tile_release();
}

static void amx_int4_linear(void *data, int thread, int threads)
{
    const struct int4_linear_args *a = data;
    const int64_t step = amx_int4_step(a->m, a->group, a->digits);
    if (!step)
        int4_linear(data, thread, threads);
    else if (a->digits == 2)
        a->offset ? amx_int4_blocks(a, step, 2, 1, thread, threads) : amx_int4_blocks(a, step, 2, 0, thread, threads);
    else
        a->offset ? amx_int4_blocks(a, step, 1, 1, thread, threads) : amx_int4_blocks(a, step, 1, 0, thread, threads);
}

static void amx_int4_inputs(void *data, int thread, int threads)
{
    const struct int4_inputs_args *a = data;
    const int digits = a->scale ? 2 : 1;
    const int64_t step = amx_int4_step(a->m, a->group, digits);
    if (step)
        make_inputs(a, digits, AMX_INT4_ROWS, step, thread, threads);
    else
        int4_inputs(data, thread, threads);
}

#define int4_linear amx_int4_linear
#define int4_inputs amx_int4_inputs
#endif
