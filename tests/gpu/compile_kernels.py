"""Compiles every kernel as a pass of Qwen3-8B launches it, for a card that need not be there; prints what came out.

python compile_kernels.py 90: one JSON line for each kernel. In a process of its own: the tests' own process has the
interpreter. The functions are called as ever, on tensors without memory; only the launch itself is left out.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quasar_gpu.kernels import attention, int4, linear, rows
from quasar_gpu.kernels.launch import use_dependent_launch

WINDOW, HIDDEN, INTER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 6, 4096, 12288, 151936, 32, 8, 128
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoCard:
    """What a launch asks of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    driver.set_active(NoCard(capability))
    use_dependent_launch(capability >= 90)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.fn.__name__, "grid": grid, **found(kernel)}), flush=True)

    JITFunction.run = compile_only
    matmuls(torch.bfloat16)
    int4_matmuls(torch.bfloat16)
    window_attention(torch.bfloat16)
    if capability == 90:  # the rest is much the same everywhere
        rows_and_rope(torch.bfloat16)
        for everything in (matmuls, int4_matmuls, window_attention, rows_and_rope):
            everything(torch.float32)


def found(kernel) -> dict:
    """Shared memory in bytes, registers, bytes spilled, and the instructions that matter."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "shared": kernel.metadata.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "tensor_core": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.]*|tcgen05\.mma[\w.:]*", ptx))),
        "copies": sorted(set(re.findall(r"cp\.async\.c[ag]\.shared.*?(0x\w+)", ptx))),
        "loads": sorted(set(re.findall(r"ld\.global[\w.:]*", ptx))),
        "dependent": "griddepcontrol.wait" in ptx and "griddepcontrol.launch_dependents" in ptx,
        "prefetches": "prefetch.global.L2" in ptx,
    }


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def matmuls(dtype: torch.dtype) -> None:
    """One for each cut: gate_up and lm_head, down, k and v of a small model; float32 has a single one."""
    for outputs, inner in ((2 * INTER, HIDDEN), (HIDDEN, INTER), (1024, HIDDEN)):
        x, weight, out = (
            empty(*shape, dtype=dtype) for shape in ((WINDOW, inner), (outputs, inner), (WINDOW, outputs))
        )
        linear.float_linear(x, weight, None, out)
        if dtype == torch.float32:
            return
        x, weight = x.to(torch.int8), weight.to(torch.int8)
        scale, weight_scale = (empty(size, dtype=torch.float32) for size in (WINDOW, outputs))
        linear.int8_linear(x, scale, weight, weight_scale, None, out)


def int4_matmuls(dtype: torch.dtype) -> None:
    """Every cut at W4A16 and W4A4, a prompt's among them, and down's rotation."""
    for tokens, outputs, inner in (
        (WINDOW, 2 * INTER, HIDDEN),
        (WINDOW, HIDDEN, INTER),
        (WINDOW, 1024, HIDDEN),
        (512, HIDDEN, INTER),
    ):
        x, out = empty(tokens, inner, dtype=dtype), empty(tokens, outputs, dtype=dtype)
        values, scale = empty(outputs, inner // 2, dtype=torch.int8), empty(outputs, inner // 128, dtype=torch.bfloat16)
        weight = int4.Int4Weight(values, scale, 128)
        int4.int4_linear(x, None, weight, None, out)
        if dtype == torch.float32:  # a single cut
            return
        int4.int4_linear(x.to(torch.int8), empty(tokens, dtype=torch.float32), weight, None, out)
    x = empty(WINDOW, INTER, dtype=dtype)
    int4.rotate(x, empty(128, 128, dtype=dtype), x)


def rows_and_rope(dtype: torch.dtype) -> None:
    x, weight, table = (empty(*shape, dtype=dtype) for shape in ((WINDOW, HIDDEN), (HIDDEN,), (VOCAB, HIDDEN)))
    gate_up, long = empty(WINDOW, 2 * INTER, dtype=dtype), empty(WINDOW, INTER, dtype=torch.int8)
    values, scale = empty(WINDOW, HIDDEN, dtype=torch.int8), empty(WINDOW, dtype=torch.float32)
    rows.embed(table, empty(WINDOW, dtype=torch.int64), x)
    rows.add_rms_norm(x, x, weight, 1e-6, x, x)
    rows.add_rms_norm_quantize(x, x, weight, 1e-6, x, values, scale)
    rows.swiglu_quantize(gate_up, long, scale)
    qkv = empty(WINDOW, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    q, norm = empty(WINDOW, HEADS, HEAD_DIM, dtype=dtype), empty(HEAD_DIM, dtype=dtype)
    cache, start = empty(KV_HEADS, 4096, HEAD_DIM, dtype=dtype), empty(1, dtype=torch.int64)
    angles = empty(4096, HEAD_DIM // 2, dtype=torch.float32)
    attention.append_rotated(qkv, start, angles, angles, norm, norm, 1e-6, cache, cache, q)


def window_attention(dtype: torch.dtype) -> None:
    """Combined and quantised in one kernel, and in two."""
    q, out = empty(WINDOW, HEADS, HEAD_DIM, dtype=dtype), empty(WINDOW, HIDDEN, dtype=dtype)
    values, scale = empty(WINDOW, HIDDEN, dtype=torch.int8), empty(WINDOW, dtype=torch.float32)
    cache, start = empty(KV_HEADS, 4096, HEAD_DIM, dtype=dtype), empty(1, dtype=torch.int64)
    for reach in (2048, 4096):
        partials = empty(*attention.attention_partials_shape(WINDOW, HEADS, HEAD_DIM, reach), dtype=torch.float32)
        attention.window_attention_quantize(q, cache, cache, start, 0.1, out, partials, reach, values, scale)


if __name__ == "__main__":
    main(int(sys.argv[1]))
