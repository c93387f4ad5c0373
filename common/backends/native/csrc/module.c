/* The Python module `_kernels`: tensors come as addresses (`data_ptr()`), sizes as integers; nothing is checked here,
 * the Python side does. Chooses the instruction set, brings scratch memory, and releases the GIL. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const struct kernels *isa = &kernels_plain;

static int supported(const struct kernels *k)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (k == &kernels_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    if (k == &kernels_avxvnni)
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    if (k == &kernels_avx2)
        return avx2;
#endif
    return k == &kernels_plain;
}

static const struct kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avxvnni, &kernels_avx2,
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

/* Threads for `items` independent pieces of `cost` elements each: starting the team costs a microsecond, in which
 * one core does some 16 thousand elements of the row-wise kernels. */
static int team(int64_t items, int64_t cost, int64_t threads)
{
    if (items * cost < 16384)
        return 1;
    threads = threads < items ? threads : items;
    return (int)(threads < MAX_THREADS ? threads : MAX_THREADS);
}

static void *scratch(int64_t bytes)
{
    return aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
}

/* x, x_scale, weight, w_scale, bias, out, accumulators, m, n, k, threads */
FUNCTION(py_int8_linear, 11)
    int64_t m = INT(7), n = INT(8), k = INT(9), k4 = (k + 3) / 4;
    const int8_t *x = ADDRESS(0);
    int32_t *sums = scratch(m * (int64_t)sizeof *sums);
    int8_t *padded = k % 4 ? scratch(m * k4 * 4) : NULL;
    if (!sums || (k % 4 && !padded)) {
        free(sums);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    for (int64_t row = 0; row < m; row++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++)
            sum += x[row * k + i];
        sums[row] = sum;
        if (padded) {
            memset(padded + (row + 1) * k4 * 4 - 4, 0, 4);
            memcpy(padded + row * k4 * 4, x + row * k, (size_t)k);
        }
    }
    struct int8_linear_args a = {
        .x = padded ? padded : x, .x_scale = ADDRESS(1), .x_sum = sums, .weight = ADDRESS(2), .w_scale = ADDRESS(3),
        .bias = ADDRESS(4), .out = ADDRESS(5), .accumulators = ADDRESS(6), .m = m, .n = n, .k4 = k4,
    };
    parallel_run(isa->int8_linear, &a, team((n + BLOCK - 1) / BLOCK, k * BLOCK, INT(10)));
    Py_END_ALLOW_THREADS
    free(sums);
    free(padded);
    Py_RETURN_NONE;
}

/* bf16?, x, weight, bias, out, m, n, k, threads */
FUNCTION(py_float_linear, 9)
    struct float_linear_args a = {
        .x = ADDRESS(1), .weight = ADDRESS(2), .bias = ADDRESS(3), .out = ADDRESS(4),
        .m = INT(5), .n = INT(6), .k = INT(7),
    };
    Py_BEGIN_ALLOW_THREADS
    parallel_run(INT(0) ? isa->bf16_linear : isa->f32_linear, &a,
                 team((a.n + BLOCK - 1) / BLOCK, a.k * BLOCK, INT(8)));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* x, q, scale, m, k, threads */
FUNCTION(py_quantize, 6)
    struct quantize_args a = {.x = ADDRESS(0), .q = ADDRESS(1), .scale = ADDRESS(2), .m = INT(3), .k = INT(4)};
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->quantize, &a, team(a.m, a.k, INT(5)));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* x, residual, weight, eps, y, q, scale, m, k, threads */
FUNCTION(py_add_rms_norm, 10)
    struct norm_args a = {
        .x = ADDRESS(0), .residual = ADDRESS(1), .weight = ADDRESS(2), .eps = FLOAT(3), .y = ADDRESS(4),
        .q = ADDRESS(5), .scale = ADDRESS(6), .m = INT(7), .k = INT(8),
    };
    int threads = team(a.m, a.k, INT(9));
    if (a.q && !(a.scratch = scratch(threads * a.k * 4)))
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->norm, &a, threads);
    Py_END_ALLOW_THREADS
    free(a.scratch);
    Py_RETURN_NONE;
}

/* x, y, q, scale, m, k, threads */
FUNCTION(py_swiglu, 7)
    struct swiglu_args a = {
        .x = ADDRESS(0), .y = ADDRESS(1), .q = ADDRESS(2), .scale = ADDRESS(3), .m = INT(4), .k = INT(5),
    };
    int threads = team(a.m, 4 * a.k, INT(6)); /* exp and a division: dearer than the others */
    if (a.q && !(a.scratch = scratch(threads * a.k * 4)))
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->swiglu, &a, threads);
    Py_END_ALLOW_THREADS
    free(a.scratch);
    Py_RETURN_NONE;
}

