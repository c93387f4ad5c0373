/* The kernels for aarch64's dot products against those in plain C, which the test suite checks on every machine.
 * Prints what was wrong and how many comparisons were right. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST (40 * 1100)

static int right, wrong;

static void check(int ok, const char *what, int64_t m, int64_t n, int64_t k)
{
    ok ? right++ : wrong++;
    if (!ok)
        printf("%s is wrong: m=%d n=%d k=%d\n", what, (int)m, (int)n, (int)k);
}

static float uniform(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }
static int8_t byte(void) { return (int8_t)(rand() % 256 - 128); }

static void run(task_fn task, void *args) { task(args, 0, 1); }

/* int32 sums, and floats made of them, to the bit. */
static void int8_linear(int64_t m, int64_t n, int64_t k4)
{
    static int8_t x[MOST], weight[MOST];
    static uint8_t packed[MOST * 2];
    static float scale[MOST], outs[2][MOST];
    int64_t k = 4 * k4;
    for (int i = 0; i < MOST; i++) {
        int extreme = k4 == 64; /* where sums are largest */
        x[i] = extreme ? -128 : byte();
        weight[i] = extreme ? (i % 3 ? -128 : 127) : byte();
        scale[i] = uniform();
    }
    pack_int8(&kernels_dotprod.layout, weight, packed, n, k);
    const float *w_scale = scale + m, *bias = w_scale + n;
    struct int8_linear_args a = {
        .x = x, .x_scale = scale, .weight = packed, .w_scale = w_scale, .bias = bias, .out = outs[0], .m = m, .n = n,
        .k4 = k4,
    };
    run(kernels_dotprod.int8_linear, &a);
    int same = 1;
    for (int64_t row = 0; row < m; row++)
        for (int64_t j = 0; j < n; j++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < k; i++)
                sum += x[row * k + i] * weight[j * k + i];
            same &= outs[0][row * n + j] == (float)sum * scale[row] * w_scale[j] + bias[j];
        }
    check(same, "int8 sum", m, n, k);
    pack_int8(&kernels_plain.layout, weight, packed, n, k);
    a.out = outs[1];
    run(kernels_plain.int8_linear, &a);
    check(!memcmp(outs[0], outs[1], (size_t)(m * n) * sizeof(float)), "int8_linear", m, n, k);
}

/* Against float64, to the roundings of a chain of 256; and each row alone, to the bit. */
static void float_linear(int64_t m, int64_t n, int64_t k, int bf16)
{
    static float x[MOST], weight[MOST], packed[MOST * 2], out[MOST], alone[MOST];
    static uint16_t half[MOST];
    for (int i = 0; i < MOST; i++) {
        x[i] = uniform();
        weight[i] = uniform();
        uint32_t bits;
        memcpy(&bits, weight + i, 4);
        half[i] = (uint16_t)(bits >> 16);
        bits &= 0xffff0000u;
        if (bf16)
            memcpy(weight + i, &bits, 4);
    }
    const struct layout *layout = &kernels_dotprod.layout;
    bf16 ? pack_bf16(layout, half, (uint16_t *)packed, n, k) : pack_f32(layout, weight, packed, n, k);
    task_fn task = bf16 ? kernels_dotprod.bf16_linear : kernels_dotprod.f32_linear;
    struct float_linear_args a = {.x = x, .weight = packed, .out = out, .m = m, .n = n, .k = k};
    run(task, &a);
    int close = 1, same = 1;
    for (int64_t row = 0; row < m; row++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, bound = 0;
            for (int64_t i = 0; i < k; i++) {
                double product = (double)x[row * k + i] * weight[j * k + i];
                sum += product;
                bound += fabs(product);
            }
            close &= fabs(out[row * n + j] - sum) <= 256 * 0x1p-24 * bound;
        }
        a = (struct float_linear_args){.x = x + row * k, .weight = packed, .out = alone, .m = 1, .n = n, .k = k};
        run(task, &a);
        same &= !memcmp(alone, out + row * n, (size_t)n * sizeof(float));
    }
    check(close, bf16 ? "bf16_linear" : "f32_linear", m, n, k);
    check(same, "a row alone", m, n, k);
}

