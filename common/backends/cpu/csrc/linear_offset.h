/* out += offset @ (sums of x over groups): what the offsets of int4 groups (weight = value * scale + offset) add to a
 * product. x is float, rounded to bfloat16 here as the product rounds it, or int8 with a scale for each row. A kernel of
 * its own beside int4_linear: it reads an eighth (groups of 32) or less of what that does. */
#pragma once
#include "simd.h"

#define OFFSET_LANES 8 /* partial sums of a group, added up in a fixed order */

INLINE float nearest_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float group_sum(const struct offset_args *a, int64_t at)
{
    float lanes[OFFSET_LANES] = {0}, sum = 0;
    if (a->x_scale)
        for (int64_t i = 0; i < a->group; i += OFFSET_LANES)
            for (int j = 0; j < OFFSET_LANES; j++)
                lanes[j] += (float)((const int8_t *)a->x)[at + i + j];
    else
        for (int64_t i = 0; i < a->group; i += OFFSET_LANES)
            for (int j = 0; j < OFFSET_LANES; j++)
                lanes[j] += nearest_bf16(((const float *)a->x)[at + i + j]);
    for (int j = 0; j < OFFSET_LANES; j++)
        sum += lanes[j];
    return sum;
}

static void add_offsets(void *data, int thread, int threads)
{
    const struct offset_args *a = data;
    const int64_t groups = a->k / a->group;
    int64_t from, to;
    share((a->n + BLOCK - 1) / BLOCK, thread, threads, &from, &to);
    float sums[MAX_GROUPS];
    for (int64_t row = 0; row < a->m && from < to; row++) {
        for (int64_t g = 0; g < groups; g++)
            sums[g] = group_sum(a, row * a->k + g * a->group);
        const float factor = a->x_scale ? a->x_scale[row] : 1.0f;
        for (int64_t block = from; block < to; block++) {
            const uint16_t *offset = a->offset + block * groups * BLOCK;
            float totals[BLOCK] = {0};
            for (int64_t g = 0; g < groups; g++, offset += BLOCK)
                for (int j = 0; j < BLOCK; j++) {
                    uint32_t bits = (uint32_t)offset[j] << 16;
                    float value;
                    memcpy(&value, &bits, 4);
                    totals[j] += sums[g] * value;
                }
            int64_t column = block * BLOCK, columns = a->n - column < BLOCK ? a->n - column : BLOCK;
            for (int64_t j = 0; j < columns; j++)
                a->out[row * a->n + column + j] += factor * totals[j];
        }
    }
}
