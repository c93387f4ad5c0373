/* The table of segments that a pass runs over: what is checked before kernels read memory by it, and its slots' memory. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

const char *segments_finish(struct segments *t)
{
    t->rows = t->kept = t->last_position = 0;
    for (int64_t n = 0; n < t->count; n++) {
        struct segment *s = t->segment + n;
        const struct slot *first = &t->segment->slot;
        if (s->slot.layers != first->layers || s->slot.kv_heads != first->kv_heads || s->slot.dim != first->dim)
            return "the slots of a batch differ in layers, heads or dimensions";
        s->first_row = t->rows;
        s->is_tree = 0;
        t->rows += s->rows;
        t->kept += s->kept;
        struct row *row = t->row + s->first_row;
        for (int64_t i = 0; i < s->rows; i++) {
            if (row[i].parent < -1 || row[i].parent >= i)
                return "a row's parent must come before it";
            row[i].segment = (int32_t)n;
            row[i].position = row[i].parent < 0 ? s->length : row[row[i].parent].position + 1;
            s->is_tree |= row[i].parent != i - 1;
            t->last_position = row[i].position > t->last_position ? row[i].position : t->last_position;
        }
    }
    return NULL;
}

const char *embed_check(const struct embed_args *a)
{
    for (int64_t i = 0; i < a->m; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->vocab)
            return "token ids outside of the vocabulary";
    return NULL;
}

static const char *slots_check(const struct segments *t, int64_t m, int64_t layer, int64_t kv_heads, int64_t dim)
{
    if (t->rows != m || !t->count)
        return "the batch has another number of rows than the pass";
    const struct slot *slot = &t->segment->slot;
    if (layer < 0 || layer >= slot->layers || kv_heads != slot->kv_heads || dim != slot->dim)
        return "the slots are of another model: other layers, heads or dimensions";
    return NULL;
}

const char *rope_check(const struct rope_args *a)
{
    if (a->segments->last_position >= a->positions)
        return "positions beyond the rope tables: the slot is longer than the model's context";
    return slots_check(a->segments, a->m, a->layer, a->kv_heads, a->dim);
}

const char *attention_check(const struct attention_args *a)
{
    return slots_check(a->segments, a->m, a->layer, a->kv_heads, a->dim);
}

const char *keep_check(const struct keep_args *a)
{
    return a->segments->kept == a->m ? NULL : "the batch keeps another number of rows than the pass";
}

void keep_rows(void *data, int thread, int threads)
{
    const struct keep_args *a = data;
    const int64_t from = a->m * thread / threads, to = a->m * (thread + 1) / threads;
    const struct segment *s = a->segments->segment;
    for (int64_t row = 0; row < to; row += s->kept, s++)
        for (int64_t i = from > row ? from - row : 0; i < s->kept && row + i < to; i++)
            memcpy(a->out + (row + i) * a->k, a->x + (s->first_row + s->rows - s->kept + i) * a->k,
                   (size_t)a->k * sizeof(float));
}

int attention_prepare(struct call *call, int64_t threads, void **memory, int64_t *bytes)
{
    struct attention_args *a = &call->attention;
    const struct segments *t = a->segments;
    int64_t items = 0, spans = 0, split_items = 0;
    for (int64_t n = 0; n < t->count; n++) {
        const struct segment *s = t->segment + n;
        int64_t blocks = (s->rows + a->tokens_per_item - 1) / a->tokens_per_item, whole = s->length / ATTENTION_SPAN;
        items += blocks * a->kv_heads;
        split_items += blocks * a->kv_heads * (whole + 1);
        spans = whole + 2 > spans ? whole + 2 : spans; /* the rows' own keys may reach into the next span */
    }
    a->next = 0;
    /* Sums are the same either way. */
    a->is_split = spans > 2 && a->m <= ATTENTION_ROWS && items % threads && items < 4 * threads;
    a->spans = spans;
    a->scratch_bytes = attention_scratch_bytes(a->tokens_per_item * a->heads / a->kv_heads, a->dim, a->m);
    int64_t counters = (items * (int64_t)sizeof(int32_t) + 63) / 64 * 64, scratch = threads * a->scratch_bytes;
    int64_t partials = a->m * a->heads * spans * (a->dim + 2) * (int64_t)sizeof(float);
    int64_t needed = scratch + (a->is_split ? counters + partials : 0);
    if (needed > *bytes) {
        free(*memory);
        *memory = aligned_alloc(64, (size_t)(needed + 63) / 64 * 64);
        *bytes = *memory ? needed : 0;
    }
    if (!*memory)
        return 0;
    call->items = a->is_split ? split_items : items;
    call->cost = (t->last_position + 1) * a->dim;
    a->scratch = *memory;
    if (!a->is_split)
        return 1;
    a->finished = (int32_t *)(a->scratch + scratch);
    a->partials = (float *)((char *)a->finished + counters);
    memset(a->finished, 0, (size_t)counters);
    return 1;
}

void slot_move(const struct slot *slot, int64_t from, int64_t to)
{
    int64_t row = kv_row_bytes(slot), scales = KV_CHUNK * row;
    for (int64_t layer = 0; layer < slot->layers; layer++)
        for (int64_t head = 0; head < slot->kv_heads; head++)
            for (int which = 0; which < 2; which++) {
                char *memory = which ? slot->v : slot->k;
                const char *source = memory + kv_chunk_at(slot, layer, head, from);
                char *target = memory + kv_chunk_at(slot, layer, head, to);
                memcpy(target + to % KV_CHUNK * row, source + from % KV_CHUNK * row, (size_t)row);
                if (slot->format == KV_INT8)
                    memcpy(target + scales + to % KV_CHUNK * 4, source + scales + from % KV_CHUNK * 4, 4);
            }
}

void slot_copy(const struct slot *from, const struct slot *to, int64_t positions)
{
    size_t bytes = (size_t)kv_chunk_at(from, 0, 0, positions + KV_CHUNK - 1);
    memcpy(to->k, from->k, bytes);
    memcpy(to->v, from->v, bytes);
}
