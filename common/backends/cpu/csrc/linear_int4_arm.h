/* Sums of a group on aarch64, whose products take one part of a register of inputs. Included by linear_int4.h. */
#pragma once

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

/* acc[parts][columns] += the products of a group's inputs; it begins the same for all outputs. What waits in registers is
 * what there is less of: inputs, or weights. */
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
