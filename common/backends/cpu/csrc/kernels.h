/* The kernels' arguments and the table through which one instruction set's versions are called.
 *
 * Every kernel runs as `task(args, thread, threads)` on each thread of a team, takes its share of the work
 * and returns; none waits for another thread. The promise kept by all: what is computed for one token row
 * depends neither on the number of rows, nor on the row's place among them, nor on the number of threads. The arguments
 * of all begin with the number of rows. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define BLOCK 32       /* outputs per block of a packed weight */
#define MAX_THREADS 256
#define MOST_TOP_K 64
#define DIGIT_BITS 4   /* of the lower digit of a wide input */
#define WIDEST 2039    /* the largest one: its upper digit, rounded, is 127 */

struct int8_linear_args {
    int64_t m;
    const void *x;           /* int8 [m, k4 * 4], zero beyond k; where it is wide, what `digits` made of it */
    const float *x_scale;    /* [m] */
    const uint8_t *weight;   /* packed by `layout`, zeros where padded */
    const float *w_scale;    /* [n] */
    const float *bias;       /* [n] or NULL */
    float *out;              /* [m, n] */
    int64_t n, k4, wide;
};

struct float_linear_args {
    int64_t m;
    const void *x;           /* float [m, k], or what round_bf16 made of it */
    const void *weight;      /* float or bf16, packed by `layout` */
    const float *bias;       /* [n] or NULL */
    float *out;              /* [m, n] */
    int64_t n, k;
};

#define INT4_DIGIT_BITS 7 /* of the lower digit of W4A16's inputs */
#define INT4_MOST_GROUP 16384 /* inputs: 2^13 * 15 * that is what int32 holds */
struct int4_inputs_args {
    int64_t m;
    const void *x;           /* float [m, k]; or int8 [m, k] between -7 and 7 where there is no scale */
    int8_t *q;               /* [m, k, digits], in an order of int4_linear's own: tile by tile, 8 inputs at a time */
    float *scale;            /* [2, m, k / group]: powers of two, then `sums` times those; or NULL: x is digits already */
    int32_t *sums;           /* [m, k / group]: -8 times the sum of a group's integers */
    int64_t k, group;
};

struct int4_linear_args {
    int64_t m;
    const int8_t *x;         /* what int4_inputs made */
    const float *x_scale;    /* from int4_inputs with two digits, [m] with one */
    const int32_t *sums;     /* [m, k / group], from int4_inputs */
    const uint8_t *weight;   /* [ceil(n / 32), k / 8, 32, 4], see pack.c */
    const uint16_t *w_scale; /* bfloat16 [ceil(n / 32), k / group, 32] */
    const uint16_t *offset;  /* likewise, or NULL */
    const float *bias;       /* [n] or NULL */
    float *out;              /* [m, n] */
    int64_t n, k, group, digits;
};

struct embed_args {
    int64_t m;
    const void *table;       /* float or bf16 [vocab, k] */
    const int64_t *ids;      /* [m] */
    float *out;              /* [m, k] */
    int64_t vocab, k;
};

struct round_args {
    int64_t m;
    const float *x;          /* [m, k] */
    void *rounded;           /* room for [m, k] floats; what is in it only rounded_linear knows */
    int64_t k;
};

struct quantize_args {
    int64_t m;
    const float *x;          /* [m, k] */
    int8_t *q;               /* [m, k] */
    float *scale;            /* [m] */
    const float *static_scale; /* [1], or NULL for each row's own */
    int64_t k, limit;        /* the largest magnitude of q by a row's own scale: 127 or 7 */
};

struct digits_args {
    int64_t m;
    const float *x;          /* [m, k] */
    void *q;                 /* int16 [m, k] where the set takes that, or int8 [m, 2, k]: a row's upper digits, its lower ones */
    float *scale;            /* [m] */
    int64_t k;
};

struct hadamard_args {
    int64_t m;
    const float *x;          /* [m, k] */
    float *y;                /* [m, k]: each block of k times the normalised Hadamard matrix */
    int64_t k, block;        /* a power of two that divides k */
};

