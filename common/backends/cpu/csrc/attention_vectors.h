/* Attention of an item by multiply-adds of floats, over keys and values of any format.
 *
 * Keys are transposed, 32 bits at a time, which puts them in lanes: no horizontal sums. That and their conversion to floats
 * happens once for all rows; what is read from then on stays in the L1 cache until all rows have had it. */
#pragma once
#include "attention_item.h"

#define PART 32 /* keys that are transposed together: with a head of 128 they fill a third of an L1 cache */
#define KV (KEYS / VL) /* vectors per chunk */

#if ISA_AVX2 && !ISA_AVX512 || !ISA_AVX512 && !defined(__aarch64__)
#define SUMS 12 /* vectors of sums that fit the registers, beside what is multiplied */
#else
#define SUMS 24
#endif
#define MOST_VECTORS 8 /* of a tile's row */
#define SLAB 64 /* columns of values that are multiplied with all rows before the next: a chunk of them is 16 KiB */

typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

/* VL values of a row of a cache, as floats */
INLINE vf load_kept(const char *p, const int format)
{
    if (format == KV_FLOAT32)
        return load((const float *)p);
#if ISA_AVX512
    if (format == KV_BFLOAT16)
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif ISA_AVX2
    if (format == KV_BFLOAT16)
        return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    if (format == KV_BFLOAT16)
        return (vf)(__builtin_convertvector(*(const vh_any *)p, vi) << 16);
    return __builtin_convertvector(__builtin_convertvector(*(const vb_any *)p, vi), vf);
#endif
}

/* Dimension number `part` of those that share 32 bits. An int8 comes 2^24 times too large, which is exact. */
INLINE vf unpack(vi bits, const int part, const int format)
{
    if (format == KV_FLOAT32)
        return (vf)bits;
    if (format == KV_BFLOAT16)
        return (vf)(part ? bits & splat_int((int32_t)0xffff0000) : bits << 16);
    bits = bits << (24 - 8 * part);
    return __builtin_convertvector(part ? bits & splat_int((int32_t)0xff000000) : bits, vf);
}
#define INT8_UNIT 5.9604644775390625e-8f /* 2^-24 */

/* 4 x 32 bits of VL rows, `stride` apart: column c of them in out[c] */
INLINE void columns(const float *rows, int64_t stride, vf out[4])
{
#if ISA_AVX512
    __m512 a[4], b[4];
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows + i * stride));
        a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(rows + (4 + i) * stride), 1);
        a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(rows + (8 + i) * stride), 2);
        a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(rows + (12 + i) * stride), 3);
    }
    UNROLL for (int i = 0; i < 4; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        __m512d first = _mm512_castps_pd(b[i]), second = _mm512_castps_pd(b[2 + i]);
        out[2 * i] = (vf)_mm512_unpacklo_pd(first, second);
        out[2 * i + 1] = (vf)_mm512_unpackhi_pd(first, second);
    }
#elif ISA_AVX2
    __m256 a[4], b[4];
    UNROLL for (int i = 0; i < 4; i++)
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + i * stride)),
                                    _mm_loadu_ps(rows + (4 + i) * stride), 1);
    UNROLL for (int i = 0; i < 4; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        __m256d first = _mm256_castps_pd(b[i]), second = _mm256_castps_pd(b[2 + i]);
        out[2 * i] = (vf)_mm256_unpacklo_pd(first, second);
        out[2 * i + 1] = (vf)_mm256_unpackhi_pd(first, second);
    }
#else
    UNROLL for (int c = 0; c < 4; c++) {
        vf column = {0};
        UNROLL for (int i = 0; i < VL; i++) column[i] = rows[i * stride + c];
        out[c] = column;
    }
#endif
}