/* qkv, q_weight, k_weight, eps, cos, sin, q, k_cache, v_cache,
 * m, heads, kv_heads, dim, table_stride, start, capacity, threads */
FUNCTION(py_rope_qk_append, 17)
    struct rope_args a = {
        .qkv = ADDRESS(0), .q_weight = ADDRESS(1), .k_weight = ADDRESS(2), .eps = FLOAT(3), .cos = ADDRESS(4),
        .sin = ADDRESS(5), .q = ADDRESS(6), .k_cache = ADDRESS(7), .v_cache = ADDRESS(8), .m = INT(9),
        .heads = INT(10), .kv_heads = INT(11), .dim = INT(12), .table_stride = INT(13), .start = INT(14),
        .capacity = INT(15),
    };
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->rope, &a, team(a.m, (a.heads + 2 * a.kv_heads) * a.dim, INT(16)));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* q, k_cache, v_cache, out, scale, m, heads, kv_heads, dim, start, capacity, threads */
FUNCTION(py_attention, 12)
    struct attention_args a = {
        .q = ADDRESS(0), .k_cache = ADDRESS(1), .v_cache = ADDRESS(2), .out = ADDRESS(3), .scale = FLOAT(4),
        .m = INT(5), .heads = INT(6), .kv_heads = INT(7), .dim = INT(8), .start = INT(9), .capacity = INT(10),
    };
    int64_t group = a.heads / a.kv_heads;
    a.tokens_per_item = group < ATTENTION_ROWS ? ATTENTION_ROWS / group : 1;
    if (a.tokens_per_item > a.m)
        a.tokens_per_item = a.m;
    a.scratch_bytes = attention_scratch_bytes(a.tokens_per_item * group, a.dim);
    int64_t items = (a.m + a.tokens_per_item - 1) / a.tokens_per_item * a.kv_heads;
    int threads = team(items, (a.start + a.m) * a.dim, INT(11));
    if (!(a.scratch = scratch(threads * a.scratch_bytes)))
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->attention, &a, threads);
    Py_END_ALLOW_THREADS
    free(a.scratch);
    Py_RETURN_NONE;
}

/* x, out, m, n, threads */
FUNCTION(py_argmax, 5)
    struct argmax_args a = {.x = ADDRESS(0), .out = ADDRESS(1), .m = INT(2), .n = INT(3)};
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->argmax, &a, team(a.m, a.n, INT(4)));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* address, lines of 64 bytes, threads; returns all 32-bit words, xor */
FUNCTION(py_read, 3)
    struct read_args a = {.data = ADDRESS(0), .lines = INT(1)};
    Py_BEGIN_ALLOW_THREADS
    parallel_run(isa->read, &a, (int)INT(2));
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(a.result);
}

/* bits (8, 16, 32), weight, packed, n, k */
FUNCTION(py_pack, 5)
    Py_BEGIN_ALLOW_THREADS
    switch (INT(0)) {
    case 8: pack_int8(ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    case 16: pack_bf16(ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    case 32: pack_f32(ADDRESS(1), ADDRESS(2), INT(3), INT(4)); break;
    }
    Py_END_ALLOW_THREADS
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

/* Names of the instruction sets this processor has, fastest first. */
static PyObject *py_supported(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(unused))
{
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < COUNT; i++)
        if (supported(all_kernels[i])) {
            PyObject *name = PyUnicode_FromString(all_kernels[i]->name);
            if (!name || PyList_Append(names, name) < 0)
                Py_CLEAR(names);
            Py_XDECREF(name);
        }
    return names;
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

#define FAST(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST("int8_linear", py_int8_linear),
    FAST("float_linear", py_float_linear),
    FAST("quantize", py_quantize),
    FAST("add_rms_norm", py_add_rms_norm),
    FAST("swiglu", py_swiglu),
    FAST("rope_qk_append", py_rope_qk_append),
    FAST("attention", py_attention),
    FAST("argmax", py_argmax),
    FAST("read", py_read),
    FAST("pack", py_pack),
    FAST("exp", py_exp),
    FAST("fork_join", py_fork_join),
    {"use_openmp", py_use_openmp, METH_O, NULL},
    {"supported", py_supported, METH_NOARGS, NULL},
    {"select", py_select, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModule_Create(&module);
}
