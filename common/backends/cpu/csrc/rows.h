/* What is done to each token row by itself: look it up, round, quantise, RMSNorm, SwiGLU, rotary embedding. */
#pragma once
#include "simd.h"

#include <float.h>

/* x / scale without the division: one step of correction after multiplying by the rounded reciprocal gives the
 * correctly rounded quotient (Markstein 1990) where multiply-add is fused. */
INLINE vf divide(vf x, vf scale, vf reciprocal)
{
#if ISA_AVX512 || ISA_AVX2
    vf quotient = x * reciprocal;
    return fma_(fma_(-quotient, scale, x), reciprocal, quotient);
#else
    (void)reciprocal;
    return x / scale;
#endif
}

/* max(max|x| / limit, smallest normal float); NaN where the row has one. */
INLINE float row_scale(const float *x, int64_t n, float limit)
{
    /* Without their sign bit floats order as integers do, NaN above infinity. */
    vi top = {0}, no_sign = splat_int(0x7fffffff);
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        top = max_int(top, (vi)load(x + i) & no_sign);
    if (i < n)
        top = max_int(top, (vi)load_part(x + i, n - i) & no_sign);
    int32_t bits = 0;
    for (int lane = 0; lane < VL; lane++)
        bits = top[lane] > bits ? top[lane] : bits;
    float absmax;
    memcpy(&absmax, &bits, 4);
    float scale = absmax / limit;
    return scale < FLT_MIN ? FLT_MIN : scale;
}

/* q = x / scale rounded half to even, by the row's scale: the true division, so that it is bit for bit what plain PyTorch
 * computes. Returns the scale. */
INLINE float quantize_row(const float *x, int8_t *q, int64_t n, float limit)
{
    const float scale = row_scale(x, n, limit);
    vf scales = splat(scale), reciprocal = splat(1.0f / scale);
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        *(vb_any *)(q + i) = narrow(round_to_int(divide(load(x + i), scales, reciprocal)));
    if (i < n) {
        vb tail = narrow(round_to_int(divide(load_part(x + i, n - i), scales, reciprocal)));
        memcpy(q + i, &tail, (size_t)(n - i));
    }
    return scale;
}

/* q = x / scale rounded half to even, by a scale that may be too small: then clipped to int8. */
INLINE void quantize_row_by(const float *x, int8_t *q, int64_t n, float scale)
{
    vf scales = splat(scale), reciprocal = splat(1.0f / scale);
    for (int64_t i = 0; i < n; i += VL) {
        vf quotient = divide(load_up_to(x + i, n - i), scales, reciprocal);
        vb values = narrow(round_to_int(min_(splat(127), max_(splat(-128), quotient))));
        memcpy(q + i, &values, n - i < VL ? (size_t)(n - i) : sizeof values);
    }
}

static void embed_bf16(void *data, int thread, int threads)
{
    const struct embed_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const uint16_t *x = (const uint16_t *)a->table + a->ids[row] * a->k;
        int32_t *y = (int32_t *)a->out + row * a->k;
        for (int64_t i = 0; i < a->k; i++)
            y[i] = (int32_t)((uint32_t)x[i] << 16);
    }
}

static void embed_f32(void *data, int thread, int threads)
{
    const struct embed_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++)
        memcpy(a->out + row * a->k, (const float *)a->table + a->ids[row] * a->k, (size_t)a->k * sizeof(float));
}

/* To bfloat16, half to even, in the high halves; NaN stays NaN. */
INLINE vi round_bits(vf x)
{
    vi bits = (vi)x, rounded = bits + 0x7fff + ((bits >> 16) & 1), nan = x != x;
    return ((nan & (bits | 0x400000)) | (~nan & rounded)) & splat_int((int32_t)0xffff0000);
}

/* The operand of this instruction set's rounded_linear: bfloat16 [m, ceil(k / 2), 2], or float32 [m, k]. */
static void round_bf16(void *data, int thread, int threads)
{
    const struct round_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->k;
#if ISA_AVX512BF16
        uint16_t *y = (uint16_t *)a->rounded + row * ((a->k + 1) / 2 * 2);
        for (int64_t i = 0; i < a->k; i += VL) {
            vh rounded = __builtin_convertvector(round_bits(load_up_to(x + i, a->k - i)) >> 16, vh);
            int64_t halves = (a->k - i + 1) / 2 * 2; /* with an odd row's zero */
            memcpy(y + i, &rounded, halves < VL ? (size_t)halves * sizeof *y : sizeof rounded);
        }
#else
        float *y = (float *)a->rounded + row * a->k;
        for (int64_t i = 0; i < a->k; i += VL)
            store_up_to(y + i, (vf)round_bits(load_up_to(x + i, a->k - i)), a->k - i);
#endif
    }
}

