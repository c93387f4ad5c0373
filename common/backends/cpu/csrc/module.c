/* The Python module `_kernels`: tensors come as addresses (`data_ptr()`), sizes as integers; nothing is checked here,
 * the Python side does. Chooses the instruction set, brings scratch memory, releases the GIL, and keeps the
 * recording if there is one. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#define REQUEST_STATE 0x1023 /* ARCH_REQ_XCOMP_PERM: what a process must ask Linux for, once, before it uses tiles */
#define TILE_DATA 18
#endif
#elif HAVE_DOTPROD
#include <sys/auxv.h>
#define DOT_PRODUCTS (1UL << 20)  /* of AT_HWCAP: HWCAP_ASIMDDP, which older headers lack */
#define INT8_MATRICES (1UL << 13) /* of AT_HWCAP2: HWCAP2_I8MM, likewise */
#endif

static const struct kernels *isa = &kernels_plain;

static int supported(const struct kernels *k)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
#if HAVE_AMX
    if (k == &kernels_amx) /* bf16 dot products; tiles, int8 and bf16 ones; and leave to use them */
        return avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) &&
               __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) && (d >> 22 & 1) &&
               !syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA);
#endif
    if (k == &kernels_avx512bf16)
        return avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    if (k == &kernels_avx512)
        return avx512;
    if (k == &kernels_avxvnni)
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    if (k == &kernels_avx2)
        return avx2;
#elif HAVE_DOTPROD
    int dotprod = (getauxval(AT_HWCAP) & DOT_PRODUCTS) != 0;
#if HAVE_I8MM
    if (k == &kernels_i8mm)
        return dotprod && (getauxval(AT_HWCAP2) & INT8_MATRICES) != 0;
#endif
    if (k == &kernels_dotprod)
        return dotprod;
#endif
    return k == &kernels_plain;
}

static const struct kernels *const all_kernels[] = {
#if HAVE_AMX
    &kernels_amx,
#endif
#if defined(__x86_64__)
    &kernels_avx512bf16, &kernels_avx512, &kernels_avxvnni, &kernels_avx2,
#elif HAVE_DOTPROD
#if HAVE_I8MM
    &kernels_i8mm,
#endif
    &kernels_dotprod,
#endif
    &kernels_plain,
};
#define COUNT (sizeof all_kernels / sizeof *all_kernels)

/* An argument is an address, an integer or a float; the caller knows which. */
union word {
    int64_t i;
    double f;
};

