/* Weights, packed once at load time so that a pass reads them from first byte to last; and huge pages for what it reads. */
#define _GNU_SOURCE
#include "kernels.h"

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

void use_huge_pages(void *p, size_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20;
    uintptr_t from = ((uintptr_t)p + page - 1) & ~(page - 1), to = ((uintptr_t)p + bytes) & ~(page - 1);
    if (to > from)
        (void)madvise((void *)from, to - from, MADV_HUGEPAGE); /* a hint: failure changes nothing */
#else
    (void)p, (void)bytes;
#endif
}

/* int8 [n, k] -> [n / width, k / inputs, width, inputs] of value + shift, n rounded up to 32
 * and k to 4, or to `inputs`, with zeros. */
void pack_int8(const struct layout *layout, const int8_t *weight, uint8_t *packed, int64_t n, int64_t k)
{
    const int64_t blocks = (n + BLOCK - 1) / BLOCK, inputs = layout->int8_inputs, step = inputs < 4 ? 4 : inputs;
    const int64_t padded = (k + step - 1) / step * step;
    use_huge_pages(packed, (size_t)(blocks * padded * BLOCK));
    for (int64_t first = 0; first < blocks * BLOCK; first += layout->int8_width)
        for (int64_t i = 0; i < padded; i += inputs)
            for (int64_t j = first; j < first + layout->int8_width; j++, packed += inputs) {
                uint8_t together[8] = {0};
                if (j < n && i < k)
                    memcpy(together, weight + j * k + i, (size_t)(i + inputs <= k ? inputs : k - i));
                for (int64_t b = 0; b < inputs; b++)
                    packed[b] = (uint8_t)(together[b] + layout->int8_shift);
            }
}

/* int4 (-8 .. 7) -> [blocks, k / 8, 32 / 4, 16] of nibbles 8 too large: 8 inputs of 4 outputs in 16 bytes, of which the
 * first four inputs are the low ones, or all inputs of the first two outputs where 8 inputs lie together. */
void pack_int4(const struct layout *layout, const int8_t *weight, uint8_t *packed, int64_t n, int64_t k)
{
    const int64_t blocks = (n + BLOCK - 1) / BLOCK, inputs = layout->int4_inputs;
    const int64_t right = inputs == 4 ? 4 : 0, down = inputs == 4 ? 0 : 2; /* from a low nibble to the high one */
    use_huge_pages(packed, (size_t)(blocks * BLOCK * k / 2));
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < k; i += 8)
            for (int64_t first = block * BLOCK; first < (block + 1) * BLOCK; first += 4)
                for (int64_t b = 0; b < 16; b++) {
                    const int64_t j = first + b / inputs, at = i + b % inputs;
                    int low = j < n ? weight[j * k + at] : 0;
                    int high = j + down < n ? weight[(j + down) * k + at + right] : 0;
                    *packed++ = (uint8_t)((low + 8) | (high + 8) << 4);
                }
}

/* bf16 [n, groups] -> [blocks, groups, 32] */
void pack_scales(const uint16_t *scale, uint16_t *packed, int64_t n, int64_t groups)
{
    for (int64_t block = 0; block < (n + BLOCK - 1) / BLOCK; block++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++)
                *packed++ = j < n ? scale[j * groups + g] : 0;
}

/* bf16 [n, k] -> [n / width, ceil(k / 2), width, 2]: one 32-bit lane holds two inputs of one output, the operand of a
 * bf16 dot product; a shift and a mask turn it into float32, one input at a time. */
void pack_bf16(const struct layout *layout, const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k)
{
    const int64_t pairs = (k + 1) / 2, padded = (n + BLOCK - 1) / BLOCK * BLOCK, width = layout->float_width;
    use_huge_pages(packed, (size_t)(padded * pairs * 2) * sizeof *packed);
    for (int64_t first = 0; first < padded; first += width)
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t j = first; j < first + width; j++) {
                *packed++ = j < n ? weight[j * k + 2 * i] : 0;
                *packed++ = j < n && 2 * i + 1 < k ? weight[j * k + 2 * i + 1] : 0;
            }
}

/* float32 [n, k] -> [n / width, k, width] */
void pack_f32(const struct layout *layout, const float *weight, float *packed, int64_t n, int64_t k)
{
    const int64_t padded = (n + BLOCK - 1) / BLOCK * BLOCK, width = layout->float_width;
    use_huge_pages(packed, (size_t)(padded * k) * sizeof *packed);
    for (int64_t first = 0; first < padded; first += width)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = first; j < first + width; j++)
                *packed++ = j < n ? weight[j * k + i] : 0.0f;
}
