/* Attention of each row to its slot's committed positions, its ancestors and itself.
 *
 * A work item is one kv head and some consecutive tokens of a segment: all query heads of the group and all those tokens
 * share one read of the keys and values. Keys go in chunks of 64 counted from position 0, with the usual running maximum
 * and sum per row, so a row's result depends on its own position only. A chunk's keys are transposed once, which
 * puts keys in lanes: no horizontal sums. */
#pragma once
#include "simd.h"

#define KEYS ATTENTION_KEYS
#define KV (KEYS / VL) /* vectors per chunk */

#if ISA_AVX512
#define ATTENTION_TILE 4
#elif ISA_AVX2
#define ATTENTION_TILE 1
#else
#define ATTENTION_TILE 1
#endif
#define SLAB (4 * VL) /* output columns kept in registers at a time */

/* keys[n][dim] -> out[dim][64], zero from n to the next multiple of 16, undefined beyond.
 * Meanwhile this chunk's values are fetched: arithmetic and memory would take turns otherwise. */
INLINE void transpose_keys(const float *keys, const float *values, float *out, int64_t n, int64_t dim)
{
#if ISA_AVX512
    for (int64_t key = 0; key < n; key += 16)
        for (int64_t d = 0; d < dim; d += 16) {
            __m512 a[16], b[16];
            UNROLL for (int i = 0; i < 16; i++) __builtin_prefetch(values + (key + i) * dim + d, 0, 2);
            UNROLL for (int i = 0; i < 16; i++)
                a[i] = key + i < n ? _mm512_loadu_ps(keys + (key + i) * dim + d) : _mm512_setzero_ps();
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
                _mm512_storeu_ps(row + 4 * KEYS, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
                _mm512_storeu_ps(row + 8 * KEYS, _mm512_shuffle_f32x4(even0, even1, 0xdd));
                _mm512_storeu_ps(row + 12 * KEYS, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
            }
        }
#else
    (void)values;
    for (int64_t d = 0; d < dim; d++)
        for (int64_t key = 0; key < (n + 15) / 16 * 16; key++)
            out[d * KEYS + key] = key < n ? keys[key * dim + d] : 0.0f;
#endif
}

/* scores[rows][64] = q[rows][dim] @ keys[dim][64], of which the first `vectors` vectors are computed. */
INLINE void score_vectors(const float *q, const float *keys, float *scores, int64_t dim, const int rows,
                          const int vectors)
{
    vf acc[ATTENTION_TILE][KV];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = (vf){0};
    for (int64_t d = 0; d < dim; d++) {
        vf k[KV];
        UNROLL for (int v = 0; v < vectors; v++) k[v] = load(keys + d * KEYS + v * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf qr = splat(q[r * dim + d]);
            UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(qr, k[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(scores + r * KEYS + v * VL, acc[r][v]);
}

INLINE void score_tile(const float *q, const float *keys, float *scores, int64_t dim, const int rows, int64_t seen)
{
    if (seen > 48)
        score_vectors(q, keys, scores, dim, rows, KV);
    else if (seen > 32)
        score_vectors(q, keys, scores, dim, rows, KV * 3 / 4);
    else if (seen > 16)
        score_vectors(q, keys, scores, dim, rows, KV / 2);
    else
        score_vectors(q, keys, scores, dim, rows, KV / 4);
}

/* out[rows][columns from d] = out * rescale[rows] + p[rows][from .. to) @ values[from .. to)[dim]
 * pick: the value row of each key, or NULL where that is the key's own number. */
INLINE void value_tile(const float *p, const float *values, const int32_t *pick, float *out, const float *rescale,
                       int64_t from, int64_t to, int64_t dim, int64_t d, const int vectors, const int rows)
{
    vf acc[ATTENTION_TILE][SLAB / VL];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
    {
        vf old = load(out + r * dim + d + v * VL);
        acc[r][v] = rescale ? old * rescale[r] : old;
    }
    for (int64_t key = from; key < to; key++) {
        vf value[SLAB / VL];
        const float *source = values + (pick ? pick[key] : key) * dim + d;
        UNROLL for (int v = 0; v < vectors; v++) value[v] = load(source + v * VL);
        UNROLL for (int r = 0; r < rows; r++) {
            vf pr = splat(p[r * KEYS + key]);
            UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = fma_(pr, value[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        store(out + r * dim + d + v * VL, acc[r][v]);
}

INLINE void value_rows(const float *p, const float *values, const int32_t *pick, float *out, const float *rescale,
                       int64_t from, int64_t to, int64_t dim, const int rows)
{
    int64_t d = 0;
    for (; d + SLAB <= dim; d += SLAB)
        value_tile(p, values, pick, out, rescale, from, to, dim, d, SLAB / VL, rows);
    for (; d < dim; d += VL)
        value_tile(p, values, pick, out, rescale, from, to, dim, d, 1, rows);
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

/* One chunk for `rows` consecutive rows; `valid` of its keys are seen by each. Meanwhile `bytes` from `next` are
 * fetched. The values that all see are added for
 * all at once, then each row goes on by itself: the same order of additions as alone. */
INLINE void attend(const float *q, const float *keys, const float *values, float *scores, float *out, float *maximum,
                   float *sum, const int64_t *valid, int64_t dim, const char *next, int64_t bytes, const int rows)
{
    float rescale[ATTENTION_TILE];
    for (int64_t i = 0; i < bytes / 2; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    score_tile(q, keys, scores, dim, rows, valid[rows - 1]);
    for (int r = 0; r < rows; r++)
        rescale[r] = softmax_step(scores + r * KEYS, valid[r], maximum + r, sum + r);
    for (int64_t i = bytes / 2; i < bytes; i += 64)
        __builtin_prefetch(next + i, 0, 2);
    value_rows(scores, values, NULL, out, rescale, 0, valid[0], dim, rows);
    for (int r = 1; r < rows; r++)
        if (valid[r] > valid[0])
            value_rows(scores + r * KEYS, values, NULL, out + r * dim, NULL, valid[0], valid[r], dim, 1);
}

/* The keys that a tree's rows see from position `base` on, a multiple of 64: the last committed ones, then each row's
 * own ancestors. Keys are scored where they lie, for all rows; each row's scores and values are then taken in the order
 * that they have in a chain of those ancestors. */
static void attend_tree(const struct attention_args *a, const struct segment *s, int64_t head, int64_t first,
                        int64_t last, float *q, float *keys, float *scores, float *out, float *maximum, float *sum,
                        float *tree_scores)
{
    const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = (last - first) * group;
    const int64_t base = s->length / KEYS * KEYS, committed = s->length - base, n = committed + last;
    const int64_t at = ((a->layer * a->kv_heads + head) * s->slot.capacity + base) * dim;
    const float *k = (const float *)s->slot.k + at, *v = (const float *)s->slot.v + at;
    const struct row *tree = a->segments->row + s->first_row;
    for (int64_t part = 0; part * KEYS < n; part++) { /* tree_scores: [chunks, rows, 64] */
        int64_t here = n - part * KEYS < KEYS ? n - part * KEYS : KEYS;
        float *to = tree_scores + part * rows * KEYS;
        transpose_keys(k + part * KEYS * dim, v + part * KEYS * dim, keys, here, dim);
        int64_t row = 0;
        for (; row + ATTENTION_TILE <= rows; row += ATTENTION_TILE)
            score_tile(q + row * dim, keys, to + row * KEYS, dim, ATTENTION_TILE, here);
        for (; row < rows; row++)
            score_tile(q + row * dim, keys, to + row * KEYS, dim, 1, here);
    }
    int32_t *pick = (int32_t *)tree_scores + tree_chunks(a->m) * rows * KEYS; /* where the keys that a token sees lie */
    for (int64_t token = first; token < last; token++) {
        int64_t seen = tree[token].position + 1 - base;
        for (int64_t key = 0; key < committed; key++)
            pick[key] = (int32_t)key;
        for (int64_t key = seen - 1, row = token; row >= 0; key--, row = tree[row].parent)
            pick[key] = (int32_t)(committed + row);
        for (int64_t row = (token - first) * group; row < (token - first + 1) * group; row++)
            for (int64_t chunk = 0; chunk < seen; chunk += KEYS) {
                int64_t valid = seen - chunk < KEYS ? seen - chunk : KEYS;
                for (int64_t key = 0; key < valid; key++) {
                    int64_t from = pick[chunk + key];
                    scores[key] = tree_scores[(from / KEYS * rows + row) * KEYS + from % KEYS];
                }
                float rescale = softmax_step(scores, valid, maximum + row, sum + row);
                value_rows(scores, v, pick + chunk, out + row * dim, &rescale, 0, valid, dim, 1);
            }
    }
}

/* Tokens first .. last (exclusive) of kv head `head` of a segment; `next_head` probably follows on this thread. */
static void attention_item(const struct attention_args *a, const struct segment *s, int64_t head, int64_t first,
                           int64_t last, int64_t next_head, char *scratch)
{
    const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = (last - first) * group;
    const int64_t head_size = s->slot.capacity * dim, layer = a->layer * a->kv_heads * head_size;
    const float *k_layer = (const float *)s->slot.k + layer, *k_cache = k_layer + head * head_size;
    const float *v_cache = (const float *)s->slot.v + layer + head * head_size;
    const float *q_rows = a->q + s->first_row * a->heads * dim;
    float *out_rows = a->out + s->first_row * a->heads * dim;
    float *keys = (float *)scratch;              /* [dim, 64] */
    float *q = keys + dim * KEYS;                /* [rows, dim] */
    float *out = q + rows * dim;                 /* [rows, dim] */
    float *scores = out + rows * dim;            /* [ATTENTION_TILE, 64] */
    float *maximum = scores + ATTENTION_TILE * KEYS, *sum = maximum + rows; /* [rows] each */
    for (int64_t row = 0; row < rows; row++) {
        const float *from = q_rows + ((first + row / group) * a->heads + head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; d += VL) {
            store(q + row * dim + d, load(from + d) * a->scale);
            store(out + row * dim + d, (vf){0});
        }
        maximum[row] = -INFINITY;
        sum[row] = 0.0f;
    }
    const int64_t end = s->is_tree ? s->length / KEYS * KEYS : s->length + last; /* positions that are seen in place */
    for (int64_t chunk = 0; chunk < end; chunk += KEYS) {
        const float *values = v_cache + chunk * dim;
        transpose_keys(k_cache + chunk * dim, values, keys, end - chunk < KEYS ? end - chunk : KEYS, dim);
        /* Tokens before this one do not reach the chunk. */
        int64_t skip = chunk - s->length - first;
        int64_t begin = skip > 0 ? skip * group : 0;
        /* The next keys are fetched in as many parts as there are steps. */
        int64_t ahead = end - chunk - KEYS;
        const float *next = k_cache + (chunk + KEYS) * dim;
        if (ahead <= 0) {
            next = k_layer + next_head * head_size;
            ahead = next_head < a->kv_heads ? end : 0;
        }
        int64_t steps = (rows - begin) / ATTENTION_TILE + (rows - begin) % ATTENTION_TILE;
        int64_t part = (ahead < KEYS ? ahead : KEYS) * dim * 4 / steps;
        for (int64_t row = begin, n, step = 0; row < rows; row += n, step++) {
            int64_t valid[4];
            n = rows - row < ATTENTION_TILE ? 1 : ATTENTION_TILE;
            for (int64_t r = 0; r < n; r++) {
                valid[r] = s->length + first + (row + r) / group + 1 - chunk;
                valid[r] = valid[r] < KEYS ? valid[r] : KEYS;
            }
#define ATTEND(rows)                                                                                               \
    attend(q + row * dim, keys, values, scores, out + row * dim, maximum + row, sum + row, valid, dim,             \
           (const char *)next + step * part, part, rows)
            if (n == 1)
                ATTEND(1);
            else
                ATTEND(ATTENTION_TILE);
#undef ATTEND
        }
    }
    if (s->is_tree)
        attend_tree(a, s, head, first, last, q, keys, scores, out, maximum, sum, sum + rows);
    for (int64_t row = 0; row < rows; row++) {
        float *to = out_rows + ((first + row / group) * a->heads + head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; d += VL)
            store(to + d, load(out + row * dim + d) / sum[row]);
    }
}

static void attention(void *data, int thread, int threads)
{
    struct attention_args *a = data;
    const struct segments *t = a->segments;
    int64_t n = 0, before = 0, blocks = 0; /* of segment n; items of the segments before it */
    char *scratch = a->scratch + thread * a->scratch_bytes;
    for (;;) {
        int64_t item = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED);
        for (; n < t->count; n++, before += blocks * a->kv_heads) {
            blocks = (t->segment[n].rows + a->tokens_per_item - 1) / a->tokens_per_item;
            if (item < before + blocks * a->kv_heads)
                break;
        }
        if (n == t->count)
            return;
        const struct segment *s = t->segment + n;
        /* Last tokens first: they see most, and short items even out the end. */
        int64_t head = (item - before) % a->kv_heads, block = blocks - 1 - (item - before) / a->kv_heads;
        int64_t first = block * a->tokens_per_item;
        int64_t last = first + a->tokens_per_item < s->rows ? first + a->tokens_per_item : s->rows;
        attention_item(a, s, head, first, last, head + threads, scratch);
    }
}