struct norm_args {
    int64_t m;
    float *x;                /* [m, k]: residual is added in place */
    const float *residual;   /* [m, k] or NULL */
    const float *weight;     /* [k] */
    float eps;
    float *y;                /* [m, k], or NULL when q is asked for */
    int8_t *q;               /* [m, k] or NULL */
    float *scale;            /* [m] with q */
    float *scratch;          /* [threads, k] with q */
    int64_t k;
};

struct swiglu_args {
    int64_t m;
    const float *x;          /* [m, 2, k]: gate, then up */
    float *y;                /* [m, k], or NULL when q is asked for */
    int8_t *q;               /* [m, k] or NULL */
    float *scale;            /* [m] with q */
    float *scratch;          /* [threads, k] with q */
    int64_t k;
};

/* What one pass runs over, one segment per sequence. The table stays at its address: a recorded pass points to it, and
 * only what it says changes from replay to replay. Row i of a segment is written at position length + i of its slot;
 * it sees the committed positions, its ancestors and itself, as if its ancestors stood at length, length + 1, ... */
enum kv_format { KV_FLOAT32, KV_BFLOAT16, KV_INT8 };
#define KV_CHUNK 64          /* positions that lie together, of all layers and heads: memory grows as text does */
struct slot {
    char *k, *v;             /* [capacity / 64, layers, kv_heads], each [64, dim] and, for int8, float scale[64] */
    int64_t capacity, layers, kv_heads, dim, format;
};
static inline int64_t kv_row_bytes(const struct slot *s)
{
    return s->dim * 4 >> s->format;
}
static inline int64_t kv_chunk_bytes(const struct slot *s)
{
    return KV_CHUNK * (kv_row_bytes(s) + (s->format == KV_INT8 ? (int64_t)sizeof(float) : 0));
}
/* Where the chunk of a position begins. */
static inline int64_t kv_chunk_at(const struct slot *s, int64_t layer, int64_t head, int64_t position)
{
    return ((position / KV_CHUNK * s->layers + layer) * s->kv_heads + head) * kv_chunk_bytes(s);
}
struct segment {
    struct slot slot;
    int64_t length;          /* committed positions */
    int64_t first_row, rows;
    int64_t kept;            /* of the last rows, whose logits are wanted */
    int64_t is_tree;         /* 0: each row follows the one before */
};
struct row {
    int32_t segment;
    int32_t parent;          /* row of the segment, -1: the committed text */
    int64_t position;        /* rotary: length + number of ancestors in the segment */
};
struct segments {
    int64_t room;            /* rows that the table has room for, and as many segments */
    int64_t rows, kept, count; /* of all segments; segments */
    int64_t last_position;   /* the highest of all rows */
    struct segment *segment; /* [count] */
    struct row *row;         /* [rows] */
};

struct keep_args {
    int64_t m;               /* rows that are kept, as the segments say */
    const float *x;          /* [rows, k] */
    float *out;              /* [m, k] */
    const struct segments *segments;
    int64_t k;
};

struct rope_args {
    int64_t m;
    const float *qkv;        /* [m, (heads + 2 * kv_heads) * dim] */
    const float *q_weight;   /* [dim] or NULL: RMSNorm of each query head */
    const float *k_weight;   /* [dim] or NULL */
    float eps;
    const float *cos, *sin;  /* [positions, table_stride]; the first dim / 2 of each row are read */
    float *q;                /* [m, heads, dim] */
    const struct segments *segments;
    int64_t heads, kv_heads, dim, positions, table_stride, layer;
};

struct attention_args {
    int64_t m;
    const float *q;          /* [m, heads, dim] */
    const struct segments *segments;
    float *out;              /* [m, heads * dim] */
    float scale;
    char *scratch;           /* [threads, scratch_bytes], 64-byte aligned */
    int64_t heads, kv_heads, dim, layer;
    int64_t tokens_per_item, scratch_bytes;
    int64_t next;            /* work items handed out so far */
    int64_t is_split, spans; /* whether spans of keys are items of their own, and the most that a row has */
    int32_t *finished;       /* [items without spans]: spans that are done */
    float *partials;         /* [m * heads, spans, dim + 2]: sums of a span, their maximum and total, where is_split */
};

