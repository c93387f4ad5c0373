/* Attention of each row to its slot's committed positions, its ancestors and itself.
 *
 * A work item is one kv head and some consecutive tokens of a segment: all query heads of the group and all those tokens
 * share one read of the keys and values. Keys go in chunks of 64 counted from position 0, with the usual running maximum
 * and sum per row; at every 1024th position these begin anew, and are added to what came before. Where there are few items
 * for many threads, such a span is an item of its own. So a row's result depends on its own position only.
 *
 * bfloat16 keys and values take the tile unit where there is one, everything else goes by vectors of floats. */
#pragma once
#include "attention_amx.h"
#include "attention_vectors.h"

INLINE void attend_positions(const struct item *i, int64_t from, int64_t to, const int format)
{
#if ISA_AMX
    if (i->on_tiles) {
        amx_attend_chunks(i, from, to);
        return;
    }
#endif
    attend_chunks(i, from, to, format);
}

INLINE void attend_rows_of_tree(const struct item *i, const int format)
{
#if ISA_AMX
    if (i->on_tiles) {
        amx_attend_tree(i);
        return;
    }
#endif
    attend_tree(i, format);
}

/* The span's own keys where it is an item, all keys otherwise; the last span's items see the segment's own rows too. */
INLINE void attend_keys(const struct item *i, int64_t span, int64_t last_span, const int format)
{
    const struct segment *s = i->s;
    int64_t from = i->a->is_split ? span * ATTENTION_SPAN : 0, to = s->length + i->last;
    if (i->a->is_split && span < last_span)
        attend_positions(i, from, from + ATTENTION_SPAN, format);
    else if (!s->is_tree)
        attend_positions(i, from, to, format);
    else {
        int64_t base = s->length / KEYS * KEYS;
        attend_positions(i, from, base, format);
        if (base > from && base % ATTENTION_SPAN == 0)
            for (int64_t row = 0; row < i->rows; row++)
                end_span(i, row, base / ATTENTION_SPAN - 1);
        attend_rows_of_tree(i, format);
    }
}

static void attend_keys_f32(const struct item *i, int64_t span, int64_t last_span)
{
    attend_keys(i, span, last_span, KV_FLOAT32);
}
static void attend_keys_bf16(const struct item *i, int64_t span, int64_t last_span)
{
    attend_keys(i, span, last_span, KV_BFLOAT16);
}
static void attend_keys_int8(const struct item *i, int64_t span, int64_t last_span)
{
    attend_keys(i, span, last_span, KV_INT8);
}

static void finish_row(const struct item *i, int64_t row)
{
    const int64_t dim = i->a->dim;
    float *to = i->a->out + token_row(i, row) * dim;
#if ISA_AMX
    if (i->on_tiles) {
        amx_finish(i->total + row * dim, i->total_sum[row], to, dim);
        return;
    }
#endif
    for (int64_t d = 0; d < dim; d += VL)
        store(to + d, load(i->total + row * dim + d) / i->total_sum[row]);
}

/* counter: spans of these rows that are done */
static void attention_item(struct item *i, int64_t span, int64_t last_span, int32_t *counter, char *scratch)
{
    const struct attention_args *a = i->a;
    const struct row *row_of = a->segments->row + i->s->first_row;
    const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = i->rows = (i->last - i->first) * group;
    const int64_t room = attention_room(rows);
    i->keys = (float *)scratch;
    i->slab = i->keys + dim * PART;
    i->scores = i->slab + KEYS * SLAB;
    i->q = i->scores + room * KEYS;
    i->out = i->q + room * dim;
    i->total = i->out + room * dim;
    i->q_tiles = (char *)(i->total + room * dim);
    i->maximum = (float *)i->q_tiles + room * dim;
    i->sum = i->maximum + room;
    i->total_maximum = i->sum + room;
    i->total_sum = i->total_maximum + room;
    i->rescale = i->total_sum + room;
    i->added = i->rescale + room;
    i->sees = (int32_t *)(i->added + room);
    i->tree_scores = (float *)i->sees + room;
    i->where = (int32_t *)(i->tree_scores + tree_chunks(a->m) * room * KEYS);
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
#if ISA_AMX
    i->on_tiles = i->s->slot.format == KV_BFLOAT16 && dim % 32 == 0;
    if (i->on_tiles)
        amx_begin(i, room);
#endif
    switch (i->s->slot.format) {
    case KV_FLOAT32: attend_keys_f32(i, span, last_span); break;
    case KV_BFLOAT16: attend_keys_bf16(i, span, last_span); break;
    case KV_INT8: attend_keys_int8(i, span, last_span); break;
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

/* Where an item lies: of segment n, behind so many items of the segments before it, and items without spans. */
struct found {
    int64_t n, before, whole_before, blocks, spans;
    int64_t head, block, span;
};

/* Goes on to an item further on; whether there is one. */
INLINE int find_item(const struct attention_args *a, int64_t item, struct found *f)
{
    for (; f->n < a->segments->count; f->n++) {
        const struct segment *s = a->segments->segment + f->n;
        f->blocks = (s->rows + a->tokens_per_item - 1) / a->tokens_per_item;
        f->spans = a->is_split ? s->length / ATTENTION_SPAN + 1 : 1;
        const int64_t whole = (item - f->before) / f->spans, all = f->blocks * a->kv_heads;
        if (whole < all) {
            f->head = whole % a->kv_heads;
            f->block = f->blocks - 1 - whole / a->kv_heads; /* last tokens first: they see most, short items even out the end */
            f->span = (item - f->before) % f->spans;
            return 1;
        }
        f->before += all * f->spans;
        f->whole_before += all;
    }
    return 0;
}

static void attention(void *data, int thread, int threads)
{
    struct attention_args *a = data;
    struct found found = {0};
    for (;;) {
        const int64_t item = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED);
        if (!find_item(a, item, &found))
            break;
        const struct segment *s = a->segments->segment + found.n;
        const int64_t first = found.block * a->tokens_per_item, last = first + a->tokens_per_item;
        struct item made = {
            .a = a, .s = s, .head = found.head, .first = first, .last = last < s->rows ? last : s->rows,
        };
        struct found after = found;
        if (find_item(a, item + threads, &after)) {
            const struct segment *next = a->segments->segment + after.n;
            const int64_t from = after.span * ATTENTION_SPAN, keys = next->length + next->rows - from;
            made.next = next->slot.k + kv_chunk_at(&next->slot, a->layer, after.head, from);
            made.next_bytes = keys < KEYS ? keys * kv_row_bytes(&next->slot) : kv_chunk_bytes(&next->slot);
        }
        const int64_t whole = (item - found.before) / found.spans;
        attention_item(&made, found.span, found.spans - 1, a->is_split ? a->finished + found.whole_before + whole : NULL,
                       a->scratch + thread * a->scratch_bytes);
    }
#if ISA_AMX
    _tile_release();
#endif
}
