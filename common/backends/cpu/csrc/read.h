/* Reads memory and does next to nothing with it: what the other kernels are measured against. */
#pragma once
#include "simd.h"

static void read_memory(void *data, int thread, int threads)
{
    struct read_args *a = data;
    int64_t from, to;
    share(a->lines, thread, threads, &from, &to);
    vi acc[64 / sizeof(vi)] = {0};
    for (const char *p = a->data + from * 64, *end = a->data + to * 64; p < end; p += 64) {
        prefetch_weight(p, 1);
        UNROLL for (size_t v = 0; v < 64 / sizeof(vi); v++) acc[v] ^= *(const vi_any *)(p + v * sizeof(vi));
    }
    int32_t all = 0;
    for (size_t v = 0; v < 64 / sizeof(vi); v++)
        for (int j = 0; j < VL; j++)
            all ^= acc[v][j];
    __atomic_fetch_xor(&a->result, all, __ATOMIC_RELAXED); /* so that no read can be left out */
}