/* Keys of a cache, rows of `width` x 32 bits -> floats out[dim][PART], zero beyond the first n keys */
INLINE void transpose_keys(const float *units, float *out, int64_t n, int64_t width, struct fetch *f, const int format)
{
    struct fetch ahead = *f;
    for (int64_t key = 0; key < PART; key += VL)
        for (int64_t unit = 0; unit < width; unit += 4) {
            vf column[4] = {0};
            fetch_step(&ahead);
            if (key + VL <= n)
                columns(units + key * width + unit, width, column);
            else if (key < n) {
                float some[VL * 4] = {0};
                for (int64_t i = key; i < n; i++)
                    memcpy(some + (i - key) * 4, units + i * width + unit, 4 * sizeof(float));
                columns(some, 4, column);
            }
            float *to = out + (unit << format) * PART + key;
            UNROLL for (int c = 0; c < 4; c++) UNROLL for (int part = 0; part < 1 << format; part++)
                store(to + ((c << format) + part) * PART, unpack((vi)column[c], part, format));
        }
    *f = ahead;
}

/* scores[rows][64] = q[rows][dim] @ PAIR keys as they lie in a cache: few rows need no copy of them, transposed. */
#define PAIR (2 * VL)
#define FEW 4
INLINE void score_pair(const float *q, const float *units, float *scores, int64_t dim, struct fetch *f, const int rows,
                       const int format)
{
    const int64_t width = dim >> format;
    struct fetch ahead = *f;
    vf acc[FEW][2];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++) acc[r][v] = (vf){0};
    for (int64_t unit = 0; unit < width; unit += 4) {
        vf column[2][4];
        fetch_step(&ahead);
        UNROLL for (int v = 0; v < 2; v++) columns(units + v * VL * width + unit, width, column[v]);
        UNROLL for (int c = 0; c < 4; c++) UNROLL for (int part = 0; part < 1 << format; part++)
            UNROLL for (int v = 0; v < 2; v++)
            {
                vf k = unpack((vi)column[v][c], part, format);
                UNROLL for (int r = 0; r < rows; r++)
                    acc[r][v] = fma_(splat(q[r * dim + ((unit + c) << format) + part]), k, acc[r][v]);
            }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < 2; v++) store(scores + r * KEYS + v * VL, acc[r][v]);
    *f = ahead;
}

