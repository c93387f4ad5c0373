/* Compiled twice by count_instructions.py: with PLUGIN for this machine, what counts the instructions that qemu runs; and
 * without for aarch64, what calls one product so many times. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef PLUGIN
/* Of qemu's interface for plugins (version 1), what is needed here. */
struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*)(uint64_t id, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int add, void *counter, uint64_t by);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*)(uint64_t id, void *), void *);

int qemu_plugin_version = 1;
static uint64_t instructions;

static void translated(uint64_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &instructions, qemu_plugin_tb_n_insns(block));
}

static void ended(uint64_t id, void *data)
{
    (void)id, (void)data;
    fprintf(stderr, "%llu\n", (unsigned long long)instructions);
}

int qemu_plugin_install(uint64_t id, const void *info, int count, char **arguments)
{
    (void)info, (void)count, (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
#else
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

/* Arguments: set, product, rows, outputs, inputs, group, calls. Operands are zeros: they change no count. */
int main(int count, char **arguments)
{
    if (count != 8)
        return 2;
    const struct kernels *const set = !strcmp(arguments[1], "i8mm") ? &kernels_i8mm : &kernels_dotprod;
    const char *const product = arguments[2];
    const int64_t m = atoi(arguments[3]), n = atoi(arguments[4]), k = atoi(arguments[5]), group = atoi(arguments[6]);
    float *x = calloc((size_t)(m * k), sizeof *x), *out = calloc((size_t)(m * n), sizeof *out);
    float *scale = calloc((size_t)(m * k + n), sizeof *scale), *weight = calloc((size_t)(n * k), sizeof *weight);
    int32_t *sums = calloc((size_t)(m * k), sizeof *sums);
    struct int8_linear_args int8 = {
        .m = m, .x = x, .x_scale = scale, .weight = (uint8_t *)weight, .w_scale = scale, .out = out, .n = n, .k4 = k / 4,
    };
    struct float_linear_args full = {.m = m, .x = x, .weight = weight, .out = out, .n = n, .k = k};
    struct int4_linear_args int4 = {
        .m = m, .x = (int8_t *)x, .x_scale = scale, .sums = sums, .weight = (uint8_t *)weight,
        .w_scale = (uint16_t *)weight, .out = out, .n = n, .k = k, .group = group, .digits = 1,
    };
    task_fn task = set->bf16_linear;
    void *args = &full;
    if (!strcmp(product, "w8a8")) {
        task = set->int8_linear;
        args = &int8;
    } else if (strcmp(product, "full")) {
        int4.digits = strcmp(product, "w4a16") ? 1 : 2;
        task = set->int4_linear;
        args = &int4;
    }
    for (int calls = atoi(arguments[7]); calls > 0; calls--)
        task(args, 0, 1);
    return 0;
}
#endif