static int parse(PyObject *const *objects, Py_ssize_t n, Py_ssize_t expected, union word *words)
{
    if (n != expected) {
        PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", expected, n);
        return 0;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (PyFloat_Check(objects[i]))
            words[i].f = PyFloat_AsDouble(objects[i]);
        else if ((words[i].i = PyLong_AsLongLong(objects[i])) == -1 && PyErr_Occurred())
            return 0;
    return 1;
}

#define FUNCTION(name, count)                                                                                          \
    static PyObject *name(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)                   \
    {                                                                                                                  \
        union word w[count];                                                                                           \
        if (!parse(objects, n_objects, count, w))                                                                      \
            return NULL;
#define ADDRESS(at) ((void *)(uintptr_t)w[at].i)
#define INT(at) (w[at].i)
#define FLOAT(at) ((float)w[at].f)

static int64_t team(int64_t threads)
{
    return threads < MAX_THREADS ? threads : MAX_THREADS;
}

static void *scratch(int64_t bytes)
{
    return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
}

static _Thread_local struct recording *recorder; /* NULL unless this thread is recording */

/* Runs the call, or records it. */
static PyObject *run(struct call *call, int64_t threads)
{
    call->most_threads = team(threads);
    if (recorder && recording_add(recorder, call))
        Py_RETURN_NONE;
    if (!recorder) {
        Py_BEGIN_ALLOW_THREADS
        parallel_run(call->task, &call->m, (int)call_team(call, threads, ALONE));
        Py_END_ALLOW_THREADS
    }
    free(call->scratch);
    if (recorder)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* x, x_scale, weight, w_scale, bias, out, m, n, k, threads, is x what digits made? */
FUNCTION(py_int8_linear, 11)
    const int wide = INT(10) != 0;
    const int64_t n = INT(7), k = INT(8), k4 = (k + 3) / 4, blocks = (n + BLOCK - 1) / BLOCK;
    const int64_t rows = INT(6) * (wide && !isa->takes_int16 ? 2 : 1), size = wide && isa->takes_int16 ? 2 : 1;
    const char *x = ADDRESS(0);
    char *padded = NULL;
    if (k % 4) {
        if (recorder)
            return PyErr_Format(PyExc_NotImplementedError, "inputs of %lld are padded anew in each pass", (long long)k);
        if (!(padded = scratch(rows * k4 * 4 * size)))
            return PyErr_NoMemory();
        for (int64_t row = 0; row < rows; row++) {
            memset(padded + ((row + 1) * k4 * 4 - 4) * size, 0, (size_t)(4 * size));
            memcpy(padded + row * k4 * 4 * size, x + row * k * size, (size_t)(k * size));
        }
    }
    struct call call = {
        .name = "int8_linear", .task = isa->int8_linear, .items = blocks, .scratch = padded, .cost = k * BLOCK,
        .weight = ADDRESS(2), .block_bytes = k4 * BLOCK * 4, .blocks = blocks,
        .int8_linear = {
            .m = INT(6), .x = padded ? padded : x, .x_scale = ADDRESS(1), .weight = ADDRESS(2), .w_scale = ADDRESS(3),
            .bias = ADDRESS(4), .out = ADDRESS(5), .n = n, .k4 = k4, .wide = wide,
        },
    };
    return run(&call, INT(9));
}

/* bf16?, x, weight, bias, out, m, n, k, threads, rounded? (x as round_bf16 made it) */
FUNCTION(py_float_linear, 10)
    int64_t n = INT(6), k = INT(7), blocks = (n + BLOCK - 1) / BLOCK;
    struct call call = {
        .name = "float_linear", .items = blocks, .cost = k * BLOCK,
        .task = INT(9) ? isa->rounded_linear : INT(0) ? isa->bf16_linear : isa->f32_linear,
        .weight = ADDRESS(2), .block_bytes = INT(0) ? (k + 1) / 2 * 2 * BLOCK * 2 : k * BLOCK * 4, .blocks = blocks,
        .float_linear = {
            .m = INT(5), .x = ADDRESS(1), .weight = ADDRESS(2), .bias = ADDRESS(3), .out = ADDRESS(4), .n = n, .k = k,
        },
    };
    return run(&call, INT(8));
}

/* x, q, scale (0: x is int8), sums, m, k, group, threads */
FUNCTION(py_int4_inputs, 8)
    struct call call = {
        .name = "int4_inputs", .task = isa->int4_inputs, .cost = INT(5),
        .int4_inputs = {
            .m = INT(4), .x = ADDRESS(0), .q = ADDRESS(1), .scale = ADDRESS(2), .sums = ADDRESS(3), .k = INT(5),
            .group = INT(6),
        },
    };
    return run(&call, INT(7));
}

/* x, x_scale, sums, weight, w_scale, offset, bias, out, m, n, k, group, digits, threads */
FUNCTION(py_int4_linear, 14)
    int64_t n = INT(9), k = INT(10), blocks = (n + BLOCK - 1) / BLOCK;
    struct call call = {
        .name = "int4_linear", .task = isa->int4_linear, .items = blocks, .cost = k * BLOCK,
        .weight = ADDRESS(3), .block_bytes = k / 2 * BLOCK, .blocks = blocks,
        .int4_linear = {
            .x = ADDRESS(0), .x_scale = ADDRESS(1), .sums = ADDRESS(2), .weight = ADDRESS(3), .w_scale = ADDRESS(4),
            .offset = ADDRESS(5), .bias = ADDRESS(6), .out = ADDRESS(7), .m = INT(8), .n = n, .k = k, .group = INT(11),
            .digits = INT(12),
        },
    };
    return run(&call, INT(13));
}

