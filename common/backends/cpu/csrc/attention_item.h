/* An item of attention: one kv head and some consecutive tokens of a segment, and what their rows have come to so far. */
#pragma once
#include "fetch.h"

#define KEYS ATTENTION_KEYS

/* What a thread holds of an item: tokens first .. last (exclusive) of a kv head, and the rows of q they are. */
struct item {
    const struct attention_args *a;
    const struct segment *s;
    int64_t head, first, last, rows;
    const char *next;                             /* keys that the thread probably reads next, */
    int64_t next_bytes;                           /* fetched with the last values */
    float *keys;                                  /* [dim, PART] */
    float *slab;                                  /* [64, SLAB]: values as floats */
    float *scores;                               /* [rows, 64] */
    float *rescale, *added;                       /* [rows]: of a chunk, to the sums */
    float *q, *out, *maximum, *sum;               /* [rows, dim] or [rows]: since the span began */
    float *total, *total_maximum, *total_sum;     /* the spans before it */
    float *tree_scores;                           /* [chunks, rows, 64] */
    int64_t *offsets;                             /* [chunks * 64] of a token's keys in a tree */
    int32_t *where;
    int on_tiles;                                 /* whether attention_amx.h computes it, which has */
    char *q_tiles;                                /* all of q, */
    int32_t *sees;                                /* and [rows]: how many positions a row sees */
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

/* The keys that a row of a tree sees from position `base` on, a multiple of 64: the last committed ones, then its own
 * ancestors. Puts down which they are of those that lie there, chunks `stride` bytes apart, and where; returns how many. */
INLINE int64_t tree_keys(const struct item *i, int64_t token, int64_t base, int64_t stride, int64_t bytes)
{
    const struct row *tree = i->a->segments->row + i->s->first_row;
    const int64_t committed = i->s->length - base, seen = tree[token].position + 1 - base;
    for (int64_t key = 0; key < committed; key++)
        i->where[key] = (int32_t)key;
    for (int64_t key = seen - 1, row = token; row >= 0; key--, row = tree[row].parent)
        i->where[key] = (int32_t)(committed + row);
    for (int64_t key = 0; key < seen; key++)
        i->offsets[key] = i->where[key] / KEYS * stride + i->where[key] % KEYS * bytes;
    return seen;
}

/* The first row of an item whose token reaches a chunk */
INLINE int64_t first_row_of(const struct item *i, int64_t chunk)
{
    const int64_t before = chunk - i->s->length - i->first;
    return before > 0 ? before * (i->a->heads / i->a->kv_heads) : 0;
}

/* The keys that come after a chunk's, or those that the thread probably reads next */
INLINE struct fetch fetch_next_keys(const struct item *i, int64_t chunk, int64_t to, int64_t steps)
{
    const struct slot *slot = &i->s->slot;
    const int64_t left = to - chunk - KEYS;
    if (left <= 0)
        return fetch_evenly(i->next, i->next_bytes, steps);
    return fetch_evenly(slot->k + kv_chunk_at(slot, i->a->layer, i->head, chunk + KEYS),
                        left < KEYS ? left * kv_row_bytes(slot) : kv_chunk_bytes(slot), steps);
}
