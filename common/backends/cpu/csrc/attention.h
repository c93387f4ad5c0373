/* Attention of each row to its slot's committed positions, its ancestors and itself.
 *
 * A work item is one kv head and some consecutive tokens of a segment: all query heads of the group and all those tokens
 * share one read of the keys and values. Keys go in chunks of 64 counted from position 0, with the usual running maximum
 * and sum per row; at every 1024th position these begin anew, and are added to what came before. Where there are few items
 * for many threads, such a span is an item of its own. So a row's result depends on its own position only. A chunk's keys
 * are transposed once, 32 bits at a time, which puts keys in lanes: no horizontal sums. */
#pragma once
#include "simd.h"

#define KEYS ATTENTION_KEYS
#define KV (KEYS / VL) /* vectors per chunk */

#if ISA_AVX512
#define ATTENTION_TILE 4
#else
#define ATTENTION_TILE 1
#endif
#define SLAB (4 * VL) /* output columns kept in registers at a time */

typedef int16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

/* VL values of a row of a cache, as floats */
INLINE vf load_kept(const char *p, const int format)
{
    if (format == KV_FLOAT32)
        return load((const float *)p);
    if (format == KV_BFLOAT16)
        return (vf)(__builtin_convertvector(*(const vh_any *)p, vi) << 16);
    return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)p, vi), vf);
}

/* VL keys' dimension number `part` of those that share 32 bits */
INLINE vf unpack(const float *units, const int part, const int format)
{
    vi bits = *(const vi_any *)units;
    if (format == KV_FLOAT32)
        return (vf)bits;
    if (format == KV_BFLOAT16)
        return (vf)(part ? bits & splat_int((int32_t)0xffff0000) : bits << 16);
    return __builtin_convertvector(bits << (24 - 8 * part) >> 24, vf);
}

/* units[n][width] of 32 bits -> out[width][64], zero from n to the next multiple of 16, undefined beyond.
 * Meanwhile this chunk's values are fetched: arithmetic and memory would take turns otherwise. */
INLINE void transpose_keys(const float *units, const float *values, float *out, int64_t n, int64_t width)
{
    int64_t done = 0;
#if ISA_AVX512
    for (int64_t key = 0; key < n; key += 16)
        for (int64_t d = 0; d < width; d += 16) {
            __m512 a[16], b[16];
            const __mmask16 there = width - d < 16 ? (__mmask16)((1 << (width - d)) - 1) : 0xffff;
            UNROLL for (int i = 0; i < 16; i++) __builtin_prefetch(values + (key + i) * width + d, 0, 2);
            UNROLL for (int i = 0; i < 16; i++)
                a[i] = key + i < n ? _mm512_maskz_loadu_ps(there, units + (key + i) * width + d) : _mm512_setzero_ps();
            UNROLL for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
            }
            /* a[4 g + c]: lane group c' of it holds column 4 c' + c of keys 4 g .. 4 g + 3 */
            UNROLL for (int i = 0; i < 16; i += 4) {
                __m512d lo0 = _mm512_castps_pd(b[i]), lo1 = _mm512_castps_pd(b[i + 2]);
                __m512d hi0 = _mm512_castps_pd(b[i + 1]), hi1 = _mm512_castps_pd(b[i + 3]);
                a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
                a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
                a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
                a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
            }
            UNROLL for (int c = 0; c < 4; c++) {
                __m512 even0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);       /* columns c, c + 8 */
                __m512 even1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
                __m512 odd0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);        /* columns c + 4, c + 12 */
                __m512 odd1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
                float *row = out + (d + c) * KEYS + key;
                _mm512_storeu_ps(row, _mm512_shuffle_f32x4(even0, even1, 0x88));
                if (there >> 4) /* widths are multiples of 4 */
                    _mm512_storeu_ps(row + 4 * KEYS, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
                if (there >> 8)
                    _mm512_storeu_ps(row + 8 * KEYS, _mm512_shuffle_f32x4(even0, even1, 0xdd));
                if (there >> 12)
                    _mm512_storeu_ps(row + 12 * KEYS, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
            }
        }
    done = width;
