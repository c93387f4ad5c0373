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

import quasar  # noqa: F401  uninstalled
from quasar.backends.base import AttentionSpec
from quasar_gpu.batches import Shape, size_of, views
from quasar_gpu.kernels import attention, int4, linear, rows
from quasar_gpu.kernels.launch import MOST_ROWS, Launching, launching_as

WINDOW, HIDDEN, INTER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 6, 4096, 12288, 151936, 32, 8, 128
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
META = torch.device("meta")

_WAIT, _START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
_TENSOR_CORE = r"(?:wgmma\.mma_async|mma)\.sync[\w.]*|tcgen05\.mma[\w.:]*"
_ACCESS = r"(?:ld|st|atom|red)(?:\.\w+)*\.global|cp\.async\.c[ag]"  # of what other kernels may write
_SASS_ACCESS = r"\b(?:LDG|STG|LDGSTS|ATOMG|REDG|RED)\b"


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
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tiles = options.get("TILES") or options.get("COLUMNS", 16) // 16
        about = {"kernel": self.fn.__name__, "grid": grid, "tiles": tiles, "digits": options.get("DIGITS", 1)}
        about |= {"group": options.get("GROUP", 0)}
        print(json.dumps(about | found(kernel)), flush=True)

    JITFunction.run = compile_only
    with launching_as(META, Launching(dependent=capability >= 90)):
        matmuls(torch.bfloat16, (1, 4) if capability == 90 else (1,))
        int4_matmuls(torch.bfloat16, everything=capability == 90)
        attend(torch.bfloat16)
        if capability == 90:  # the rest is much the same everywhere
            between(torch.bfloat16)
            for kernels in (matmuls, int4_matmuls, attend, between):
                kernels(torch.float32)
    if capability == 90:
        with launching_as(META, Launching(dependent=True, late=False, prefetch_kb=0)):
            matmuls(torch.bfloat16, wide=False)