/* W4A16's operand of this instruction set's int4_linear: bfloat16 [m, k]; or float32 [m, k], rounded, and divided by
 * 16 where the weight's nibble is the upper one of its byte (pack_int4), k a multiple of 8. */
static void round_int4(void *data, int thread, int threads)
{
#if ISA_AVX512BF16
    round_bf16(data, thread, threads);
#else
    static const float places[8] = {1, 1, 1.0f / 16, 1.0f / 16, 1, 1, 1.0f / 16, 1.0f / 16};
    const struct round_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t i = from * a->k; i < to * a->k; i += 8)
        for (int j = 0; j < 8; j += VL < 8 ? VL : 8) {
            int64_t n = 8 - j;
            vf rounded = (vf)round_bits(load_up_to(a->x + i + j, n)) * load_up_to(places + j, n);
            store_up_to((float *)a->rounded + i + j, rounded, n);
        }
#endif
}

static void quantize(void *data, int thread, int threads)
{
    const struct quantize_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->k;
        int8_t *q = a->q + row * a->k;
        if (a->static_scale)
            quantize_row_by(x, q, a->k, a->scale[row] = *a->static_scale);
        else
            a->scale[row] = quantize_row(x, q, a->k, (float)a->limit);
    }
}

/* Each number as an integer of 12 bits, or fewer for so many inputs that a sum of products with int8 would not fit int32;
 * whole where int8_linear takes that, or as an upper digit of 8 bits and a lower one of 4. */
static void digits(void *data, int thread, int threads)
{
    const struct digits_args *a = data;
    const int64_t m = a->m, k = a->k, most = INT32_MAX / (128 * k), limit = most < WIDEST ? most : WIDEST;
    int64_t from, to;
    share(m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * k, scale = a->scale[row] = row_scale(x, k, (float)limit);
        const vf scales = splat(scale), reciprocal = splat(1.0f / scale);
        for (int64_t i = 0; i < k; i += VL) {
            vi whole = round_to_int(divide(load_up_to(x + i, k - i), scales, reciprocal));
            size_t n = (size_t)(k - i < VL ? k - i : VL);
#if INT8_WIDENS
            __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)whole),
                                            _mm256_extracti128_si256((__m256i)whole, 1));
            int16_t *q = (int16_t *)a->q + row * k + i;
            if (n == VL)
                _mm_storeu_si128((void *)q, words);
            else
                memcpy(q, &words, n * sizeof *q);
#else
            vi upper = (whole + (1 << DIGIT_BITS >> 1)) >> DIGIT_BITS;
            vb high = narrow(upper), low = narrow(whole - (upper << DIGIT_BITS));
            int8_t *q = (int8_t *)a->q + 2 * row * k + i;
            if (n == VL) {
                *(vb_any *)q = high;
                *(vb_any *)(q + k) = low;
            } else {
                memcpy(q, &high, n);
                memcpy(q + k, &low, n);
            }
#endif
        }
    }
}

/* Sylvester's matrix without multiplying by it: sums and differences at distance 1, 2, 4 ... (fast Walsh-Hadamard). */
static void hadamard(void *data, int thread, int threads)
{
    const struct hadamard_args *a = data;
    const float factor = 1.0f / sqrtf((float)a->block);
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t at = from * a->k; at < to * a->k; at += a->block) {
        const float *x = a->x + at;
        float *y = a->y + at;
        int64_t distance = 1;
#if ISA_AVX512
        if (a->block % 16 == 0) {
            __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            for (int64_t i = 0; i < a->block; i += 16) {
                __m512 v = _mm512_loadu_ps(x + i);
                UNROLL for (int d = 1; d < 16; d *= 2) {
                    __m512i bit = _mm512_set1_epi32(d);
                    __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, bit), v);
                    __mmask16 second = _mm512_test_epi32_mask(lane, bit);
                    v = _mm512_mask_sub_ps(_mm512_add_ps(v, other), second, other, v);
                }
                _mm512_storeu_ps(y + i, v);
            }
            x = y;
            distance = 16;
        }