/* W4A16 and W4A4 against float64, 128 inputs a group; and each row alone, to the bit. */
static void int4_linear(int64_t m, int64_t n, int64_t groups, int w4a4)
{
    static float x[MOST], prepared[MOST], x_scale[MOST], out[MOST], alone[MOST];
    static int8_t weight[MOST], q[MOST];
    static uint8_t packed[MOST];
    static uint16_t scale[MOST], packed_scale[MOST];
    static char scratch[1 << 20] __attribute__((aligned(64)));
    const int64_t group = 128, k = groups * group;
    for (int i = 0; i < MOST; i++) {
        x[i] = (float)(rand() % 15 - 7); /* what bfloat16 holds */
        q[i] = (int8_t)x[i];
        x_scale[i] = uniform();
        weight[i] = (int8_t)(rand() % 16 - 8);
        scale[i] = (uint16_t)(0x3f80 + rand() % 64);
    }
    pack_int4(weight, packed, n, k);
    pack_scales(scale, packed_scale, n, groups);
    run(kernels_dotprod.round_int4, &(struct round_args){.x = x, .rounded = prepared, .m = m, .k = k});
    struct int4_linear_args a = {
        .x = w4a4 ? (void *)q : (void *)prepared, .x_scale = w4a4 ? x_scale : NULL, .weight = packed,
        .w_scale = packed_scale, .out = out, .scratch = scratch, .scratch_bytes = sizeof scratch, .m = m, .n = n, .k = k,
        .group = group,
    };
    run(kernels_dotprod.int4_linear, &a);
    int close = 1, same = 1;
    for (int64_t row = 0; row < m; row++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t i = 0; i < k; i++) {
                uint32_t bits = (uint32_t)scale[j * groups + i / group] << 16;
                float factor;
                memcpy(&factor, &bits, 4);
                sum += (double)x[row * k + i] * weight[j * k + i] * factor;
            }
            close &= fabs(out[row * n + j] - sum * (w4a4 ? x_scale[row] : 1)) <= 1e-2;
        }
        a.x = w4a4 ? (void *)(q + row * k) : (void *)(prepared + row * k);
        a.x_scale = w4a4 ? x_scale + row : NULL;
        a.out = alone;
        a.m = 1;
        run(kernels_dotprod.int4_linear, &a);
        same &= !memcmp(alone, out + row * n, (size_t)n * sizeof(float));
    }
    check(close, w4a4 ? "W4A4" : "W4A16", m, n, k);
    check(same, "an int4 row alone", m, n, k);
}

static int all_close(const float *a, const float *b, int64_t n, float tolerance)
{
    int close = 1;
    for (int64_t i = 0; i < n; i++)
        close &= fabsf(a[i] - b[i]) <= tolerance * (1 + fabsf(b[i]));
    return close;
}

/* Rows by themselves: what is fused here and not in plain C differs in the last bits. */
static void row_kernels(int64_t m, int64_t k)
{
    const struct kernels *const tables[2] = {&kernels_dotprod, &kernels_plain};
    static float x[MOST], weight[MOST], normed[2][MOST], gated[2][MOST], rounded[2][MOST], scale[2][MOST];
    static int8_t q[2][MOST];
    for (int i = 0; i < MOST; i++) {
        x[i] = 8 * uniform();
        weight[i] = uniform();
    }
    for (int i = 0; i < 2; i++) {
        struct norm_args a = {.x = x, .weight = weight, .eps = 1e-6f, .y = normed[i], .m = m, .k = k};
        run(tables[i]->norm, &a);
        run(tables[i]->swiglu, &(struct swiglu_args){.x = x, .y = gated[i], .m = m, .k = k / 2});
        run(tables[i]->round_bf16, &(struct round_args){.x = x, .rounded = rounded[i], .m = m, .k = k});
        run(tables[i]->quantize, &(struct quantize_args){.x = x, .q = q[i], .scale = scale[i], .m = m, .k = k});
    }
    check(all_close(normed[0], normed[1], m * k, 1e-6f), "norm", m, 0, k);
    check(all_close(gated[0], gated[1], m * (k / 2), 1e-6f), "swiglu", m, 0, k / 2);
    check(!memcmp(rounded[0], rounded[1], (size_t)(m * k) * sizeof(float)), "round_bf16", m, 0, k);
    check(!memcmp(q[0], q[1], (size_t)(m * k)), "quantize", m, 0, k);
    check(!memcmp(scale[0], scale[1], (size_t)m * sizeof(float)), "scale", m, 0, k);
}

static void attention(int64_t m, int64_t length)
{
    const int64_t heads = 4, kv_heads = 2, dim = 32;
    static float q[MOST], k[MOST], v[MOST], outs[2][MOST];
    for (int i = 0; i < MOST; i++) {
        q[i] = uniform();
        k[i] = uniform();
        v[i] = uniform();
    }
    struct row row[32];
    for (int64_t i = 0; i < m; i++)
        row[i] = (struct row){.parent = (int32_t)i - 1};
    struct segment segment = {
        .slot = {.k = (char *)k, .v = (char *)v, .capacity = 256, .layers = 1, .kv_heads = kv_heads, .dim = dim},
        .length = length, .rows = m,
    };
    struct segments segments = {.room = 32, .count = 1, .segment = &segment, .row = row};
    check(!segments_finish(&segments), "segments", m, heads, length);
    const struct kernels *const tables[2] = {&kernels_dotprod, &kernels_plain};
    for (int i = 0; i < 2; i++) {
        int64_t bytes = 0;
        void *memory = NULL;
        struct call call = {.attention = {
            .q = q, .segments = &segments, .out = outs[i], .scale = 0.2f, .m = m, .heads = heads, .kv_heads = kv_heads,
            .dim = dim, .tokens_per_item = m,
        }};
        attention_prepare(&call, 1, &memory, &bytes);
        run(tables[i]->attention, &call.attention);
        free(memory);
    }
    check(all_close(outs[0], outs[1], m * heads * dim, 2e-6f), "attention", m, heads, length);
}

int main(void)
{
    for (int64_t m = 1; m <= 17; m++) {
        int8_linear(m, 33, m);
        int8_linear(m, 64, 64);
        float_linear(m, 37, 30 + m, 1);
        float_linear(m, 64, 600, 1);
        float_linear(m, 40, 30 + m, 0);
        int4_linear(m, 37, 3, 0);
        int4_linear(m, 37, 3, 1);
        row_kernels(m, 90 + m);
        attention(m, 60 + 3 * m);
    }
    printf("%d right, %d wrong\n", right, wrong);
    return wrong > 0;
}