struct read_args {
    const char *data;        /* [lines, 64] */
    int64_t lines;
    int32_t result;          /* all 32-bit words, xor */
};

struct top_k_args {
    int64_t m;
    const float *x;          /* [m, n] */
    int64_t *out;            /* [m, k]: indices, largest value first, the lower index first on ties */
    int64_t n, k;            /* k at most MOST_TOP_K and n */
};

struct argmax_args {
    int64_t m;
    const float *x;          /* [m, n] */
    int64_t *out;            /* [m] */
    int64_t n;
};

typedef void (*task_fn)(void *args, int thread, int threads);

/* How a weight lies in memory, [ceil(n / width), k / inputs, width, inputs], which is up to the kernels that read it. */
struct layout {
    int64_t int8_width, int8_inputs, float_width, int4_inputs; /* inputs of an output that lie together */
    uint8_t int8_shift;      /* added to each value */
};

struct kernels {
    const char *name;
    struct layout layout;
    int takes_int16;         /* whether int8_linear multiplies int16 inputs as well, and `digits` leaves them whole */
    task_fn int8_linear, f32_linear, bf16_linear, rounded_linear, round_bf16, embed_bf16, embed_f32, quantize, norm;
    task_fn swiglu, rope, attention, argmax, top_k, read, hadamard;
    task_fn digits, int4_linear, int4_inputs;
    void (*exp)(const float *x, float *y, int64_t n); /* for the accuracy test */
};

extern const struct kernels kernels_amx, kernels_avx512bf16, kernels_avx512, kernels_avxvnni, kernels_avx2;
extern const struct kernels kernels_i8mm, kernels_dotprod, kernels_plain;

/* Whether the compiler can make kernels_amx, and Linux is there to be asked for the tiles. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAVE_AMX 1
#endif

/* Whether the compiler can make kernels_dotprod: older clang has the intrinsics only where every processor has them. */
#if defined(__aarch64__) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 16)
#define HAVE_DOTPROD 1
#endif

/* Whether it can make kernels_i8mm. */
#if HAVE_DOTPROD && (defined(__clang__) || __GNUC__ >= 10)
#define HAVE_I8MM 1
#endif

/* parallel.c */
int parallel_use(const char *library);
void parallel_run(task_fn task, void *args, int threads);

/* recording.c: a pass of kernel calls, made again with any number of rows */
enum moving { STAYS, EMBED, ROPE, ATTENTION, KEEP }; /* what differs from replay to replay: ids, or segments */
struct call {
    const char *name;
    task_fn task;
    enum moving moving;
    int64_t items, cost;     /* independent pieces of work, 0: each row is one; elements of a piece */
    int64_t most_threads;    /* that scratch has room for */
    void *scratch;           /* from malloc, or NULL: belongs to the call */
    const void *weight;      /* what the call reads from memory and nothing else does, or NULL; in whole blocks, */
    int64_t block_bytes, blocks; /* of which every thread has its share */
    int after_keep;          /* whether its rows are those that the pass keeps: from `keep_rows` on */
    union {
        int64_t m;           /* what all arguments begin with */
        struct int8_linear_args int8_linear;
        struct float_linear_args float_linear;
        struct int4_linear_args int4_linear;
        struct int4_inputs_args int4_inputs;
        struct embed_args embed;
        struct round_args round;
        struct quantize_args quantize;
        struct digits_args digits;
        struct hadamard_args hadamard;
        struct norm_args norm;
        struct swiglu_args swiglu;
        struct rope_args rope;
        struct attention_args attention;
        struct keep_args keep;
        struct argmax_args argmax;
        struct top_k_args top_k;
    };
};
/* Starting a team costs a microsecond, in which one core does some 16 thousand elements of the row-wise kernels; within a
 * replay the team is there already, and only what it shares has to travel. */