/* x, y, block, m, k, threads */
FUNCTION(py_hadamard, 6)
    struct call call = {
        .name = "hadamard", .task = isa->hadamard, .cost = 4 * INT(4),
        .hadamard = {.m = INT(3), .x = ADDRESS(0), .y = ADDRESS(1), .block = INT(2), .k = INT(4)},
    };
    return run(&call, INT(5));
}

/* bf16?, table, ids, out, vocab, m, k, threads */
FUNCTION(py_embed, 8)
    struct call call = {
        .name = "embed", .task = INT(0) ? isa->embed_bf16 : isa->embed_f32, .moving = EMBED, .cost = INT(6),
        .embed = {
            .m = INT(5), .table = ADDRESS(1), .ids = ADDRESS(2), .out = ADDRESS(3), .vocab = INT(4), .k = INT(6),
        },
    };
    const char *wrong = recorder ? NULL : embed_check(&call.embed);
    if (wrong)
        return PyErr_Format(PyExc_IndexError, "%s", wrong);
    return run(&call, INT(7));
}

/* x, rounded, m, k, threads */
FUNCTION(py_round_bf16, 5)
    struct call call = {
        .name = "round_bf16", .task = isa->round_bf16, .cost = INT(3),
        .round = {.m = INT(2), .x = ADDRESS(0), .rounded = ADDRESS(1), .k = INT(3)},
    };
    return run(&call, INT(4));
}

/* x, q, scale, limit, m, k, threads, static_scale */
FUNCTION(py_quantize, 8)
    struct call call = {
        .name = "quantize", .task = isa->quantize, .cost = INT(5),
        .quantize = {
            .m = INT(4), .x = ADDRESS(0), .q = ADDRESS(1), .scale = ADDRESS(2), .limit = INT(3), .k = INT(5),
            .static_scale = ADDRESS(7),
        },
    };
    return run(&call, INT(6));
}

/* x, q, scale, m, k, threads */
FUNCTION(py_digits, 6)
    struct call call = {
        .name = "digits", .task = isa->digits, .cost = INT(4),
        .digits = {.m = INT(3), .x = ADDRESS(0), .q = ADDRESS(1), .scale = ADDRESS(2), .k = INT(4)},
    };
    return run(&call, INT(5));
}

/* x, residual, weight, eps, y, q, scale, m, k, threads */
FUNCTION(py_add_rms_norm, 10)
    int64_t k = INT(8);
    struct call call = {
        .name = "add_rms_norm", .task = isa->norm, .cost = k,
        .norm = {
            .m = INT(7), .x = ADDRESS(0), .residual = ADDRESS(1), .weight = ADDRESS(2), .eps = FLOAT(3), .y = ADDRESS(4),
            .q = ADDRESS(5), .scale = ADDRESS(6), .k = k,
        },
    };
    if (call.norm.q && !(call.scratch = call.norm.scratch = scratch(team(INT(9)) * k * (int64_t)sizeof(float))))
        return PyErr_NoMemory();
    return run(&call, INT(9));
}

/* x, y, q, scale, m, k, threads */
FUNCTION(py_swiglu, 7)
    int64_t k = INT(5);
    struct call call = {
        .name = "swiglu", .task = isa->swiglu, .cost = 4 * k, /* exp and a division: dearer than the others */
        .swiglu = {.m = INT(4), .x = ADDRESS(0), .y = ADDRESS(1), .q = ADDRESS(2), .scale = ADDRESS(3), .k = k},
    };
    if (call.swiglu.q && !(call.scratch = call.swiglu.scratch = scratch(team(INT(6)) * k * (int64_t)sizeof(float))))
        return PyErr_NoMemory();
    return run(&call, INT(6));
}

