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
