/* A pass recorded once: its kernel calls in order, made again in one parallel region with a barrier after each.
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

struct place { /* a word of a call's arguments that points into the memory which recordings share */
    int64_t call, word, offset;
};

struct recording {
    struct call *calls;
    int64_t count, room;
    struct place *places;
    int64_t n_places;
    void *partials; /* of attention: one call at a time needs them */
    int64_t partials_bytes;
};

struct recording *recording_new(void)
{
    return calloc(1, sizeof(struct recording));
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
    r->calls[r->count++] = *call;
    return 1;
}

void recording_free(struct recording *r)
{
    for (int64_t i = 0; i < r->count; i++)
        free(r->calls[i].scratch);
    free(r->calls);
    free(r->partials);
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
    case STAYS: break;
    }
    return NULL;
}

#define WORDS ((int64_t)((sizeof(struct call) - offsetof(struct call, int8_linear)) / sizeof(int64_t)))
static int64_t *words(struct call *call)
{
    return (int64_t *)&call->int8_linear;
}

/* A result of a recorded call: used from one call to another, and in the meantime in the way of other results. */
struct result {
    int64_t address, bytes, first, last, offset;
};

/* The first gap that nothing else uses meanwhile. Earlier results have their place. */
static int64_t find_place(const struct result *results, int64_t n)
{
    const struct result *mine = results + n;
    int64_t offset = 0;
    for (int64_t i = 0; i < n; i++) {
        const struct result *r = results + i;
        int together = r->first <= mine->last && mine->first <= r->last;
        if (together && r->offset < offset + mine->bytes && offset < r->offset + r->bytes) {
            offset = (r->offset + r->bytes + 63) / 64 * 64;
            i = -1; /* it may be in the way of another now */
        }
    }
    return offset;
}

int64_t recording_share(struct recording *recording, int64_t n, const int64_t *addresses, int64_t *offset)
{
    struct recording *r = recording;
    struct result *results = calloc((size_t)n + 1, sizeof *results);
    struct place *places = malloc((size_t)(r->count * WORDS + 1) * sizeof *places);
    int64_t n_places = 0, total = 0;
    if (!results || !places) {
        free(results);
        free(places);
        return -1;
    }
    for (int64_t i = 0; i < n; i++)
        results[i] = (struct result){addresses[2 * i], addresses[2 * i + 1], r->count, -1, 0};
    results[n - 1].last = r->count; /* what the pass returns */
    for (int64_t call = 0; call < r->count; call++)
        for (int64_t word = 0; word < WORDS; word++) {
            int64_t value = words(r->calls + call)[word];
            for (int64_t i = 0; i < n; i++) {
                struct result *result = results + i;
                if (value < result->address || value >= result->address + result->bytes)
                    continue;
                result->first = call < result->first ? call : result->first;
                result->last = call > result->last ? call : result->last;
                places[n_places++] = (struct place){call, word, i};
                break;
            }
        }
    for (int64_t i = 0; i < n; i++) {
        results[i].offset = find_place(results, i);
        int64_t end = results[i].offset + results[i].bytes;
        total = end > total ? end : total;
    }
    for (int64_t i = 0; i < n_places; i++) {
        struct result *result = results + places[i].offset;
        places[i].offset = result->offset + words(r->calls + places[i].call)[places[i].word] - result->address;
    }
    *offset = results[n - 1].offset;
    free(results);
    r->places = places;
    r->n_places = n_places;
    return total;
}

void recording_place(struct recording *r, char *memory)
{
    for (int64_t i = 0; i < r->n_places; i++)
        words(r->calls + r->places[i].call)[r->places[i].word] = (int64_t)(uintptr_t)(memory + r->places[i].offset);
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
        int team = call->items < threads ? (int)call->items : threads;
        team = call->most_threads < team ? (int)call->most_threads : team;
        if (thread < team)
            call->task(&call->int8_linear, thread, team);
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

const char *recording_replay(struct recording *r, int threads, int64_t *nanoseconds)
{
    for (int64_t i = 0; i < r->count; i++) {
        const char *wrong = check(r->calls + i);
        if (wrong)
            return wrong;
    }
    const void *before;
    do { /* again where memory was taken anew: earlier calls point to what there was */
        before = r->partials;
        for (int64_t i = 0; i < r->count; i++) {
            struct call *call = r->calls + i;
            if (call->moving == ATTENTION)
                call->items = attention_prepare(&call->attention, threads, &r->partials, &r->partials_bytes);
        }
    } while (r->partials != before);
    struct replay replay = {.recording = r, .nanoseconds = nanoseconds};
    parallel_run(replay_calls, &replay, threads);
    return NULL;
}