/* Appends a segment to the table: (address of a struct slot, length, rows, parents or None, rows that are kept) */
static int add_segment(struct segments *t, PyObject *from)
{
    int64_t words[4];
    for (int i = 0; i < 4; i++) {
        PyObject *word = PyTuple_GetItem(from, i < 3 ? i : 4);
        words[i] = word ? PyLong_AsLongLong(word) : -1;
        if (PyErr_Occurred())
            return 0;
    }
    struct segment *s = t->segment + t->count;
    s->slot = *(const struct slot *)(uintptr_t)words[0];
    s->length = words[1];
    s->rows = words[2];
    s->kept = words[3];
    int64_t free = s->slot.capacity - s->length;
    if (s->rows < 1 || s->length < 0 || s->rows > free) {
        PyErr_Format(PyExc_ValueError, "%lld tokens do not fit the KV cache: %lld positions are free",
                     (long long)s->rows, (long long)free);
        return 0;
    }
    if (s->kept < 0 || s->kept > s->rows) {
        PyErr_Format(PyExc_ValueError, "%lld of %lld rows cannot be kept", (long long)s->kept, (long long)s->rows);
        return 0;
    }
    if (s->rows > t->room - t->rows) {
        PyErr_Format(PyExc_ValueError, "the batch has more than %lld rows", (long long)t->room);
        return 0;
    }
    PyObject *given = PyTuple_GetItem(from, 3), *parents = given && given != Py_None ? PySequence_List(given) : NULL;
    if (parents && PyList_Size(parents) != s->rows)
        PyErr_Format(PyExc_ValueError, "%lld rows have %zd parents", (long long)s->rows, PyList_Size(parents));
    for (int64_t i = 0; i < s->rows && !PyErr_Occurred(); i++) {
        int64_t parent = parents ? PyLong_AsLongLong(PyList_GetItem(parents, i)) : i - 1;
        t->row[t->rows + i].parent = parent < -1 || parent >= i ? INT32_MAX : (int32_t)parent; /* refused at the end */
    }
    Py_XDECREF(parents);
    t->count++;
    t->rows += s->rows;
    return !PyErr_Occurred();
}

/* rows: bytes of a table for so many */
FUNCTION(py_segments_bytes, 1)
    int64_t each = (int64_t)(sizeof(struct segment) + sizeof(struct row));
    return PyLong_FromLongLong((int64_t)sizeof(struct segments) + INT(0) * each);
}

/* table, rows that it has room for, [segment]: fills it */
static PyObject *py_fill_segments(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)
{
    union word w[2];
    if (n_objects != 3 || !PyList_Check(objects[2]))
        return PyErr_Format(PyExc_TypeError, "expected a table, its room and a list of segments");
    if (!parse(objects, 2, 2, w))
        return NULL;
    struct segments *t = ADDRESS(0);
    *t = (struct segments){.room = INT(1), .segment = (struct segment *)(t + 1)};
    t->row = (struct row *)(t->segment + t->room);
    for (Py_ssize_t i = 0; i < PyList_Size(objects[2]) && !PyErr_Occurred(); i++)
        add_segment(t, PyList_GetItem(objects[2], i));
    const char *wrong = PyErr_Occurred() ? NULL : segments_finish(t);
    if (wrong)
        PyErr_Format(PyExc_ValueError, "%s", wrong);
    if (!PyErr_Occurred())
        Py_RETURN_NONE;
    t->rows = t->kept = t->count = 0;
    return NULL;
}

/* slot, length, rows of the last pass, ascending: moves them to positions length, length + 1, ... */
static PyObject *py_slot_keep(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)
{
    union word w[2];
    if (n_objects != 3 || !PyList_Check(objects[2]))
        return PyErr_Format(PyExc_TypeError, "expected a slot, its length and a list of rows");
    if (!parse(objects, 2, 2, w))
        return NULL;
    const struct slot *slot = ADDRESS(0);
    int64_t free = slot->capacity - INT(1), last = -1;
    for (int check = 1; check >= 0; check--)
        for (Py_ssize_t i = 0; i < PyList_Size(objects[2]); i++) {
            int64_t row = PyLong_AsLongLong(PyList_GetItem(objects[2], i));
            if (PyErr_Occurred())
                return NULL;
            if (check && (row <= (i ? last : -1) || row >= free))
                return PyErr_Format(PyExc_ValueError, "row %lld cannot be kept: rows ascend, and %lld positions are free",
                                    (long long)row, (long long)free);
            if (!check && row != i)
                slot_move(slot, INT(1) + row, INT(1) + i);
            last = row;
        }
    Py_RETURN_NONE;
}