def found(kernel) -> dict:
    """Shared memory in bytes, registers, bytes spilled, and the instructions that matter, in their order."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    products, accesses = places(_TENSOR_CORE, ptx), places(_ACCESS, ptx)
    wait, start = ptx.find(_WAIT), ptx.find(_START)
    waits, sass_accesses = places(r"\bACQBULK\b", sass), places(_SASS_ACCESS, sass)
    return {
        "shared": kernel.metadata.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "tensor_core": sorted(set(re.findall(_TENSOR_CORE, ptx))),
        "copies": sorted(set(re.findall(r"cp\.async\.c[ag]\.shared.*?(0x\w+)", ptx))),
        "loads": sorted(set(re.findall(r"ld\.global[\w.:]*", ptx))),
        "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.(?:\w+\.)*global[\w.:]*", ptx))),
        "dependent": wait >= 0 and start >= 0,
        "waits_first": 0 <= wait < min(accesses),
        "sass_waits_first": bool(waits and waits[0] < min(sass_accesses)),
        "starts_next": "never" if start < 0 else "late" if products and start > max(products) else "early",
        "prefetches": "cp.async.bulk.prefetch.L2" in ptx,
    }


def places(pattern: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(pattern, text)]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def matmuls(dtype: torch.dtype, tiles: tuple[int, ...] = (1,), wide: bool = True) -> None:
    """down, gate_up with SwiGLU at its end, lm_head with the largest logit; float32 has a single cut."""
    for count in tiles:
        tokens = WINDOW if count == 1 else 16 * count
        for outputs, inner in ((HIDDEN, INTER), (2 * INTER, HIDDEN), (VOCAB, HIDDEN)):
            x, weight, out = (
                empty(*shape, dtype=dtype) for shape in ((tokens, inner), (outputs, inner), (tokens, outputs))
            )
            epilogue = None
            if outputs == 2 * INTER:
                epilogue = linear.SwiGLU(empty(MOST_ROWS, dtype=torch.int32))
            elif outputs == VOCAB:
                epilogue, out = linear.Best(empty(MOST_ROWS, dtype=torch.int64)), out.float()
            linear.float_linear(x, weight, None, out, epilogue=epilogue)
            if dtype == torch.float32:
                continue
            x, weight = x.to(torch.int8), weight.to(torch.int8)
            scale, weight_scale = (empty(size, dtype=torch.float32) for size in (tokens, outputs))
            linear.int8_linear(x, scale, weight, weight_scale, None, out, epilogue=epilogue)
            if wide:
                digits = empty(2 * tokens, inner, dtype=torch.int8)
                linear.int8_linear(digits, scale, weight, weight_scale, None, out, epilogue=epilogue)


def int4_matmuls(dtype: torch.dtype, everything: bool = False) -> None:
    """Every cut at W4A16 and W4A4, a prompt's among them, in small groups with zero points; in `everything` in other
    groups too; and down's rotation."""
    for tokens, outputs, inner in (
        (WINDOW, 2 * INTER, HIDDEN),
        (WINDOW, HIDDEN, INTER),
        (WINDOW, 1024, HIDDEN),
        (512, HIDDEN, INTER),
    ):
        x, out = empty(tokens, inner, dtype=dtype), empty(tokens, outputs, dtype=dtype)
        values = empty(outputs, inner // 2, dtype=torch.int8)
        epilogue = linear.SwiGLU(empty(MOST_ROWS, dtype=torch.int32)) if outputs == 2 * INTER else None
        for group, with_offset in ((32, True), (128, False)) if everything else ((32, True),):
            scale = empty(outputs, inner // group, dtype=torch.bfloat16)
            weight = int4.Int4Weight(values, scale, group, scale if with_offset else None)
            int4.int4_linear(x, None, weight, None, out, epilogue)
            if dtype != torch.float32:
                int4.int4_linear(x.to(torch.int8), empty(tokens, dtype=torch.float32), weight, None, out, epilogue)
        if dtype == torch.float32:  # a single cut
            return
    x = empty(WINDOW, INTER, dtype=dtype)
    int4.rotate(x, empty(128, 128, dtype=dtype), x)


def between(dtype: torch.dtype) -> None:
    """What lies between the matmuls."""
    x, weight, table = (empty(*shape, dtype=dtype) for shape in ((WINDOW, HIDDEN), (HIDDEN,), (VOCAB, HIDDEN)))
    act, long = empty(WINDOW, INTER, dtype=dtype), empty(WINDOW, INTER, dtype=torch.int8)
    values, scale = empty(WINDOW, HIDDEN, dtype=torch.int8), empty(WINDOW, dtype=torch.float32)
    peaks, keys = empty(MOST_ROWS, dtype=torch.int32), empty(MOST_ROWS, dtype=torch.int64)
    rows.embed(table, empty(WINDOW, dtype=torch.int64), x, keys)
    rows.add_rms_norm(x, x, weight, 1e-6, x, x, peaks)
    rows.add_rms_norm_quantize(x, x, weight, 1e-6, x, values, scale, peaks)
    rows.swiglu(empty(WINDOW, 2 * INTER, dtype=dtype), act)
    rows.quantize(act, long, scale)
    rows.quantize_by_peak(act, peaks, long, scale)
    # Digits for wide inputs.
    rows.add_rms_norm_quantize(x, x, weight, 1e-6, x, empty(2 * WINDOW, HIDDEN, dtype=torch.int8), scale, peaks)
    rows.digits(act, empty(2 * WINDOW, INTER, dtype=torch.int8), scale)
    rows.quantize_by_peak(act, peaks, empty(2 * WINDOW, INTER, dtype=torch.int8), scale)


def attend(dtype: torch.dtype) -> None:
    """Append, attention and combination, and the rows of a draft's path moved."""
    shape = Shape(rows=WINDOW, items=8, pages=64, partials=256)
    tables = views(empty(size_of(shape), dtype=torch.int64), shape)
    norm, angles = empty(HEAD_DIM, dtype=dtype), empty(4096, HEAD_DIM // 2, dtype=torch.float32)
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, norm, norm, 1e-6)
    qkv, out = empty(WINDOW, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype), empty(WINDOW, HIDDEN, dtype=dtype)
    pages = empty(2, KV_HEADS, attention.PAGE, HEAD_DIM, dtype=dtype)
    workspace = empty(attention.partial_floats(256, HEADS, HEAD_DIM), dtype=torch.float32)
    peaks = empty(MOST_ROWS, dtype=torch.int32)
    attention.attend_items(qkv, spec, angles, angles, pages[0], pages[1], tables, tables.items, workspace, peaks)
    attention.combine(spec, tables, range(WINDOW), workspace, out, peaks)
    attention.move_rows(pages[None], empty(2, 5, dtype=torch.int64), HEAD_DIM)


if __name__ == "__main__":
    main(int(sys.argv[1]))
