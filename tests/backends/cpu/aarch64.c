/* The kernels of one of aarch64's instruction sets, which the argument names, against exact sums and against those in plain
 * C, which the test suite checks on every machine. Prints what was wrong and how many comparisons were right. */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST (70 * 1300)

static const struct kernels *set;
static int right, wrong;

static void check(int ok, const char *what, int64_t m, int64_t n, int64_t k)
{
    ok ? right++ : wrong++;
    if (!ok)
        printf("%s is wrong: m=%d n=%d k=%d\n", what, (int)m, (int)n, (int)k);
}

/* Pseudo-random: of libc's numbers an emulator would make most of its work. */
static int below(uint32_t n)
{
    static uint32_t state = 1;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return (int)(state % n);
}
static float uniform(void) { return (float)below(1 << 24) / (float)(1 << 23) - 1; }
static int8_t byte(void) { return (int8_t)(below(256) - 128); }

static float of_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void run(task_fn task, void *args) { task(args, 0, 1); }

enum values { ANY, LARGEST, OF_BOTH_SIGNS, ZERO };
static int8_t value(enum values values, int i)
{
    switch (values) {
    case LARGEST: return -128;
    case OF_BOTH_SIGNS: return i % 3 ? -127 : 127;
    case ZERO: return 0;
    default: return byte();
    }
}

/* int32 sums, and floats made of them, to the bit; and each row alone. */
static void int8_linear(int64_t m, int64_t n, int64_t k4, enum values inputs, enum values weights)
{
    static int8_t x[MOST], weight[MOST];
    static uint8_t packed[MOST * 2];
    static float scale[MOST], outs[2][MOST], alone[MOST];
    int64_t k = 4 * k4;
    for (int i = 0; i < MOST; i++) {
        x[i] = value(inputs, i);
        weight[i] = value(weights, i / 2);
        scale[i] = uniform();
    }
    pack_int8(&set->layout, weight, packed, n, k);
    const float *w_scale = scale + m, *bias = w_scale + n;
    struct int8_linear_args a = {
        .x = x, .x_scale = scale, .weight = packed, .w_scale = w_scale, .bias = bias, .out = outs[0], .m = m, .n = n,
        .k4 = k4,
    };
    run(set->int8_linear, &a);
    int exact = 1, same = 1;
    for (int64_t row = 0; row < m; row++)
        for (int64_t j = 0; j < n; j++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < k; i++)
                sum += x[row * k + i] * weight[j * k + i];
            exact &= outs[0][row * n + j] == (float)sum * scale[row] * w_scale[j] + bias[j];
        }
    for (int64_t row = 0; row < m; row++) {
        struct int8_linear_args one = a;
        one.m = 1, one.x = x + row * k, one.x_scale = scale + row, one.out = alone;
        run(set->int8_linear, &one);
        same &= !memcmp(alone, outs[0] + row * n, (size_t)n * sizeof(float));
    }
    check(exact, "int8 sum", m, n, k);
    check(same, "an int8 row alone", m, n, k);
    pack_int8(&kernels_plain.layout, weight, packed, n, k);
    a.out = outs[1];
    run(kernels_plain.int8_linear, &a);
    check(!memcmp(outs[0], outs[1], (size_t)(m * n) * sizeof(float)), "int8_linear", m, n, k);
}

/* Inputs of 12 bits: two int8 digits each, whose products are one sum. */
static void wide_linear(int64_t m, int64_t n, int64_t k4)
{
    static float x[MOST], scale[MOST], w_scale[MOST], out[MOST];
    static int8_t q[2 * MOST], weight[MOST];
    static uint8_t packed[MOST * 2];
    int64_t k = 4 * k4;
    for (int i = 0; i < MOST; i++) {
        x[i] = i % 7 ? uniform() : 1; /* of the largest the upper digit is 127 */
        weight[i] = value(i % 5 ? ANY : LARGEST, i);
        w_scale[i] = uniform();
    }
    pack_int8(&set->layout, weight, packed, n, k);
    run(set->digits, &(struct digits_args){.x = x, .q = q, .scale = scale, .m = m, .k = k});
    run(set->int8_linear, &(struct int8_linear_args){
        .x = q, .x_scale = scale, .weight = packed, .w_scale = w_scale, .out = out, .m = m, .n = n, .k4 = k4, .wide = 1,
    });
    int exact = 1;
    for (int64_t row = 0; row < m; row++)
        for (int64_t j = 0; j < n; j++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < k; i++)
                sum += (q[2 * row * k + i] * (1 << DIGIT_BITS) + q[(2 * row + 1) * k + i]) * weight[j * k + i];
            exact &= out[row * n + j] == (float)sum * scale[row] * w_scale[j];
        }
    check(exact, "a sum of digits", m, n, k);
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
    const struct layout *layout = &set->layout;
    bf16 ? pack_bf16(layout, half, (uint16_t *)packed, n, k) : pack_f32(layout, weight, packed, n, k);
    task_fn task = bf16 ? set->bf16_linear : set->f32_linear;
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

