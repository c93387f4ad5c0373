/* A pass recorded once: its kernel calls in order, made again in one parallel region with a barrier after each. Every result
 * has so many bytes for each row of the pass, so one recording serves passes of any number of rows.
 *
 * What a decode pass loses between kernels is Python, and the start of a team of threads for each of them. Here the
 * team starts once. A thread that waits for the others fetches its share of the weight that comes next, so that
 * memory is not idle while rows are normalised or attended to. */
#define _GNU_SOURCE
#include "kernels.h"

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#define SPINS 2000               /* some ten microseconds; then the core is offered to whoever else wants it */
#define AHEAD_BYTES (256 << 10)  /* fetched early per thread: a part of the L2 cache */

struct place { /* a word of a call's arguments that points to a result: so many bytes for each row from the memory's start */
    int64_t call, word, offset;
    int is_kept;         /* or for each kept row behind all results of rows */
};

struct recording {
    struct call *calls;
    int64_t count, room;
    int64_t rows, kept;  /* of the pass that was recorded */
    struct place *places;
    int64_t n_places;
    int64_t row_bytes, kept_bytes, result; /* of all results' memory: for each row, each kept row; the pass's result there */
    void *attention;     /* scratch: one call at a time needs it */
    int64_t attention_bytes;
};

struct recording *recording_new(int64_t rows)
{
    struct recording *r = calloc(1, sizeof *r);
    if (r)
        r->rows = rows;
    return r;
}

int recording_add(struct recording *r, const struct call *call)
{
    if (r->count == r->room) {
        int64_t room = r->room ? 2 * r->room : 64;
        struct call *calls = realloc(r->calls, (size_t)room * sizeof *calls);
        if (!calls)
            return 0;
        r->calls = calls;
        r->room = room;
    }
    struct call *added = r->calls + r->count++;
    *added = *call;
    if (call->moving == KEEP)
        r->kept = call->m;
    added->after_keep = r->kept > 0;
    return 1;
}

void recording_free(struct recording *r)
{
    for (int64_t i = 0; i < r->count; i++)
        free(r->calls[i].scratch);
    free(r->calls);
    free(r->attention);
    free(r->places);
    free(r);
}

/* What is wrong with what changed since the call was made last. */
static const char *check(const struct call *call)
{
    switch (call->moving) {
    case EMBED: return embed_check(&call->embed);
    case ROPE: return rope_check(&call->rope);
    case ATTENTION: return attention_check(&call->attention);
    case KEEP: return keep_check(&call->keep);
    case STAYS: break;
    }
    return NULL;
}

#define WORDS ((int64_t)((sizeof(struct call) - offsetof(struct call, m)) / sizeof(int64_t)))
static int64_t *words(struct call *call)
{
    return &call->m;
}

/* A result of a recorded call: used from one call to another, and in the meantime in the way of other results. */
struct result {
    int64_t address, bytes, first, last, offset; /* bytes and offset: for each row, or kept row, of the pass */
    int is_kept;
};

/* The first gap that nothing else of its kind uses meanwhile. Earlier results have their place. */
static int64_t find_place(const struct result *results, int64_t n)
{
    const struct result *mine = results + n;
    int64_t offset = 0;
    for (int64_t i = 0; i < n; i++) {
        const struct result *r = results + i;
        int together = r->is_kept == mine->is_kept && r->first <= mine->last && mine->first <= r->last;
        if (together && r->offset < offset + mine->bytes && offset < r->offset + r->bytes) {
            offset = r->offset + r->bytes;
            i = -1; /* it may be in the way of another now */
        }
    }
    return offset;
}

const char *recording_share(struct recording *r, int64_t n, const int64_t *addresses)
{
    struct result *results = calloc((size_t)n + 1, sizeof *results);
    struct place *places = malloc((size_t)(r->count * WORDS + 1) * sizeof *places);
    const char *wrong = results && places ? NULL : "out of memory";
    for (int64_t i = 0; !wrong && i < n; i++)
        results[i] = (struct result){addresses[2 * i], addresses[2 * i + 1], r->count, -1, 0, 0};
    int64_t n_places = 0;
    for (int64_t call = 0; !wrong && call < r->count; call++)
        for (int64_t word = 0; word < WORDS; word++) {
            int64_t value = words(r->calls + call)[word];
            for (int64_t i = 0; i < n; i++) {
                struct result *result = results + i;
                if (value < result->address || value >= result->address + result->bytes)
                    continue;
                if (value > result->address)
                    wrong = "a call points into a result, where rows of other numbers would not begin";
                if (result->last < 0) {
                    result->first = call;
                    result->is_kept = r->calls[call].after_keep;
                }
                result->last = call;
                places[n_places++] = (struct place){call, word, i, 0};
                break;
            }
        }
    if (!wrong)
        results[n - 1].last = r->count; /* what the pass returns */
    for (int64_t i = 0; !wrong && i < n; i++) {
        struct result *result = results + i;
        int64_t *all = result->is_kept ? &r->kept_bytes : &r->row_bytes;
        result->bytes = (result->bytes / (result->is_kept ? r->kept : r->rows) + 63) / 64 * 64;
        result->offset = find_place(results, i);
        *all = result->offset + result->bytes > *all ? result->offset + result->bytes : *all;
    }
    for (int64_t i = 0; !wrong && i < n_places; i++) {
        places[i].is_kept = results[places[i].offset].is_kept;
        places[i].offset = results[places[i].offset].offset;
    }
    r->result = wrong ? 0 : results[n - 1].offset;
    r->places = places;
    r->n_places = wrong ? 0 : n_places;
    free(results);
    return wrong;
}

