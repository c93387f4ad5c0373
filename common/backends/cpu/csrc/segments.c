/* The table of segments that a pass runs over: what is checked before kernels read memory by it, and its slots' memory. */
#include "kernels.h"

#include <string.h>

const char *segments_finish(struct segments *t)
{
    t->rows = t->last_position = 0;
    for (int64_t n = 0; n < t->count; n++) {
        struct segment *s = t->segment + n;
        const struct slot *first = &t->segment->slot;
        if (s->slot.layers != first->layers || s->slot.kv_heads != first->kv_heads || s->slot.dim != first->dim)
            return "the slots of a batch differ in layers, heads or dimensions";
        s->first_row = t->rows;
        s->is_tree = 0;
        t->rows += s->rows;
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

int64_t attention_items(const struct attention_args *a)
{
    int64_t blocks = 0;
    for (int64_t n = 0; n < a->segments->count; n++)
        blocks += (a->segments->segment[n].rows + a->tokens_per_item - 1) / a->tokens_per_item;
    return blocks * a->kv_heads;
}

void slot_move(const struct slot *slot, int64_t from, int64_t to)
{
    int64_t bytes = slot->dim * (int64_t)sizeof(float);
    for (int64_t head = 0; head < slot->layers * slot->kv_heads; head++) {
        int64_t at = head * slot->capacity;
        memcpy(slot->k + (at + to) * bytes, slot->k + (at + from) * bytes, (size_t)bytes);
        memcpy(slot->v + (at + to) * bytes, slot->v + (at + from) * bytes, (size_t)bytes);
    }
}

void slot_copy(const struct slot *from, const struct slot *to, int64_t positions)
{
    int64_t bytes = from->dim * (int64_t)sizeof(float);
    for (int64_t head = 0; head < from->layers * from->kv_heads; head++) {
        memcpy(to->k + head * to->capacity * bytes, from->k + head * from->capacity * bytes, (size_t)(positions * bytes));
        memcpy(to->v + head * to->capacity * bytes, from->v + head * from->capacity * bytes, (size_t)(positions * bytes));
    }
}