/* W4A16 and W4A4 against float64; each row alone, to the bit; and i8mm has the bits of dotprod. */
static void int4_linear(int64_t m, int64_t n, int64_t groups, int64_t group, int w4a4, int has_offset, int extreme)
{
    static float x[MOST], x_scale[MOST], out[MOST], other[MOST];
    static int8_t weight[MOST], q[MOST], inputs[2 * MOST];
    static int32_t sums[MOST];
    static uint8_t packed[MOST];
    static uint16_t scale[MOST], packed_scale[MOST], offset[MOST], packed_offset[MOST];
    const int64_t k = groups * group;
    for (int i = 0; i < MOST; i++) {
        x[i] = (float)(extreme ? i % 3 ? -7 : 7 : below(15) - 7); /* what both hold */
        q[i] = (int8_t)x[i];
        x[i] *= w4a4 || !extreme ? 1 : 0x1p100f;
        weight[i] = (int8_t)(extreme ? i % 5 ? -8 : 7 : below(16) - 8);
        scale[i] = (uint16_t)(0x3f80 + below(64));
        offset[i] = (uint16_t)(0x3f80 + below(64));
    }
    pack_int4(&set->layout, weight, packed, n, k);
    pack_scales(scale, packed_scale, n, groups);
    pack_scales(offset, packed_offset, n, groups);
    struct int4_inputs_args prepare = {
        .x = w4a4 ? (void *)q : (void *)x, .q = inputs, .scale = w4a4 ? NULL : x_scale, .sums = sums, .m = m, .k = k,
        .group = group,
    };
    run(set->int4_inputs, &prepare);
    for (int64_t row = 0; w4a4 && row < m; row++)
        x_scale[row] = uniform();
    struct int4_linear_args a = {
        .x = inputs, .x_scale = x_scale, .sums = sums, .weight = packed, .w_scale = packed_scale, .out = out, .m = m,
        .n = n, .k = k, .group = group, .digits = w4a4 ? 1 : 2, .offset = has_offset ? packed_offset : NULL,
    };
    run(set->int4_linear, &a);
    int close = 1, same = 1;
    for (int64_t row = 0; row < m; row++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, bound = 0;
            for (int64_t i = 0; i < k; i++) {
                double weighed = weight[j * k + i] * (double)of_bf16(scale[j * groups + i / group]);
                weighed += has_offset ? of_bf16(offset[j * groups + i / group]) : 0;
                sum += x[row * k + i] * weighed;
                bound += fabs(x[row * k + i] * weighed);
            }
            const double factor = w4a4 ? x_scale[row] : 1;
            close &= fabs(out[row * n + j] - sum * factor) <= 1e-6 * (bound + fabs((double)x[0])) * fabs(factor);
        }
    if (set == &kernels_i8mm) {
        pack_int4(&kernels_dotprod.layout, weight, packed, n, k);
        a.out = other;
        run(kernels_dotprod.int4_linear, &a);
        check(!memcmp(other, out, (size_t)(m * n) * sizeof(float)), "an int4 product as of dotprod", m, n, k);
        pack_int4(&set->layout, weight, packed, n, k);
    }
    for (int64_t row = 0; row < m; row++) {
        prepare.x = w4a4 ? (void *)(q + row * k) : (void *)(x + row * k);
        prepare.m = 1;
        run(set->int4_inputs, &prepare);
        a.x_scale = w4a4 ? x_scale + row : x_scale;
        a.out = other;
        a.m = 1;
        run(set->int4_linear, &a);
        same &= !memcmp(other, out + row * n, (size_t)n * sizeof(float));
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
    const struct kernels *const tables[2] = {set, &kernels_plain};
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
    const struct kernels *const tables[2] = {set, &kernels_plain};
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

int main(int count, char **arguments)
{
    set = count > 1 && !strcmp(arguments[1], "i8mm") ? &kernels_i8mm : &kernels_dotprod;
    for (int64_t m = 1; m <= 17; m++) {
        int8_linear(m, 33, m, ANY, ANY);
        int8_linear(m, 64, 64, LARGEST, LARGEST);
        int8_linear(m, 64, 63, OF_BOTH_SIGNS, LARGEST);
        int8_linear(m, 16, 5, ANY, ZERO);
        wide_linear(m, 33, m);
        wide_linear(m, 40, 65);
        float_linear(m, 37, 30 + m, 1);
        float_linear(m, 64, 600, 1);
        float_linear(m, 40, 30 + m, 0);
        for (int w4a4 = 0; w4a4 < 2; w4a4++) {
            int4_linear(m, 37, 3, 128, w4a4, 0, 0);
            int4_linear(m, 37, 3, 32, w4a4, 1, 0);
            int4_linear(m, 70, 5, 8, w4a4, 0, 0);
            int4_linear(m, 32, 2, 512, w4a4, 1, 1);
        }
        row_kernels(m, 90 + m);
        attention(m, 60 + 3 * m);
    }
    int8_linear(70, 40, 300, ANY, ANY); /* more rows than a panel, more inputs than a chunk */
    int8_linear(63, 33, 321, ANY, OF_BOTH_SIGNS);
    wide_linear(35, 20, 299);
    printf("%s: %d right, %d wrong\n", set->name, right, wrong);
    return wrong > 0;
}