/* memory, bytes */
FUNCTION(py_use_huge_pages, 2)
    use_huge_pages(ADDRESS(0), (size_t)INT(1));
    Py_RETURN_NONE;
}

/* from, to, positions */
FUNCTION(py_slot_copy, 3)
    const struct slot *from = ADDRESS(0), *to = ADDRESS(1);
    if (from->layers != to->layers || from->kv_heads != to->kv_heads || from->dim != to->dim ||
        from->format != to->format || INT(2) < 0 || INT(2) > from->capacity || INT(2) > to->capacity)
        return PyErr_Format(PyExc_ValueError, "%lld positions cannot be copied", (long long)INT(2));
    Py_BEGIN_ALLOW_THREADS
    slot_copy(from, to, INT(2));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* qkv, q_weight, k_weight, eps, cos, sin, q, segments, layer, m, heads, kv_heads, dim, positions, table_stride, threads */
FUNCTION(py_rope_qk_append, 16)
    int64_t heads = INT(10), kv_heads = INT(11), dim = INT(12);
    struct call call = {
        .name = "rope_qk_append", .task = isa->rope, .moving = ROPE, .cost = (heads + 2 * kv_heads) * dim,
        .rope = {
            .m = INT(9), .qkv = ADDRESS(0), .q_weight = ADDRESS(1), .k_weight = ADDRESS(2), .eps = FLOAT(3),
            .cos = ADDRESS(4), .sin = ADDRESS(5), .q = ADDRESS(6), .segments = ADDRESS(7), .layer = INT(8),
            .heads = heads, .kv_heads = kv_heads, .dim = dim, .positions = INT(13), .table_stride = INT(14),
        },
    };
    const char *wrong = recorder ? NULL : rope_check(&call.rope);
    if (wrong)
        return PyErr_Format(PyExc_IndexError, "%s", wrong);
    return run(&call, INT(15));
}

/* q, segments, layer, out, scale, m, heads, kv_heads, dim, threads */
FUNCTION(py_attention, 10)
    int64_t heads = INT(6), group = heads / INT(7), bytes = 0;
    struct call call = {
        .name = "attention", .task = isa->attention, .moving = ATTENTION,
        .attention = {
            .m = INT(5), .q = ADDRESS(0), .segments = ADDRESS(1), .out = ADDRESS(3), .scale = FLOAT(4), .heads = heads,
            .kv_heads = INT(7), .dim = INT(8), .layer = INT(2),
            .tokens_per_item = group < ATTENTION_ROWS ? ATTENTION_ROWS / group : 1,
        },
    };
    const char *wrong = recorder ? NULL : attention_check(&call.attention);
    if (wrong)
        return PyErr_Format(PyExc_IndexError, "%s", wrong);
    if (!recorder && !attention_prepare(&call, team(INT(9)), &call.scratch, &bytes))
        return PyErr_NoMemory();
    return run(&call, INT(9));
}

/* x, segments, out, m, k, threads */
FUNCTION(py_keep_rows, 6)
    struct call call = {
        .name = "keep_rows", .task = keep_rows, .moving = KEEP, .cost = INT(4),
        .keep = {.m = INT(3), .x = ADDRESS(0), .segments = ADDRESS(1), .out = ADDRESS(2), .k = INT(4)},
    };
    const char *wrong = recorder ? NULL : keep_check(&call.keep);
    if (wrong)
        return PyErr_Format(PyExc_IndexError, "%s", wrong);
    return run(&call, INT(5));
}

/* x, out, m, n, threads */
FUNCTION(py_argmax, 5)
    struct call call = {
        .name = "argmax", .task = isa->argmax, .cost = INT(3),
        .argmax = {.m = INT(2), .x = ADDRESS(0), .out = ADDRESS(1), .n = INT(3)},
    };
    return run(&call, INT(4));
}