#endif
        for (; distance < a->block; distance *= 2, x = y)
            for (int64_t i = 0; i < a->block; i += 2 * distance)
                for (int64_t j = i; j < i + distance; j++) {
                    float first = x[j], second = x[j + distance];
                    y[j] = first + second;
                    y[j + distance] = first - second;
                }
        for (int64_t i = 0; i < a->block; i++)
            y[i] = x[i] * factor;
    }
}

INLINE float inverse_rms(const float *x, int64_t n, float eps)
{
    vf acc[4] = {{0}, {0}, {0}, {0}}; /* four chains, so that latency does not bound it */
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        UNROLL for (int c = 0; c < 4; c++)
        {
            vf v = load(x + i + c * VL);
            acc[c] = fma_(v, v, acc[c]);
        }
    for (; i < n; i += VL) {
        vf v = load_up_to(x + i, n - i);
        acc[0] = fma_(v, v, acc[0]);
    }
    float mean = sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)n;
    return 1.0f / sqrtf(mean + eps);
}

static void norm(void *data, int thread, int threads)
{
    const struct norm_args *a = data;
    int64_t from, to, k = a->k;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        float *x = a->x + row * k, *y = a->q ? a->scratch + thread * k : a->y + row * k;
        if (a->residual) {
            const float *residual = a->residual + row * k;
            for (int64_t i = 0; i < k; i += VL)
                store_up_to(x + i, load_up_to(x + i, k - i) + load_up_to(residual + i, k - i), k - i);
        }
        vf inverse = splat(inverse_rms(x, k, a->eps));
        for (int64_t i = 0; i < k; i += VL)
            store_up_to(y + i, load_up_to(x + i, k - i) * inverse * load_up_to(a->weight + i, k - i), k - i);
        if (a->q)
            a->scale[row] = quantize_row(y, a->q + row * k, k, 127.0f);
    }
}

static void swiglu(void *data, int thread, int threads)
{
    const struct swiglu_args *a = data;
    int64_t from, to, k = a->k;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *gate = a->x + row * 2 * k, *up = gate + k;
        float *y = a->q ? a->scratch + thread * k : a->y + row * k;
        for (int64_t i = 0; i < k; i += VL) {
            vf g = load_up_to(gate + i, k - i);
            vf silu = g / (exp_(-g) + 1.0f);
            store_up_to(y + i, silu * load_up_to(up + i, k - i), k - i);
        }
        if (a->q)
            a->scale[row] = quantize_row(y, a->q + row * k, k, 127.0f);
    }
}

/* One head: optional RMSNorm, then the rotation of the pairs (i, i + dim / 2). dim / 2 is a multiple of 8. */
INLINE void rope_head(const float *x, const float *weight, float eps, const float *cos, const float *sin, float *y,
                      int64_t dim)
{
    int64_t half = dim / 2;
    vf inverse = splat(weight ? inverse_rms(x, dim, eps) : 1.0f);
    for (int64_t i = 0; i < half; i += VL) {
        int64_t n = half - i;
        vf a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
        if (weight) {
            a = a * inverse * load_up_to(weight + i, n);
            b = b * inverse * load_up_to(weight + half + i, n);
        }
        vf c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
        store_up_to(y + i, a * c - b * s, n);
        store_up_to(y + half + i, b * c + a * s, n);
    }
}

/* A head's key or value into its row of a chunk: float32 as it is, bfloat16 half to even, int8 by the row's own scale. */
INLINE void keep_row(const struct slot *slot, char *chunk, int64_t position, const float *x)
{
    const int64_t dim = slot->dim, bytes = kv_row_bytes(slot);
    char *row = chunk + position % KV_CHUNK * bytes;
    if (slot->format == KV_FLOAT32)
        memcpy(row, x, (size_t)bytes);
    else if (slot->format == KV_INT8)
        ((float *)(chunk + KV_CHUNK * bytes))[position % KV_CHUNK] = quantize_row(x, (int8_t *)row, dim, 127.0f);
    else
        for (int64_t i = 0; i < dim; i += VL) {
            vh rounded = __builtin_convertvector(round_bits(load(x + i)) >> 16, vh);
            memcpy(row + 2 * i, &rounded, sizeof rounded);
        }
}