#define ALONE 16384
#define ALONE_IN_REPLAY 2048
static inline int64_t call_team(const struct call *call, int64_t threads, int64_t alone)
{
    int64_t items = call->items ? call->items : call->m;
    threads = items * call->cost < alone ? 1 : threads;
    threads = threads < call->most_threads ? threads : call->most_threads;
    return !call->m ? 0 : threads < items ? threads : items;
}
struct recording;
struct recording *recording_new(int64_t rows); /* of the pass whose calls are added */
int recording_add(struct recording *, const struct call *); /* takes the scratch; 0 when out of memory */
int64_t recording_calls(const struct recording *, const struct call **); /* how many, and where */
/* Gives the results of calls places in one memory, one after another's last use. addresses: address and bytes of each of n
 * results, what the pass returns last. NULL, or what is wrong. */
const char *recording_share(struct recording *, int64_t n, const int64_t *addresses);
/* Bytes of that memory for a pass of so many rows, and where in it the pass's result is. */
int64_t recording_bytes(const struct recording *, int64_t rows, int64_t kept, int64_t *result);
/* NULL, or what is wrong with the ids or the segments: then nothing is done. nanoseconds of each call: [calls], or NULL */
const char *recording_replay(struct recording *, int threads, int64_t rows, int64_t kept, char *memory,
                             int64_t *nanoseconds);
void recording_free(struct recording *);

/* segments.c. Checks return NULL, or what is wrong. */
const char *embed_check(const struct embed_args *);
const char *rope_check(const struct rope_args *);
const char *attention_check(const struct attention_args *);
const char *keep_check(const struct keep_args *);
void keep_rows(void *args, int thread, int threads);
/* Divides a call of `attention` into items, and takes *memory, of *bytes from malloc, for scratch and partial sums: more of
 * it if need be. 0 when out of memory. */
int attention_prepare(struct call *, int64_t threads, void **memory, int64_t *bytes);
const char *segments_finish(struct segments *); /* derives what follows from slots, lengths, rows and parents */
void slot_move(const struct slot *, int64_t from, int64_t to);                      /* one position over another */
void slot_copy(const struct slot *from, const struct slot *to, int64_t positions); /* the first ones */

/* pack.c. Fresh memory in huge pages where the system leaves that to us: fewer stops of the prefetcher at page ends. */
void use_huge_pages(void *, size_t bytes);
/* Weights from row-major [n, k] to the layouts above */
void pack_int8(const struct layout *, const int8_t *weight, uint8_t *packed, int64_t n, int64_t k);
void pack_int4(const struct layout *, const int8_t *weight, uint8_t *packed, int64_t n, int64_t k);
void pack_scales(const uint16_t *scale, uint16_t *packed, int64_t n, int64_t groups);
void pack_bf16(const struct layout *, const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k);
void pack_f32(const struct layout *, const float *weight, float *packed, int64_t n, int64_t k);

/* Rows of q that share one pass over a chunk of keys, the keys of a chunk, and those of a span. */
#define ATTENTION_ROWS 64
#define ATTENTION_KEYS KV_CHUNK
#define ATTENTION_SPAN 1024
#define ATTENTION_MOST_DIM 1024 /* of a head */
/* Chunks that hold the last committed keys, fewer than one chunk's, and those of so many rows of a tree. */
static inline int64_t tree_chunks(int64_t rows)
{
    return (rows + 2 * ATTENTION_KEYS - 2) / ATTENTION_KEYS;
}
/* Rows that scratch memory has room for: tiles of 16 may begin at any row. */
static inline int64_t attention_room(int64_t rows)
{
    return (rows + 30) / 16 * 16;
}
static inline int64_t attention_scratch_bytes(int64_t rows, int64_t dim, int64_t m)
{
    /* transposed keys; values as floats; per row scores, a scaled query, its tiles, and twice an output, maximum and sum, two
     * factors and what it sees; per row its scores over a tree's keys, and three times 32 bits for where such a key lies
     * (and alignment) */
    const int64_t room = attention_room(rows);
    int64_t floats = dim * 32 + 64 * ATTENTION_KEYS + room * (ATTENTION_KEYS + 4 * dim + 7) +
                     (room + 3) * tree_chunks(m) * ATTENTION_KEYS + 32;
    return (int64_t)sizeof(float) * (floats - floats % 16);
}