#elif ISA_AVX2
    for (int64_t key = 0; key < (n + 15) / 16 * 16; key += 8)
        for (int64_t d = 0; d + 8 <= width; d += 8) {
            __m256 a[8], b[8];
            UNROLL for (int i = 0; i < 8; i++) __builtin_prefetch(values + (key + i) * width + d, 0, 2);
            UNROLL for (int i = 0; i < 8; i++)
                a[i] = key + i < n ? _mm256_loadu_ps(units + (key + i) * width + d) : _mm256_setzero_ps();
            UNROLL for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            /* a[4 g + c]: columns c and c + 4 of keys 4 g .. 4 g + 3 */
            UNROLL for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
                a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
            }
            UNROLL for (int c = 0; c < 4; c++) {
                _mm256_storeu_ps(out + (d + c) * KEYS + key, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
                _mm256_storeu_ps(out + (d + c + 4) * KEYS + key, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
            }
        }
    done = width / 8 * 8;
#else
    (void)values;
#endif
    for (int64_t d = done; d < width; d++)
        for (int64_t key = 0; key < (n + 15) / 16 * 16; key++)
            memcpy(out + d * KEYS + key, key < n ? units + key * width + d : &(float){0}, sizeof(float));
}

/* scores[rows][64] = q[rows][dim] @ keys, of which the first `vectors` vectors are computed; times the keys' scales. */
INLINE void score_vectors(const float *q, const float *keys, const float *scales, float *scores, int64_t dim,
                          const int rows, const int vectors, const int format)
{
    vf acc[ATTENTION_TILE][KV];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = (vf){0};
    for (int64_t d = 0; d < dim; d += 1 << format, keys += KEYS)
        UNROLL for (int part = 0; part < 1 << format; part++)
        {
            vf k[KV];
            UNROLL for (int v = 0; v < vectors; v++) k[v] = unpack(keys + v * VL, part, format);
            UNROLL for (int r = 0; r < rows; r++) {
                vf qr = splat(q[r * dim + d + part]);
                UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(qr, k[v], acc[r][v]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(scores + r * KEYS + v * VL, format == KV_INT8 ? acc[r][v] * load(scales + v * VL) : acc[r][v]);
}

INLINE void score_tile(const float *q, const float *keys, const float *scales, float *scores, int64_t dim,
                       const int rows, int64_t seen, const int format)
{
    if (seen > 48)
        score_vectors(q, keys, scales, scores, dim, rows, KV, format);
    else if (seen > 32)
        score_vectors(q, keys, scales, scores, dim, rows, KV * 3 / 4, format);
    else if (seen > 16)
        score_vectors(q, keys, scales, scores, dim, rows, KV / 2, format);
    else
        score_vectors(q, keys, scales, scores, dim, rows, KV / 4, format);
}

/* out[rows][columns from d] = out * rescale[rows] + p[rows][from .. to) @ values[from .. to)[dim]
 * offsets: where each key's value lies, or NULL where that is its number times the bytes of a row. */
INLINE void value_tile(const float *p, const char *values, const int64_t *offsets, float *out, const float *rescale,
                       int64_t from, int64_t to, int64_t dim, int64_t d, const int vectors, const int rows,
                       const int format)
{
    vf acc[ATTENTION_TILE][SLAB / VL];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
    {
        vf old = load(out + r * dim + d + v * VL);
        acc[r][v] = rescale ? old * rescale[r] : old;
    }
    for (int64_t key = from; key < to; key++) {
        vf value[SLAB / VL];
        const char *source = values + (offsets ? offsets[key] : key * (dim * 4 >> format)) + (d * 4 >> format);
        UNROLL for (int v = 0; v < vectors; v++) value[v] = load_kept(source + (v * VL * 4 >> format), format);
        UNROLL for (int r = 0; r < rows; r++) {
            vf pr = splat(p[r * KEYS + key]);
            UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(pr, value[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(out + r * dim + d + v * VL, acc[r][v]);
}

INLINE void value_rows(const float *p, const char *values, const int64_t *offsets, float *out, const float *rescale,
                       int64_t from, int64_t to, int64_t dim, const int rows, const int format)
{
    int64_t d = 0;
    for (; d + SLAB <= dim; d += SLAB)
        value_tile(p, values, offsets, out, rescale, from, to, dim, d, SLAB / VL, rows, format);
    for (; d < dim; d += VL)
        value_tile(p, values, offsets, out, rescale, from, to, dim, d, 1, rows, format);
}

/* Turns scores into exp(score - maximum) of the first `valid` keys and updates the running maximum and sum.
 * Returns the factor by which the sums so far shrink. */
INLINE float softmax_step(float *scores, int64_t valid, float *maximum, float *sum)
{
    vi lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    vf top = splat(-INFINITY);
    UNROLL for (int v = 0; v < KV; v++)
    {
        vi seen = lane + v * VL < (int32_t)valid;
        top = max_(select_(seen, load(scores + v * VL), splat(-INFINITY)), top);
    }
    float new_maximum = max_lanes(top);
    new_maximum = *maximum > new_maximum ? *maximum : new_maximum;
    vf total = {0};
    UNROLL for (int v = 0; v < KV; v++)
    {
        vi seen = lane + v * VL < (int32_t)valid;
        vf p = select_(seen, exp_(load(scores + v * VL) - new_maximum), (vf){0});
        store(scores + v * VL, p);
        total = total + p;
    }
    /* exp_ stops at a small positive number, which times the empty sums of the first chunk is still zero. */
    float rescale = exp_(splat(*maximum - new_maximum))[0];
    *maximum = new_maximum;
    *sum = *sum * rescale + sum_lanes(total);
    return rescale;
}

/* One chunk for `rows` consecutive rows; `valid` of its keys are seen by each. Meanwhile `bytes` from `next` are fetched.
 * The values that all see are added for all at once, then each row goes on by itself: the same order of additions as
 * alone. k_scales, v_scales [64]: of int8 */
INLINE void attend(const float *q, const float *keys, const float *k_scales, const char *values, const float *v_scales,
                   float *scores, float *out, float *maximum, float *sum, const int64_t *valid, int64_t dim,
                   const char *next, int64_t bytes, const int rows, const int format)
{
    float rescale[ATTENTION_TILE];
    for (int64_t i = 0; i < bytes / 2; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    score_tile(q, keys, k_scales, scores, dim, rows, valid[rows - 1], format);
    for (int r = 0; r < rows; r++) {
        rescale[r] = softmax_step(scores + r * KEYS, valid[r], maximum + r, sum + r);
        if (format == KV_INT8)
            UNROLL for (int v = 0; v < KV; v++)
                store(scores + r * KEYS + v * VL, load(scores + r * KEYS + v * VL) * load(v_scales + v * VL));
    }
    for (int64_t i = bytes / 2; i < bytes; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    value_rows(scores, values, NULL, out, rescale, 0, valid[0], dim, rows, format);
    for (int r = 1; r < rows; r++)
        if (valid[r] > valid[0])
            value_rows(scores + r * KEYS, values, NULL, out + r * dim, NULL, valid[0], valid[r], dim, 1, format);
}

/* What a thread holds of an item: tokens first .. last (exclusive) of a kv head, and the rows of q they are. */
struct item {
    const struct attention_args *a;
    const struct segment *s;
    int64_t head, first, last, rows;
    float *keys;                                  /* [dim, 64] */
    float *scores;                                /* [ATTENTION_TILE, 64] */
    float *q, *out, *maximum, *sum;               /* [rows, dim] or [rows]: since the span began */
    float *total, *total_maximum, *total_sum;     /* the spans before it */
    float *tree_scores;                           /* [chunks, rows, 64] */
    int64_t *offsets;                             /* [chunks * 64] of a token's keys in a tree */
    int32_t *where;
};

/* Adds the sums of a span to those of the spans before it. The first is copied: a short context has the bits it had. */
static void add_span(const float *out, float maximum, float sum, float *total, float *total_maximum, float *total_sum,
                     int64_t dim)
{
    if (*total_sum == 0.0f) {
        memcpy(total, out, (size_t)dim * sizeof(float));
        *total_maximum = maximum;
        *total_sum = sum;
        return;
    }
    float top = *total_maximum > maximum ? *total_maximum : maximum;
    float before = exp_(splat(*total_maximum - top))[0], now = exp_(splat(maximum - top))[0];
    for (int64_t d = 0; d < dim; d += VL)
        store(total + d, load(total + d) * before + load(out + d) * now);
    *total_maximum = top;
    *total_sum = *total_sum * before + sum * now;
}

static int64_t token_row(const struct item *i, int64_t row)
{
    int64_t group = i->a->heads / i->a->kv_heads;
    return (i->s->first_row + i->first + row / group) * i->a->heads + i->head * group + row % group;
}

static float *partial_of(const struct item *i, int64_t row, int64_t span)
{
    return i->a->partials + (token_row(i, row) * i->a->spans + span) * (i->a->dim + 2);
}

/* A row's span ends: its sums go where they are added up, and begin anew. */
static void end_span(const struct item *i, int64_t row, int64_t span)
{
    const int64_t dim = i->a->dim;
    float *out = i->out + row * dim;
    if (i->a->is_split) {
        float *to = partial_of(i, row, span);
        memcpy(to, out, (size_t)dim * sizeof(float));
        to[dim] = i->maximum[row];
        to[dim + 1] = i->sum[row];
    } else {
        add_span(out, i->maximum[row], i->sum[row], i->total + row * dim, i->total_maximum + row, i->total_sum + row, dim);
    }
    memset(out, 0, (size_t)dim * sizeof(float));
    i->maximum[row] = -INFINITY;
    i->sum[row] = 0.0f;
}

/* The keys that a tree's rows see from position `base` on, a multiple of 64: the last committed ones, then each row's
 * own ancestors. Keys are scored where they lie, for all rows; each row's scores and values are then taken in the order
 * that they have in a chain of those ancestors. */
INLINE void attend_tree(const struct item *i, const int format)
{
    const struct segment *s = i->s;
    const struct slot *slot = &s->slot;
    const int64_t dim = i->a->dim, group = i->a->heads / i->a->kv_heads, rows = i->rows, bytes = kv_row_bytes(slot);
    const int64_t base = s->length / KEYS * KEYS, committed = s->length - base, n = committed + i->last;
    const int64_t at = kv_chunk_at(slot, i->a->layer, i->head, base);
    const int64_t stride = kv_chunk_at(slot, i->a->layer, i->head, base + KEYS) - at;
    const char *values = slot->v + at;
    const struct row *tree = i->a->segments->row + s->first_row;
    for (int64_t part = 0; part * KEYS < n; part++) {
        int64_t here = n - part * KEYS < KEYS ? n - part * KEYS : KEYS, row = 0;
        const char *k = slot->k + at + part * stride;
        const float *scales = (const float *)(k + KEYS * bytes);
        float *to = i->tree_scores + part * rows * KEYS;
        transpose_keys((const float *)k, (const float *)(values + part * stride), i->keys, here, bytes / 4);
        for (; row + ATTENTION_TILE <= rows; row += ATTENTION_TILE)
            score_tile(i->q + row * dim, i->keys, scales, to + row * KEYS, dim, ATTENTION_TILE, here, format);
        for (; row < rows; row++)
            score_tile(i->q + row * dim, i->keys, scales, to + row * KEYS, dim, 1, here, format);
    }
    for (int64_t token = i->first; token < i->last; token++) {
        int64_t seen = tree[token].position + 1 - base;
        for (int64_t key = 0; key < committed; key++)
            i->where[key] = (int32_t)key;
        for (int64_t key = seen - 1, row = token; row >= 0; key--, row = tree[row].parent)
            i->where[key] = (int32_t)(committed + row);
        for (int64_t key = 0; key < seen; key++)
            i->offsets[key] = i->where[key] / KEYS * stride + i->where[key] % KEYS * bytes;
        for (int64_t row = (token - i->first) * group; row < (token - i->first + 1) * group; row++)
            for (int64_t chunk = 0; chunk < seen; chunk += KEYS) {
                int64_t valid = seen - chunk < KEYS ? seen - chunk : KEYS;
                if (chunk && (base + chunk) % ATTENTION_SPAN == 0)
                    end_span(i, row, (base + chunk) / ATTENTION_SPAN - 1);
                for (int64_t key = 0; key < valid; key++) {
                    int64_t from = i->where[chunk + key];
                    i->scores[key] = i->tree_scores[(from / KEYS * rows + row) * KEYS + from % KEYS];
                }
                float rescale = softmax_step(i->scores, valid, i->maximum + row, i->sum + row);
                for (int64_t key = 0; format == KV_INT8 && key < valid; key++) {
                    int64_t from = i->where[chunk + key];
                    i->scores[key] *= ((const float *)(values + from / KEYS * stride + KEYS * bytes))[from % KEYS];
                }
                value_rows(i->scores, values, i->offsets + chunk, i->out + row * dim, &rescale, 0, valid, dim, 1, format);
            }
    }
}

/* Positions `from` .. `to` as they lie, from a multiple of 1024 on. `next_head` probably follows on this thread. */
INLINE void attend_chunks(const struct item *i, int64_t from, int64_t to, int64_t next_head, const int format)
{
    const struct attention_args *a = i->a;
    const struct slot *slot = &i->s->slot;
    const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = i->rows, bytes = kv_row_bytes(slot);
    for (int64_t chunk = from; chunk < to; chunk += KEYS) {
        const int64_t at = kv_chunk_at(slot, a->layer, i->head, chunk);
        const char *k = slot->k + at, *values = slot->v + at;
        transpose_keys((const float *)k, (const float *)values, i->keys, to - chunk < KEYS ? to - chunk : KEYS, bytes / 4);
        /* Tokens before this one do not reach the chunk. */
        int64_t skip = chunk - i->s->length - i->first;
        int64_t begin = skip > 0 ? skip * group : 0;
        if (chunk > from && chunk % ATTENTION_SPAN == 0)
            for (int64_t row = begin; row < rows; row++)
                end_span(i, row, chunk / ATTENTION_SPAN - 1);
        /* The next keys are fetched in as many parts as there are steps. */
        int64_t ahead = to - chunk - KEYS, next = chunk + KEYS, head = i->head;
        if (ahead <= 0) {
            next = from;
            head = next_head;
            ahead = head < a->kv_heads ? to - from : 0;
        }
        const char *fetch = slot->k + (ahead > 0 ? kv_chunk_at(slot, a->layer, head, next) : 0);
        int64_t steps = (rows - begin) / ATTENTION_TILE + (rows - begin) % ATTENTION_TILE;
        int64_t part = (ahead < KEYS ? ahead : KEYS) * bytes / steps;
        for (int64_t row = begin, n, step = 0; row < rows; row += n, step++) {
            int64_t valid[4];
            n = rows - row < ATTENTION_TILE ? 1 : ATTENTION_TILE;
            for (int64_t r = 0; r < n; r++) {
                valid[r] = i->s->length + i->first + (row + r) / group + 1 - chunk;
                valid[r] = valid[r] < KEYS ? valid[r] : KEYS;
            }
#define ATTEND(rows)                                                                                                   \
    attend(i->q + row * dim, i->keys, (const float *)(k + KEYS * bytes), values, (const float *)(values + KEYS * bytes), \
           i->scores, i->out + row * dim, i->maximum + row, i->sum + row, valid, dim, fetch + step * part, part, rows,  \
           format)
            if (n == 1)
                ATTEND(1);
            else
                ATTEND(ATTENTION_TILE);
#undef ATTEND
        }
    }
}

/* The span's own keys where it is an item, all keys otherwise; the last span's items see the segment's own rows too. */
INLINE void attend_keys(const struct item *i, int64_t span, int64_t last_span, int64_t next_head, const int format)
{
    const struct segment *s = i->s;
    int64_t from = i->a->is_split ? span * ATTENTION_SPAN : 0, to = s->length + i->last;
    if (i->a->is_split && span < last_span)
        attend_chunks(i, from, from + ATTENTION_SPAN, i->a->kv_heads, format);
    else if (!s->is_tree)
        attend_chunks(i, from, to, next_head, format);
    else {
        int64_t base = s->length / KEYS * KEYS;
        attend_chunks(i, from, base, next_head, format);
        if (base > from && base % ATTENTION_SPAN == 0)
            for (int64_t row = 0; row < i->rows; row++)
                end_span(i, row, base / ATTENTION_SPAN - 1);
        attend_tree(i, format);
    }
}

static void attend_keys_f32(const struct item *i, int64_t span, int64_t last_span, int64_t next_head)
{
    attend_keys(i, span, last_span, next_head, KV_FLOAT32);
}
static void attend_keys_bf16(const struct item *i, int64_t span, int64_t last_span, int64_t next_head)
{
    attend_keys(i, span, last_span, next_head, KV_BFLOAT16);
}
static void attend_keys_int8(const struct item *i, int64_t span, int64_t last_span, int64_t next_head)
{
    attend_keys(i, span, last_span, next_head, KV_INT8);
}

static void finish_row(const struct item *i, int64_t row)
{
    const int64_t dim = i->a->dim;
    float *to = i->a->out + token_row(i, row) * dim;
    for (int64_t d = 0; d < dim; d += VL)
        store(to + d, load(i->total + row * dim + d) / i->total_sum[row]);
}

/* counter: spans of these rows that are done */
static void attention_item(struct item *i, int64_t span, int64_t last_span, int32_t *counter, int64_t next_head,
                           char *scratch)
{
    const struct attention_args *a = i->a;
    const struct row *row_of = a->segments->row + i->s->first_row;
    const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = i->rows = (i->last - i->first) * group;
    i->keys = (float *)scratch;
    i->scores = i->keys + dim * KEYS;
    i->q = i->scores + ATTENTION_TILE * KEYS;
    i->out = i->q + rows * dim;
    i->total = i->out + rows * dim;
    i->maximum = i->total + rows * dim;
    i->sum = i->maximum + rows;
    i->total_maximum = i->sum + rows;
    i->total_sum = i->total_maximum + rows;
    i->tree_scores = i->total_sum + rows;
    i->where = (int32_t *)(i->tree_scores + tree_chunks(a->m) * rows * KEYS);
    i->offsets = (int64_t *)(((uintptr_t)(i->where + tree_chunks(a->m) * KEYS) + 7) / 8 * 8);
    for (int64_t row = 0; row < rows; row++) {
        const float *from = a->q + token_row(i, row) * dim;
        for (int64_t d = 0; d < dim; d += VL) {
            store(i->q + row * dim + d, load(from + d) * a->scale);
            store(i->out + row * dim + d, (vf){0});
        }
        i->maximum[row] = -INFINITY;
        i->sum[row] = i->total_sum[row] = 0.0f;
        if (a->is_split && span == last_span)
            partial_of(i, row, span + 1)[dim + 1] = 0.0f; /* unless the row reaches into it */
    }
    switch (i->s->slot.format) {
    case KV_FLOAT32: attend_keys_f32(i, span, last_span, next_head); break;
    case KV_BFLOAT16: attend_keys_bf16(i, span, last_span, next_head); break;
    case KV_INT8: attend_keys_int8(i, span, last_span, next_head); break;
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t ends_in = row_of[i->first + row / group].position / ATTENTION_SPAN;
        end_span(i, row, a->is_split && span < last_span ? span : ends_in);
        if (!a->is_split)
            finish_row(i, row);
    }
    if (!a->is_split || __atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) <= last_span)
        return;
    *counter = 0; /* for the next call that shares the memory */
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t n = 0; n <= last_span + 1; n++) {
            const float *part = partial_of(i, row, n);
            if (part[dim + 1] != 0.0f)
                add_span(part, part[dim], part[dim + 1], i->total + row * dim, i->total_maximum + row, i->total_sum + row,
                         dim);
        }
        finish_row(i, row);
    }
}

static void attention(void *data, int thread, int threads)
{
    struct attention_args *a = data;
    const struct segments *t = a->segments;
    int64_t n = 0, before = 0, whole_before = 0; /* of segment n: items of the segments before it, and without spans */
    int64_t blocks = 0, spans = 1;
    char *scratch = a->scratch + thread * a->scratch_bytes;
    for (;;) {
        int64_t item = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED);
        for (; n < t->count; n++, before += blocks * a->kv_heads * spans, whole_before += blocks * a->kv_heads) {
            blocks = (t->segment[n].rows + a->tokens_per_item - 1) / a->tokens_per_item;
            spans = a->is_split ? t->segment[n].length / ATTENTION_SPAN + 1 : 1;
            if (item < before + blocks * a->kv_heads * spans)
                break;
        }
        if (n == t->count)
            return;
        const struct segment *s = t->segment + n;
        /* Last tokens first: they see most, and short items even out the end. */
        int64_t whole = (item - before) / spans, head = whole % a->kv_heads, block = blocks - 1 - whole / a->kv_heads;
        int64_t first = block * a->tokens_per_item;
        int64_t last = first + a->tokens_per_item < s->rows ? first + a->tokens_per_item : s->rows;
        struct item made = {.a = a, .s = s, .head = head, .first = first, .last = last};
        int32_t *counter = a->is_split ? a->finished + whole_before + whole : NULL;
        attention_item(&made, (item - before) % spans, spans - 1, counter, head + threads, scratch);
    }
}
