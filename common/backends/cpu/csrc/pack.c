/* Weights, packed once at load time so that a pass reads them from first byte to last. */
#define _GNU_SOURCE
#include "kernels.h"

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Fresh memory in huge pages where the system leaves that to us: fewer stops of the prefetcher at page ends. */
static void use_huge_pages(void *p, size_t bytes)
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

/* int8 -> [blocks, ceil(k / 4), 32, 4] of value + 128: one 32-bit lane holds four inputs of one output, the
 * operand of a u8 x s8 dot product. The shift is on the weights (not the activations) because the sum that undoes
 * it, 128 * sum(x), is then one number per row. */
void pack_int8(const int8_t *weight, uint8_t *packed, int64_t n, int64_t k)
{
    int64_t k4 = (k + 3) / 4, blocks = (n + BLOCK - 1) / BLOCK;
    use_huge_pages(packed, (size_t)(blocks * k4 * BLOCK * 4));
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < k4; i++)
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++, packed += 4) {
                uint32_t four = 0;
                if (j < n)
                    memcpy(&four, weight + j * k + 4 * i, (size_t)(4 * i + 4 <= k ? 4 : k - 4 * i));
                four ^= 0x80808080u;
                memcpy(packed, &four, 4);
            }
}

/* int4 (-8 .. 7) -> [blocks, k / 8, 32, 4] of nibbles 8 too large. Of 8 inputs in order, nibbles 0, 4, 1, 5, 2, 6, 3, 7
 * stand from the lowest bits up as 0, 2, 4, 6, 1, 3, 5, 7: so that inputs 0 and 1, 2 and 3 and so on are the low
 * nibbles of two 16-bit words after a shift, which is a pair of bfloat16's dot product. */
void pack_int4(const int8_t *weight, uint8_t *packed, int64_t n, int64_t k)
{
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    use_huge_pages(packed, (size_t)(blocks * BLOCK * k / 2));
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < k; i += 8)
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++, packed += 4) {
                uint8_t v[8];
                for (int b = 0; b < 8; b++)
                    v[b] = (uint8_t)((j < n ? weight[j * k + i + b] : 0) + 8);
                packed[0] = (uint8_t)(v[0] | v[2] << 4);
                packed[1] = (uint8_t)(v[4] | v[6] << 4);
                packed[2] = (uint8_t)(v[1] | v[3] << 4);
                packed[3] = (uint8_t)(v[5] | v[7] << 4);
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

/* bf16 -> [blocks, ceil(k / 2), 32, 2]: one 32-bit lane holds two inputs of one output, the operand of a bf16 dot
 * product; a shift and a mask turn it into float32, one input at a time. */
void pack_bf16(const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k)
{
    int64_t pairs = (k + 1) / 2, blocks = (n + BLOCK - 1) / BLOCK;
    use_huge_pages(packed, (size_t)(blocks * pairs * BLOCK * 2) * sizeof *packed);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++) {
                *packed++ = j < n ? weight[j * k + 2 * i] : 0;
                *packed++ = j < n && 2 * i + 1 < k ? weight[j * k + 2 * i + 1] : 0;
            }
}

/* float32 -> [blocks, k, 32] */
void pack_f32(const float *weight, float *packed, int64_t n, int64_t k)
{
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    use_huge_pages(packed, (size_t)(blocks * k * BLOCK) * sizeof *packed);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++)
                *packed++ = j < n ? weight[j * k + i] : 0.0f;
}