int64_t recording_bytes(const struct recording *r, int64_t rows, int64_t kept, int64_t *result)
{
    *result = r->row_bytes * rows + r->result * kept;
    return r->row_bytes * rows + r->kept_bytes * kept;
}

struct replay {
    struct recording *recording;
    int64_t *nanoseconds; /* of each call, or NULL */
    _Atomic int arrived, phase;
};

static inline void pause_core(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits until all threads have come here, and fetches from *ahead up to `end` meanwhile. */
static void meet(struct replay *replay, int threads, const char **ahead, const char *end)
{
    int phase = atomic_load_explicit(&replay->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&replay->arrived, 1, memory_order_acq_rel) + 1 == threads) {
        atomic_store_explicit(&replay->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&replay->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&replay->phase, memory_order_acquire) == phase;)
        if (*ahead < end) {
            for (int line = 0; line < 4; line++, *ahead += 64)
                __builtin_prefetch(*ahead, 0, 2);
        } else if (++spins < SPINS) {
            pause_core();
        } else {
            sched_yield();
        }
}

static int64_t clock_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void replay_calls(void *data, int thread, int threads)
{
    struct replay *replay = data;
    struct recording *r = replay->recording;
    int64_t next = -1; /* the next call that reads a weight */
    const char *ahead = NULL, *end = NULL;
    int64_t *nanoseconds = thread ? NULL : replay->nanoseconds, since = nanoseconds ? clock_now() : 0;
    for (int64_t i = 0; i < r->count; i++) {
        struct call *call = r->calls + i;
        int team = (int)call_team(call, threads, ALONE_IN_REPLAY);
        if (thread < team)
            call->task(&call->m, thread, team);
        if (next <= i) {
            for (next = i + 1; next < r->count && !r->calls[next].weight; next++)
                ;
            if (next < r->count) {
                const struct call *w = r->calls + next;
                ahead = (const char *)w->weight + w->blocks * thread / threads * w->block_bytes;
                end = (const char *)w->weight + w->blocks * (thread + 1) / threads * w->block_bytes;
                end = end - ahead < AHEAD_BYTES ? end : ahead + AHEAD_BYTES;
            } else {
                ahead = end = NULL;
            }
        }
        meet(replay, threads, &ahead, end);
        if (nanoseconds) {
            int64_t now = clock_now();
            nanoseconds[i] = now - since;
            since = now;
        }
    }
}

int64_t recording_calls(const struct recording *r, const struct call **calls)
{
    *calls = r->calls;
    return r->count;
}

/* The calls of a pass over so many rows. */
static void set_rows(struct recording *r, int64_t rows, int64_t kept, char *memory)
{
    for (int64_t i = 0; i < r->count; i++)
        r->calls[i].m = r->calls[i].after_keep ? kept : rows;
    for (int64_t i = 0; i < r->n_places; i++) {
        const struct place *p = r->places + i;
        char *to = memory + (p->is_kept ? r->row_bytes * rows + p->offset * kept : p->offset * rows);
        words(r->calls + p->call)[p->word] = (int64_t)(uintptr_t)to;
    }
}

const char *recording_replay(struct recording *r, int threads, int64_t rows, int64_t kept, char *memory,
                             int64_t *nanoseconds)
{
    set_rows(r, rows, kept, memory);
    for (int64_t i = 0; i < r->count; i++) {
        const char *wrong = check(r->calls + i);
        if (wrong)
            return wrong;
    }
    const void *before;
    do { /* again where memory was taken anew: earlier calls point to what there was */
        before = r->attention;
        for (int64_t i = 0; i < r->count; i++)
            if (r->calls[i].moving == ATTENTION &&
                !attention_prepare(r->calls + i, threads, &r->attention, &r->attention_bytes))
                return "out of memory";
    } while (r->attention != before);
    struct replay replay = {.recording = r, .nanoseconds = nanoseconds};
    parallel_run(replay_calls, &replay, threads);
    return NULL;
}
