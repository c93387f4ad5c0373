"""Peak memory of loading, quantising and generating on CPU, each precision in a process of its own.

python scripts/bench_memory.py                        # random weights of Qwen3-0.6B's shape
python scripts/bench_memory.py --model FOLDER --precisions auto
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def peak_mib() -> float:
    """Largest resident memory of this process so far. Not ru_maxrss: a child inherits that from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str, precision: str, lm_head: str, tokens: int) -> None:
    """Prints the peak after each stage."""
    from quasar import generate, load, quantize

    stages = [("imports", peak_mib())]
    model = load(name, device="cpu", precision="auto" if precision == "auto" else "full")
    stages.append(("load", peak_mib()))
    if precision not in ("auto", "full"):
        quantize(model, precision=precision, lm_head=lm_head)
        stages.append(("quantise", peak_mib()))
    prompt = [i % model.config.vocab_size for i in range(128)]
    generate(model, prompt, max_new_tokens=tokens, ignore_eos=True).result()
    stages.append(("generate", peak_mib()))
    weights = model.decoder.weight_bytes_per_pass + model.decoder.embedding.nbytes
    peaks = ", ".join(f"{stage} {mib:.0f}" for stage, mib in stages)
    print(f"{name} {precision}: peak MiB after {peaks}; weights and embedding {weights / 2**20:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:qwen3-0.6b", metavar="M", help="folder, or dummy:SHAPE")
    parser.add_argument("--precisions", nargs="+", default=["full", "w8a8"], metavar="P", help="auto: the checkpoint's")
    parser.add_argument("--lm-head", default="full", choices=("full", "w8a8"))
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        measure(args.model, args.precisions[0], args.lm_head, args.max_new_tokens)
        return
    for precision in args.precisions:
        own = ["--here", "--model", args.model, "--precisions", precision, "--lm-head", args.lm_head]
        subprocess.run([sys.executable, __file__, *own, "--max-new-tokens", str(args.max_new_tokens)], check=True)


if __name__ == "__main__":
    main()
