"""Where one W8A8 pass on CPU goes: time in each C kernel, and what is left for Python and PyTorch.

python scripts/profile_step.py --dummy qwen3-0.6b --rows 1 6
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common import load
from common.backends import native
from common.evaluation.speed import Step, decoder_step
from common.loading import LM_HEADS, quantize
from common.models.model import DUMMY_PREFIX

KERNELS = ("int8_linear", "float_linear", "quantize", "add_rms_norm", "swiglu", "rope_qk_append", "attention")


@contextmanager
def kernel_clocks(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the time spent inside each C function. The clock's own cost counts as time outside them."""
    module: Any = native._kernels

    def clocked(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            start = time.perf_counter()
            kernel(*args)
            seconds[name] += time.perf_counter() - start

        return call

    originals = {name: getattr(module, name) for name in KERNELS}
    for name, kernel in originals.items():
        setattr(module, name, clocked(name, kernel))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(module, name, kernel)


def profile(step: Step, ids: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each pass: in each kernel, "outside" all of them, and "pass", the whole."""
    samples: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 2):
        seconds: dict[str, float] = dict.fromkeys(KERNELS, 0.0)
        with kernel_clocks(seconds):
            start = time.perf_counter()
            step.run(ids)
            whole = time.perf_counter() - start
        if repeat >= 2:  # the first ones warm up
            for name, spent in seconds.items():
                samples[name].append(1e3 * spent)
            samples["outside"].append(1e3 * (whole - sum(seconds.values())))
            samples["pass"].append(1e3 * whole)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dummy", default="qwen3-0.6b", help="shape (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lm-head", choices=LM_HEADS, default="w8a8")
    args = parser.parse_args()
    if not native.available():
        parser.error("the kernels are not built: pip install -e . with a C compiler")
    model = load(DUMMY_PREFIX + args.dummy, device="cpu")
    quantize(model, lm_head=args.lm_head)
    step = decoder_step(model.decoder, args.context, max(args.rows))
    print(
        f"{args.dummy}, W8A8, lm_head {args.lm_head}, {args.context} tokens of context; median ms and share of a pass"
    )
    for rows in args.rows:
        samples = profile(step, torch.arange(rows), args.repeats)
        whole = statistics.median(samples["pass"])
        for name, times in samples.items():
            share = statistics.median(t / p for t, p in zip(times, samples["pass"], strict=True))
            if whole and share:
                print(f"M={rows:<3} {name:<16}{statistics.median(times):>9.2f}{share:>8.1%}")


if __name__ == "__main__":
    main()