static void rope(void *data, int thread, int threads)
{
    const struct rope_args *a = data;
    int64_t from, to, dim = a->dim, width = (a->heads + 2 * a->kv_heads) * dim;
    share(a->m, thread, threads, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const float *x = a->qkv + i * width;
        const struct row *row = a->segments->row + i;
        const struct segment *s = a->segments->segment + row->segment;
        const float *cos = a->cos + row->position * a->table_stride, *sin = a->sin + row->position * a->table_stride;
        const int64_t at = s->length + i - s->first_row, chunk = kv_chunk_at(&s->slot, a->layer, 0, at);
        const int64_t next = kv_chunk_bytes(&s->slot);
        float rotated[ATTENTION_MOST_DIM];
        for (int64_t h = 0; h < a->heads; h++, x += dim)
            rope_head(x, a->q_weight, a->eps, cos, sin, a->q + (i * a->heads + h) * dim, dim);
        for (int64_t h = 0; h < a->kv_heads; h++, x += dim) {
            rope_head(x, a->k_weight, a->eps, cos, sin, rotated, dim);
            keep_row(&s->slot, s->slot.k + chunk + h * next, at, rotated);
        }
        for (int64_t h = 0; h < a->kv_heads; h++, x += dim)
            keep_row(&s->slot, s->slot.v + chunk + h * next, at, x);
    }
}

/* The first index of the largest value; of the first NaN where there is one, as torch.argmax has it. */
static void argmax(void *data, int thread, int threads)
{
    const struct argmax_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->n;
        vf best = splat(-INFINITY);
        vi index = {0}, at, nan = {0};
        for (int lane = 0; lane < VL; lane++)
            at[lane] = lane;
        int64_t i = 0;
        for (; i + VL <= a->n; i += VL, at += VL) {
            vf v = load(x + i);
            vi more = v > best;
            best = select_(more, v, best);
            index = (more & at) | (~more & index);
            nan |= v != v;
        }
        float top = -INFINITY;
        int64_t found = 0;
        int any_nan = 0;
        for (int lane = 0; lane < VL; lane++) {
            any_nan |= nan[lane];
            if (best[lane] > top || (best[lane] == top && index[lane] < found)) {
                top = best[lane];
                found = index[lane];
            }
        }
        for (; i < a->n; i++) {
            any_nan |= x[i] != x[i];
            if (x[i] > top) {
                top = x[i];
                found = i;
            }
        }
        for (i = 0; any_nan && i < a->n; i++)
            if (x[i] != x[i]) {
                found = i;
                break;
            }
        a->out[row] = found;
    }
}

/* The k largest of each row. Eight vectors are passed over at once unless one of their values exceeds the k-th best. */
static void top_k(void *data, int thread, int threads)
{
    const struct top_k_args *a = data;
    int64_t from, to;
    share(a->m, thread, threads, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *x = a->x + row * a->n;
        float best[MOST_TOP_K];
        int64_t at[MOST_TOP_K], held = 0;
        for (int64_t i = 0; i < a->n; i += 8 * VL) {
            int64_t end = a->n - i < 8 * VL ? a->n - i : 8 * VL;
            if (held == a->k && end == 8 * VL) {
                vf threshold = splat(best[a->k - 1]);
                vi more = {0};
                UNROLL for (int v = 0; v < 8; v++)
                    more |= load(x + i + v * VL) > threshold;
                int any = 0;
                for (int lane = 0; lane < VL; lane++)
                    any |= more[lane];
                if (!any)
                    continue;
            }
            for (int64_t j = i; j < i + end; j++) {
                if (held == a->k && !(x[j] > best[held - 1]))
                    continue;
                int64_t place = held < a->k ? held++ : held - 1;
                for (; place > 0 && x[j] > best[place - 1]; place--) {
                    best[place] = best[place - 1];
                    at[place] = at[place - 1];
                }
                best[place] = x[j];
                at[place] = j;
            }
        }
        for (int64_t i = 0; i < a->k; i++)
            a->out[row * a->k + i] = at[i];
    }
}

static void exp_array(const float *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i += VL)
        store_up_to(y + i, exp_(load_up_to(x + i, n - i)), n - i);
}