/* scores[rows][64] = q[rows][dim] @ keys[dim][PART], `vectors` vectors of keys */
INLINE void score_tile(const float *q, const float *keys, float *scores, int64_t dim, struct fetch *f, const int rows,
                       const int vectors)
{
    vf acc[6][MOST_VECTORS];
    struct fetch ahead = *f;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = (vf){0};
    for (int64_t d = 0; d < dim; d += 2) {
        fetch_step(&ahead);
        UNROLL for (int i = 0; i < 2; i++) {
            vf k[MOST_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++)
                k[v] = load(keys + (d + i) * PART + v * VL);
            UNROLL for (int r = 0; r < rows; r++) {
                vf qr = splat(q[r * dim + d + i]);
                UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(qr, k[v], acc[r][v]);
            }
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) KEEP(acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(scores + r * KEYS + v * VL, acc[r][v]);
    *f = ahead;
}

/* out[rows][vectors] = out * rescale[rows] + p[rows][0 .. n) @ values
 * offsets: where each key's value lies, or NULL where that is its number times `stride` bytes. */
INLINE void value_tile(const float *p, const char *values, int64_t stride, const int64_t *offsets, float *out,
                       const float *rescale, int64_t n, int64_t dim, struct fetch *f, const int rows, const int vectors,
                       const int format)
{
    vf acc[6][MOST_VECTORS];
    struct fetch ahead = *f;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
    {
        vf old = load(out + r * dim + v * VL);
        acc[r][v] = rescale ? old * rescale[r] : old;
    }
    for (int64_t key = 0; key < n; key++) {
        vf value[MOST_VECTORS];
        const char *source = values + (offsets ? offsets[key] : key * stride);
        fetch_step(&ahead);
        UNROLL for (int v = 0; v < vectors; v++) value[v] = load_kept(source + (v * VL * 4 >> format), format);
        UNROLL for (int r = 0; r < rows; r++) {
            vf pr = splat(p[r * KEYS + key]);
            UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(pr, value[v], acc[r][v]);
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) KEEP(acc[r][v]);
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(out + r * dim + v * VL, acc[r][v]);
    *f = ahead;
}

/* How many vectors of sums a tile of so many rows has. */
#define VECTORS(rows, most) (SUMS / (rows) >= 8 && (most) >= 8 ? 8 : SUMS / (rows) >= 4 && (most) >= 4 ? 4 : 2)

/* `rows` rows against a part's keys */
#define SCORES(rows)                                                                                                   \
    NOINLINE void score_##rows(const float *q, const float *keys, float *scores, int64_t dim, struct fetch *f)         \
    {                                                                                                                  \
        for (int64_t v = 0; v < PART / VL; v += VECTORS(rows, PART / VL))                                              \
            score_tile(q, keys + v * VL, scores + v * VL, dim, f, rows, VECTORS(rows, PART / VL));                     \
    }
/* n keys, a multiple of PAIR, as they lie */
#define DIRECT(rows, name, format)                                                                                     \
    NOINLINE void direct_##name##_##rows(const float *q, const float *units, float *scores, int64_t n, int64_t dim,    \
                                         struct fetch *f)                                                              \
    {                                                                                                                  \
        for (int64_t key = 0; key < n; key += PAIR)                                                                    \
            score_pair(q, units + key * (dim >> format), scores + key, dim, f, rows, format);                          \
    }
/* values [n][columns], columns a multiple of 16 */
#define VALUES(rows, name, format)                                                                                     \
    NOINLINE void value_##name##_##rows(const float *p, const char *values, int64_t stride, const int64_t *offsets,    \
                                        float *out, const float *rescale, int64_t n, int64_t columns, int64_t dim,     \
                                        struct fetch *f)                                                               \
    {                                                                                                                  \
        const int most = VECTORS(rows, 8);                                                                             \
        int64_t d = 0;                                                                                                 \
        if (most * VL > SLAB)                                                                                          \
            for (; d + most * VL <= columns; d += most * VL)                                                           \
                value_tile(p, values + (d * 4 >> format), stride, offsets, out + d, rescale, n, dim, f, rows, most, format); \
        const int vectors = VECTORS(rows, SLAB / VL);                                                                  \
        for (; d + vectors * VL <= columns; d += vectors * VL)                                                         \
            value_tile(p, values + (d * 4 >> format), stride, offsets, out + d, rescale, n, dim, f, rows, vectors, format); \
        for (; d < columns; d += VL)                                                                                   \
            value_tile(p, values + (d * 4 >> format), stride, offsets, out + d, rescale, n, dim, f, rows, 1, format);  \
    }
#define FORMATS(what, rows) what(rows, f32, KV_FLOAT32) what(rows, bf16, KV_BFLOAT16) what(rows, int8, KV_INT8)
SCORES(1) SCORES(2) SCORES(3) SCORES(4) SCORES(6)
FORMATS(DIRECT, 1) FORMATS(DIRECT, 2) FORMATS(DIRECT, 3) FORMATS(DIRECT, 4)
FORMATS(VALUES, 1) FORMATS(VALUES, 2) FORMATS(VALUES, 3) FORMATS(VALUES, 4) FORMATS(VALUES, 6)
#undef SCORES
#undef DIRECT
#undef VALUES
#undef FORMATS

typedef void score_fn(const float *, const float *, float *, int64_t, struct fetch *);
typedef void direct_fn(const float *, const float *, float *, int64_t, int64_t, struct fetch *);
typedef void value_fn(const float *, const char *, int64_t, const int64_t *, float *, const float *, int64_t, int64_t,
                      int64_t, struct fetch *);
static score_fn *const score_rows[] = {NULL, score_1, score_2, score_3, score_4, NULL, score_6};
static direct_fn *const direct_rows[][FEW + 1] = {
    {NULL, direct_f32_1, direct_f32_2, direct_f32_3, direct_f32_4},
    {NULL, direct_bf16_1, direct_bf16_2, direct_bf16_3, direct_bf16_4},
    {NULL, direct_int8_1, direct_int8_2, direct_int8_3, direct_int8_4},
};
static value_fn *const value_rows[][7] = {
    {NULL, value_f32_1, value_f32_2, value_f32_3, value_f32_4, NULL, value_f32_6},
    {NULL, value_bf16_1, value_bf16_2, value_bf16_3, value_bf16_4, NULL, value_bf16_6},
    {NULL, value_int8_1, value_int8_2, value_int8_3, value_int8_4, NULL, value_int8_6},
};

/* Rows of the next tile where so many are left */
INLINE int64_t tile_rows(int64_t left)
{
    return left >= 6 ? 6 : left >= 4 ? 4 : left;
}
INLINE int64_t tile_count(int64_t rows)
{
    return rows / 6 + (rows % 6 > 0) + (rows % 6 == 5);
}

INLINE float largest(vf v)
{
#if ISA_AVX512
    return _mm512_reduce_max_ps((__m512)v);
#else
    return max_lanes(v);
#endif
}

/* Turns scores into exp(score - maximum) of the keys that are seen, the first `valid`, and updates the running maximum.
 * Returns their sum; the sums so far are to shrink by exp(-*rise). */
INLINE float softmax_seen(float *scores, int64_t valid, float *maximum, float *rise, const int all)
{
    vf s[KV], top = splat(-INFINITY), total = {0};
    vi lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    UNROLL for (int v = 0; v < KV; v++)
    {
        s[v] = load(scores + v * VL);
        top = max_(all ? s[v] : select_(lane + v * VL < (int32_t)valid, s[v], splat(-INFINITY)), top);
    }
    float new_maximum = largest(top);
    new_maximum = *maximum > new_maximum ? *maximum : new_maximum;
    UNROLL for (int v = 0; v < KV; v++)
    {
        vf p = exp_(s[v] - new_maximum);
        p = all ? p : select_(lane + v * VL < (int32_t)valid, p, (vf){0});
        store(scores + v * VL, p);
        total = total + p;
    }
    *rise = *maximum - new_maximum;
    *maximum = new_maximum;
    return sum_lanes(total);
}

INLINE float softmax_row(float *scores, int64_t valid, float *maximum, float *rise)
{
    return valid == KEYS ? softmax_seen(scores, valid, maximum, rise, 1)
                         : softmax_seen(scores, valid, maximum, rise, 0);
}

/* The scales of a chunk of int8 */
INLINE const float *scales_of(const char *chunk, int64_t row_bytes)
{
    return (const float *)(chunk + KEYS * row_bytes);
}

/* scores[rows][64] of rows `begin` .. with the n keys of a chunk; `skip` more rows do not see its second half.
 * A part's keys stay in the L1 cache for all rows. */
INLINE void score_keys(const struct item *i, const char *k, float *scores, int64_t n, int64_t begin, int64_t skip,
                       struct fetch *f, const int format)
{
    const int64_t dim = i->a->dim, bytes = kv_row_bytes(&i->s->slot), rows = i->rows - begin;
    int64_t key = 0;
    if (rows <= FEW) {
        key = n / PART * PART;
        direct_rows[format][rows](i->q + begin * dim, (const float *)k, scores + begin * KEYS, key, dim, f);
    }
    for (; key < n; key += PART) {
        transpose_keys((const float *)(k + key * bytes), i->keys, n - key, bytes / 4, f, format);
        for (int64_t row = begin + (key ? skip : 0), tile; row < i->rows; row += tile) {
            tile = tile_rows(i->rows - row);
            score_rows[tile](i->q + row * dim, i->keys, scores + row * KEYS + key, dim, f);
        }
    }
}

/* The keys that a tree's rows see from position `base` on. Keys are scored where they lie, for all rows; each row's scores and values are then taken in the order
 * that they have in a chain of those ancestors. */
INLINE void attend_tree(const struct item *i, const int format)
{
    const struct segment *s = i->s;
    const struct slot *slot = &s->slot;
    const int64_t dim = i->a->dim, group = i->a->heads / i->a->kv_heads, rows = i->rows, bytes = kv_row_bytes(slot);
    const int64_t base = s->length / KEYS * KEYS, n = s->length - base + i->last;
    const int64_t at = kv_chunk_at(slot, i->a->layer, i->head, base);
    const int64_t stride = kv_chunk_at(slot, i->a->layer, i->head, base + KEYS) - at;
    const char *values = slot->v + at;
    struct fetch none = {0};
    for (int64_t part = 0; part * KEYS < n; part++) {
        int64_t here = n - part * KEYS < KEYS ? n - part * KEYS : KEYS;
        const char *k = slot->k + at + part * stride;
        float *to = i->tree_scores + part * rows * KEYS;
        score_keys(i, k, to, here, 0, 0, &none, format);
    }
    for (int64_t token = i->first; token < i->last; token++) {
        const int64_t seen = tree_keys(i, token, base, stride, bytes);
        for (int64_t row = (token - i->first) * group; row < (token - i->first + 1) * group; row++)
            for (int64_t chunk = 0; chunk < seen; chunk += KEYS) {
                int64_t valid = seen - chunk < KEYS ? seen - chunk : KEYS;
                if (chunk && (base + chunk) % ATTENTION_SPAN == 0)
                    end_span(i, row, (base + chunk) / ATTENTION_SPAN - 1);
                for (int64_t key = 0; key < valid; key++) {
                    int64_t from = i->where[chunk + key];
                    i->scores[key] = i->tree_scores[(from / KEYS * rows + row) * KEYS + from % KEYS];
                    if (format == KV_INT8)
                        i->scores[key] *= INT8_UNIT * scales_of(slot->k + at + from / KEYS * stride, bytes)[from % KEYS];
                }
                float rescale, sum = softmax_row(i->scores, valid, i->maximum + row, &rescale);
                rescale = exp_(splat(rescale))[0];
                i->sum[row] = i->sum[row] * rescale + sum;
                for (int64_t key = 0; format == KV_INT8 && key < valid; key++) {
                    int64_t from = i->where[chunk + key];
                    i->scores[key] *= scales_of(values + from / KEYS * stride, bytes)[from % KEYS];
                }
                value_rows[format][1](i->scores, values, 0, i->offsets + chunk, i->out + row * dim, &rescale, valid, dim,
                                      dim, &none);
            }
    }
}

/* How many keys of a chunk a row sees. */
INLINE int64_t seen_keys(const struct item *i, int64_t row, int64_t chunk)
{
    int64_t seen = i->s->length + i->first + row / (i->a->heads / i->a->kv_heads) + 1 - chunk;
    return seen < KEYS ? seen : KEYS;
}

/* Positions `from` .. `to` as they lie, from a multiple of 1024 on. */
INLINE void attend_chunks(const struct item *i, int64_t from, int64_t to, const int format)
{
    const struct attention_args *a = i->a;
    const struct slot *slot = &i->s->slot;
    const int64_t dim = a->dim, rows = i->rows, bytes = kv_row_bytes(slot);
    for (int64_t chunk = from; chunk < to; chunk += KEYS) {
        const int64_t at = kv_chunk_at(slot, a->layer, i->head, chunk);
        const char *k = slot->k + at, *values = slot->v + at;
        const int64_t n = to - chunk < KEYS ? to - chunk : KEYS;
        /* Tokens before this one do not reach the chunk, or its second half. */
        const int64_t begin = first_row_of(i, chunk), second = first_row_of(i, chunk + PART);
        const int64_t skip = (second < rows ? second : rows) - begin;
        if (chunk > from && chunk % ATTENTION_SPAN == 0)
            for (int64_t row = begin; row < rows; row++)
                end_span(i, row, chunk / ATTENTION_SPAN - 1);
        const int64_t tiles = tile_count(rows - begin), parts = (n + PART - 1) / PART, most = tile_rows(rows - begin);
        const int64_t steps = rows - begin <= FEW ? n / PAIR * (bytes / 16) /* of transposing, and of multiplying */
            : parts * (PART / VL * (bytes / 16) + dim / 2 * tiles * (PART / VL / VECTORS(most, PART / VL)));
        struct fetch f = fetch_evenly(values, n < KEYS ? n * bytes : kv_chunk_bytes(slot), steps + 1);
        score_keys(i, k, i->scores, n, begin, skip, &f, format);
        for (int64_t row = begin; row < rows; row++) {
            float *scores = i->scores + row * KEYS;
            if (format == KV_INT8)
                UNROLL for (int v = 0; v < KV; v++)
                    store(scores + v * VL, load(scores + v * VL) * (INT8_UNIT * load(scales_of(k, bytes) + v * VL)));
            i->added[row] = softmax_row(scores, seen_keys(i, row, chunk), i->maximum + row, i->rescale + row);
            if (format == KV_INT8)
                UNROLL for (int v = 0; v < KV; v++)
                    store(scores + v * VL, load(scores + v * VL) * load(scales_of(values, bytes) + v * VL));
        }
        /* exp_ stops at a small positive number, which times the empty sums of the first chunk is still zero. */
        for (int64_t row = begin; row < rows; row += VL) {
            const int64_t left = rows - row;
            vf shrink = exp_(load_up_to(i->rescale + row, left));
            store_up_to(i->rescale + row, shrink, left);
            store_up_to(i->sum + row, load_up_to(i->sum + row, left) * shrink + load_up_to(i->added + row, left), left);
        }
        const int64_t together = VECTORS(most, tiles > 1 ? SLAB / VL : 8);
        f = fetch_next_keys(i, chunk, to, n * tiles * ((dim / VL + together - 1) / together));
        /* Several tiles share a slab of values, as floats. One reads all columns, as they are. */
        const int64_t width = tiles > 1 ? SLAB : dim;
        for (int64_t d = 0; d < dim; d += width) {
            const int64_t columns = dim - d < width ? dim - d : width;
            const char *slab = values + (d * 4 >> format);
            int64_t stride = bytes, kept = format;
            if (format != KV_FLOAT32 && tiles > 1) {
                for (int64_t key = 0; key < n; key++)
                    for (int64_t c = 0; c < columns; c += VL)
                        store(i->slab + key * SLAB + c, load_kept(slab + key * bytes + (c * 4 >> format), format));
                slab = (const char *)i->slab;
                stride = SLAB * sizeof(float);
                kept = KV_FLOAT32;
            }
            for (int64_t row = begin, tile; row < rows; row += tile) {
                tile = tile_rows(rows - row);
                /* The values that all rows see are added for all at once, then each row goes on by itself: the same
                 * order of additions as alone. */
                const int64_t all = seen_keys(i, row, chunk);
                value_rows[kept][tile](i->scores + row * KEYS, slab, stride, NULL, i->out + row * dim + d,
                                       i->rescale + row, all, columns, dim, &f);
                for (int64_t r = row + 1; r < row + tile; r++) {
                    const int64_t more = seen_keys(i, r, chunk) - all;
                    if (more)
                        value_rows[kept][1](i->scores + r * KEYS + all, slab + all * stride, stride, NULL,
                                            i->out + r * dim + d, NULL, more, columns, dim, &f);
                }
            }
        }
    }
}