FUNCTION(py_top_k, 6)
    struct call call = {
        .name = "top_k", .task = isa->top_k, .cost = INT(4),
        .top_k = {.m = INT(2), .x = ADDRESS(0), .out = ADDRESS(1), .n = INT(3), .k = INT(4)},
    };
    return run(&call, INT(5));
}

/* address, lines of 64 bytes, threads; returns all 32-bit words, xor */
FUNCTION(py_read, 3)
    struct read_args a = {.data = ADDRESS(0), .lines = INT(1)};
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->read, &a, (int)INT(2));
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(a.result);
}

/* bits (4, 8, 16, 32), weight, packed, n, k */
FUNCTION(py_pack, 5)
    Py_BEGIN_ALLOW_THREADS
    switch (INT(0)) {
    case 4: pack_int4(&isa->layout, ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    case 8: pack_int8(&isa->layout, ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    case 16: pack_bf16(&isa->layout, ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    case 32: pack_f32(&isa->layout, ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* scale, packed, n, groups */
FUNCTION(py_pack_scales, 4)
    pack_scales(ADDRESS(0), ADDRESS(1), INT(2), INT(3));
    Py_RETURN_NONE;
}

/* x, y, n */
FUNCTION(py_exp, 3)
    isa->exp(ADDRESS(0), ADDRESS(1), INT(2));
    Py_RETURN_NONE;
}

static void nothing(void *args, int thread, int threads) { (void)args, (void)thread, (void)threads; }

/* threads: an empty parallel region, to measure what starting the team costs */
FUNCTION(py_fork_join, 1)
    parallel_run(nothing, NULL, (int)INT(0));
    Py_RETURN_NONE;
}

static const char *const CAPSULE = "quasar.recording";

static void free_recording(PyObject *capsule)
{
    recording_free(PyCapsule_GetPointer(capsule, CAPSULE));
}

/* rows of the pass: from here on this thread's kernel calls are recorded instead of run. */
FUNCTION(py_record, 1)
    if (recorder)
        return PyErr_Format(PyExc_RuntimeError, "this thread is recording already");
    if (!(recorder = recording_new(INT(0))))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Ends the recording and returns it. */
static PyObject *py_recorded(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
    struct recording *recording = recorder;
    if (!recording)
        return PyErr_Format(PyExc_RuntimeError, "nothing is being recorded");
    recorder = NULL;
    PyObject *capsule = PyCapsule_New(recording, CAPSULE, free_recording);
    if (!capsule)
        recording_free(recording);
    return capsule;
}

/* Names of the calls of a recording, in order. */
static PyObject *py_calls(PyObject *Py_UNUSED(self), PyObject *capsule)
{
    const struct call *calls;
    struct recording *recording = PyCapsule_GetPointer(capsule, CAPSULE);
    int64_t count = recording ? recording_calls(recording, &calls) : 0;
    PyObject *names = recording ? PyList_New(0) : NULL;
    for (int64_t i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(calls[i].name);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* recording, n, addresses of [n] results and their bytes, what the pass returns last */
static PyObject *py_share(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)
{
    union word w[2];
    struct recording *recording = n_objects ? PyCapsule_GetPointer(objects[0], CAPSULE) : NULL;
    if (!recording || !parse(objects + 1, n_objects - 1, 2, w))
        return NULL;
    const char *wrong = recording_share(recording, INT(0), ADDRESS(1));
    if (wrong)
        return PyErr_Format(PyExc_NotImplementedError, "%s", wrong);
    Py_RETURN_NONE;
}

/* recording, rows, kept rows: bytes of memory that a replay needs, and where in it the pass's result will be */
static PyObject *py_replay_bytes(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)
{
    union word w[2];
    struct recording *recording = n_objects ? PyCapsule_GetPointer(objects[0], CAPSULE) : NULL;
    if (!recording || !parse(objects + 1, n_objects - 1, 2, w))
        return NULL;
    int64_t result, bytes = recording_bytes(recording, INT(0), INT(1), &result);
    return Py_BuildValue("LL", (long long)bytes, (long long)result);
}

/* recording, threads, rows, kept rows, memory, nanoseconds */
static PyObject *py_replay(PyObject *Py_UNUSED(self), PyObject *const *objects, Py_ssize_t n_objects)
{
    union word w[5];
    struct recording *recording = n_objects ? PyCapsule_GetPointer(objects[0], CAPSULE) : NULL;
    if (!recording || !parse(objects + 1, n_objects - 1, 5, w))
        return NULL;
    const char *wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = recording_replay(recording, (int)team(INT(0)), INT(1), INT(2), ADDRESS(3), ADDRESS(4));
    Py_END_ALLOW_THREADS
    if (wrong)
        return PyErr_Format(PyExc_IndexError, "%s", wrong);
    Py_RETURN_NONE;
}

/* The library whose OpenMP runtime is to be shared; returns whether one was found. */
static PyObject *py_use_openmp(PyObject *Py_UNUSED(self), PyObject *path)
{
    PyObject *bytes = PyUnicode_EncodeFSDefault(path);
    if (!bytes)
        return NULL;
    int found = parallel_use(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    return PyBool_FromLong(found);
}

/* Names of the instruction sets, fastest first: those that this processor has, or all that were compiled. */
static PyObject *names_of_sets(int all)
{
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < COUNT; i++)
        if (all || supported(all_kernels[i])) {
            PyObject *name = PyUnicode_FromString(all_kernels[i]->name);
            if (!name || PyList_Append(names, name) < 0)
                Py_CLEAR(names);
            Py_XDECREF(name);
        }
    return names;
}

static PyObject *py_supported(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
    return names_of_sets(0);
}

static PyObject *py_compiled(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
    return names_of_sets(1);
}

static PyObject *py_select(PyObject *Py_UNUSED(self), PyObject *name)
{
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes)
        return NULL;
    for (size_t i = 0; i < COUNT; i++)
        if (supported(all_kernels[i]) && !strcmp(all_kernels[i]->name, PyBytes_AsString(bytes))) {
            isa = all_kernels[i];
            Py_DECREF(bytes);
            Py_RETURN_NONE;
        }
    Py_DECREF(bytes);
    return PyErr_Format(PyExc_ValueError, "this processor cannot run the kernels for %R", name);
}

static PyObject *py_takes_int16(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
    return PyBool_FromLong(isa->takes_int16);
}

/* Counts the changes of what these functions take and do; kernels.py says for which number it is written. */
#define INTERFACE 4

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST("int8_linear", py_int8_linear),
    FAST("float_linear", py_float_linear),
    FAST("int4_linear", py_int4_linear),
    FAST("int4_inputs", py_int4_inputs),
    FAST("hadamard", py_hadamard),
    FAST("pack_scales", py_pack_scales),
    FAST("embed", py_embed),
    FAST("round_bf16", py_round_bf16),
    FAST("quantize", py_quantize),
    FAST("digits", py_digits),
    FAST("add_rms_norm", py_add_rms_norm),
    FAST("swiglu", py_swiglu),
    FAST("rope_qk_append", py_rope_qk_append),
    FAST("attention", py_attention),
    FAST("keep_rows", py_keep_rows),
    FAST("segments_bytes", py_segments_bytes),
    FAST("fill_segments", py_fill_segments),
    FAST("slot_keep", py_slot_keep),
    FAST("slot_copy", py_slot_copy),
    FAST("use_huge_pages", py_use_huge_pages),
    FAST("argmax", py_argmax),
    FAST("top_k", py_top_k),
    FAST("read", py_read),
    FAST("pack", py_pack),
    FAST("exp", py_exp),
    FAST("fork_join", py_fork_join),
    FAST("replay", py_replay),
    FAST("share", py_share),
    FAST("replay_bytes", py_replay_bytes),
    {"calls", py_calls, METH_O, NULL},
    FAST("record", py_record),
    {"recorded", py_recorded, METH_NOARGS, NULL},
    {"use_openmp", py_use_openmp, METH_O, NULL},
    {"supported", py_supported, METH_NOARGS, NULL},
    {"compiled", py_compiled, METH_NOARGS, NULL},
    {"select", py_select, METH_O, NULL},
    {"takes_int16", py_takes_int16, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
