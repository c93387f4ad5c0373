"""One linear layer on CPU, the libraries' kernels and ours, for a verification window and for a prompt.

    python scripts/experiments/bench_kernels.py --json kernels.json

Several copies of the weight are used in turn, so that none is found in a cache; kernels take turns within a
repeat; the read bandwidth is measured in the same run and gives the floor (bytes of the weight / bandwidth).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quasar.backends.cpu import kernels

Layer = Callable[[int], object]  # runs on the i-th copy of the weight
Kernels = dict[str, tuple[int, Callable[[int], Layer]]]  # name -> bytes per weight, rows -> layer to time


def read_bandwidth(block: Tensor, repeats: int) -> list[float]:
    """GB/s of summing `block`, each time."""
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        block.sum()
        speeds.append(block.nbytes / (time.perf_counter() - start) / 1e9)
    return speeds


def quantized(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random int8 weight [n, k] and its scales [n]."""
    return torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 1000 + 1e-4


def library_kernels(n: int, k: int, copies: int) -> Kernels:
    """What PyTorch brings: oneDNN, MKL, FBGEMM."""
    full = [torch.randn(n, k) for _ in range(copies)]
    half = [w.bfloat16() for w in full]
    packs = [quantized(n, k) for _ in range(copies)]
    prepack = torch.ops.onednn.qlinear_prepack
    no_zero = torch.zeros(n, dtype=torch.int32)

    def linear(m: int) -> Layer:
        x = torch.randn(m, k)
        return lambda i: F.linear(x, full[i])

    def linear_bf16(m: int) -> Layer:
        x = torch.randn(m, k, dtype=torch.bfloat16)
        return lambda i: F.linear(x, half[i])

    def int_mm(m: int) -> Layer:
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        return lambda i: torch._int_mm(x, packs[i][0].t())

    candidates = {
        "F.linear float32": (4, linear),
        "F.linear bfloat16": (2, linear_bf16),
        "torch._int_mm": (1, int_mm),
    }
    try:
        prepacked = [prepack(w, None) for w, _ in packs]

        def qlinear(m: int) -> Layer:
            x = torch.randint(0, 256, (m, k), dtype=torch.uint8)

            def run(i: int) -> Tensor:
                return torch.ops.onednn.qlinear_pointwise(
                    x, 0.01, 128, prepacked[i], packs[i][1], no_zero, None,
                    1.0, 0, torch.float32, "none", [], "",
                )  # fmt: skip

            run(0)
            return run

        qlinear(1)
        candidates["onednn.qlinear_pointwise uint8"] = (1, qlinear)
    except (RuntimeError, NotImplementedError) as error:
        print(f"onednn.qlinear_pointwise does not run here: {str(error).splitlines()[0]}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates its quantised tensors; they still run
            fbgemm = [
                torch.ops.quantized.linear_prepack(
                    torch._make_per_channel_quantized_tensor(w, s.double(), torch.zeros(n, dtype=torch.long), 0),
                    None,
                )
                for w, s in packs
            ]

        def linear_dynamic(m: int) -> Layer:
            x = torch.randn(m, k)
            return lambda i: torch.ops.quantized.linear_dynamic(x, fbgemm[i])

        candidates["quantized.linear_dynamic (FBGEMM)"] = (1, linear_dynamic)
    except (RuntimeError, NotImplementedError) as error:
        print(f"quantized.linear_dynamic does not run here: {str(error).splitlines()[0]}")
    return candidates


def native_kernels(n: int, k: int, copies: int) -> Kernels:
    """The kernels of this package."""
    int8 = [kernels.PackedInt8(*quantized(n, k)) for _ in range(copies)]
    bf16 = [kernels.PackedBf16(torch.randn(n, k).bfloat16()) for _ in range(copies)]
    full = [kernels.PackedFloat32(torch.randn(n, k)) for _ in range(copies)]

    def int8_layer(m: int) -> Layer:
        x, scale = kernels.quantize_per_token(torch.randn(m, k))
        return lambda i: kernels.int8_linear(x, scale, int8[i])

    def int8_quantising(m: int) -> Layer:
        x = torch.randn(m, k)
        return lambda i: kernels.int8_linear(*kernels.quantize_per_token(x), int8[i])

    def bf16_layer(m: int) -> Layer:
        x = torch.randn(m, k)
        return lambda i: kernels.float_linear(x, bf16[i])

    def rounding_layer(m: int) -> Layer:
        x = torch.randn(m, k)
        return lambda i: kernels.bf16_linear(x, bf16[i])

    def f32_layer(m: int) -> Layer:
        x = torch.randn(m, k)
        return lambda i: kernels.float_linear(x, full[i])

    return {
        "native int8": (1, int8_layer),
        "native quantise + int8": (1, int8_quantising),
        "native bf16 weights, float32": (2, bf16_layer),
        "native round + bf16": (2, rounding_layer),
        "native float32": (4, f32_layer),
    }


def measure(candidates: Kernels, m: int, copies: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of one layer, over every call, of each kernel for m rows."""
    layers = {name: make(m) for name, (_, make) in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 1):  # the first is warm-up
        for name, layer in layers.items():
            for i in range(copies):
                start = time.perf_counter()
                layer(i)
                if repeat:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("K", "N"), action="append", help="inputs, outputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 8, 16, 32, 512])
    parser.add_argument("--copies", type=int, default=24, help="weights used in turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not kernels.available():
        parser.error("the kernels are not built: pip install -e . with a C compiler")
    torch.set_num_threads(args.threads)
    report = {
        "torch": torch.__version__,
        "threads": args.threads,
        "instruction_set": kernels.instruction_set(),
        "shapes": [],
    }
    print(f"torch {torch.__version__}, {args.threads} threads, {kernels.instruction_set()}; median ms per layer")
    block = torch.ones(1 << 28)  # 1 GiB
    for k, n in args.shape or [(1024, 3072), (3072, 1024)]:
        candidates = library_kernels(n, k, args.copies) | native_kernels(n, k, args.copies)
        speeds, columns = [], {}
        for m in args.rows:
            speeds += read_bandwidth(block, 2)
            # Long inputs are bound by arithmetic: a few copies say as much.
            columns[m] = measure(candidates, m, args.copies if m <= 32 else 3, args.repeats)
        bandwidth = statistics.median(speeds)
        print(f"\nread bandwidth {bandwidth:.1f} GB/s ({min(speeds):.1f} to {max(speeds):.1f}): 1 GiB, summed")
        print(f"| K={k} N={n} | floor | " + " | ".join(f"M={m}" for m in args.rows) + " |")
        print("|---" * (len(args.rows) + 2) + "|")
        for name, (width, _) in candidates.items():
            floor = n * k * width / bandwidth / 1e6
            times = {m: columns[m][name] for m in args.rows}
            print(f"| {name} | {floor:.2f} | " + " | ".join(f"{t:.3f}" for t in times.values()) + " |")
            report["shapes"].append(
                {"k": k, "n": n, "kernel": name, "read_gb_per_s": bandwidth, "floor_ms": floor, "ms": times}
            )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
