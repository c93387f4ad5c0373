"""Multiply-adds for each instruction that the ARM products execute, to judge them by where no such processor is.

    python scripts/experiments/count_instructions.py

All instructions of a call on one thread, from its first to its last: the loops, scaling, what is copied. Compiles the
kernels for aarch64 and runs them under qemu, which counts (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross
qemu-user). A multiply-add is one weight by one input, whatever the instruction set makes of it.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "common/backends/cpu/csrc"
SOURCES = [Path(__file__).with_suffix(".c"), *(KERNELS / f"{name}.c" for name in ("isa_dotprod", "isa_i8mm"))]
PRODUCTS = ("full", "w8a8", "w4a16", "w4a4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,6,8,16,64")
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 1024), help="outputs and inputs")
    parser.add_argument("--group", type=int, default=32, help="inputs that share a scale in int4")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-gcc", help="perhaps with options")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plugin, program = Path(folder) / "plugin.so", Path(folder) / "program"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-DPLUGIN", SOURCES[0], "-o", plugin], check=True)
        flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-w", "-static", f"-I{KERNELS}"]
        subprocess.run([*args.compiler.split(), *flags, *SOURCES, "-lm", "-o", program], check=True)

        def instructions(*arguments: str | int) -> int:
            command = ["qemu-aarch64", "-cpu", "max", "-plugin", plugin, program, *map(str, arguments)]
            return int(subprocess.run(command, check=True, capture_output=True, text=True).stderr)

        rows = [int(m) for m in args.rows.split(",")]
        print("| set | product |", *(f"M={m} |" for m in rows))
        for name in ("dotprod", "i8mm"):
            for product in PRODUCTS:
                counts = []
                for m in rows:
                    call = (name, product, m, *args.shape, args.group)
                    counts.append(m * args.shape[0] * args.shape[1] / (instructions(*call, 2) - instructions(*call, 1)))
                print(f"| {name} | {product} |", *(f"{count:.1f} |" for count in counts), flush=True)


if __name__ == "__main__":
    main()
