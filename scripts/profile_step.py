"""Where a pass on CPU goes: time in each C kernel, waiting for the other threads included, and what is left for Python.

python scripts/profile_step.py --dummy qwen3-0.6b --rows 1 6
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict

import torch

from quasar import load
from quasar.backends.cpu import kernels
from quasar.evaluation.speed import context_ids
from quasar.loading import LM_HEADS, quantize
from quasar.models.decoder import Decoder
from quasar.models.model import DUMMY_PREFIX

WARM_UP = 2


def profile(decoder: Decoder, context: int, rows: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each pass: in each kernel, "outside" all of them, and "pass", the whole."""
    decoder.pack()
    cache = decoder.new_cache(context + rows)
    decoder.prefill(context_ids(decoder.config.vocab_size, context), cache, keep=0)
    ids = torch.arange(rows)
    with kernels.recording(cache.k, cache.v) as recording:
        decoder(ids, cache, keep=rows)
    samples: dict[str, list[float]] = defaultdict(list)
    for repeat in range(WARM_UP + repeats):
        start = time.perf_counter()
        calls = recording.timed_replay(context, cache.k, cache.v)
        whole = time.perf_counter() - start
        if repeat < WARM_UP:
            continue
        by_name: Counter[str] = Counter()
        for name, seconds in calls:
            by_name[name] += seconds
        for name, seconds in by_name.items():
            samples[name].append(1e3 * seconds)
        samples["outside"].append(1e3 * (whole - sum(by_name.values())))
        samples["pass"].append(1e3 * whole)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dummy", default="qwen3-0.6b", help="shape (default: %(default)s)")
    parser.add_argument("--precision", choices=("full", "w8a8"), default="w8a8")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lm-head", choices=LM_HEADS, default="w8a8")
    args = parser.parse_args()
    if not kernels.available():
        parser.error("the kernels are not built: pip install -e . with a C compiler")
    model = load(DUMMY_PREFIX + args.dummy, device="cpu")
    if args.precision == "w8a8":
        quantize(model, lm_head=args.lm_head)
    print(f"{args.dummy}, {args.precision}, {args.context} tokens of context; median ms and share of a pass")
    for rows in args.rows:
        samples = profile(model.decoder, args.context, rows, args.repeats)
        for name, times in samples.items():
            share = statistics.median(t / p for t, p in zip(times, samples["pass"], strict=True))
            print(f"M={rows:<3} {name:<16}{statistics.median(times):>9.2f}{share:>8.1%}")


if __name__ == "__main__":
    main()
