"""Instructions of the inner loops of the ARM products, to judge them by where no such processor is at hand.

    python scripts/experiments/count_instructions.py i8mm int8_rows int4_linear

Compiles one instruction set for aarch64 (Debian: gcc-aarch64-linux-gnu) and prints, for every innermost loop of the
named functions that has a product instruction, how many instructions it has, of which kinds, and its multiply-adds
(of 16 for a product of four inputs, 32 for one of 2 by 2 by 8) for each. Products of rows that are only padding count.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "common/backends/cpu/csrc"
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-w"]
PRODUCTS = {"sdot": 16, "smmla": 32}
LINE = re.compile(r"\s*([0-9a-f]+):\s+(\S+)\s*([^/]*)")


def innermost_loops(lines: list[tuple[int, str, str]]) -> list[list[tuple[str, str]]]:
    """The (mnemonic, operands) between a branch backwards and its target, where no other such loop lies within."""
    places = {address: i for i, (address, _, _) in enumerate(lines)}
    backwards = []
    for i, (address, name, operands) in enumerate(lines):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if name.startswith(("b.", "cbnz", "cbz", "tbz", "tbnz")) and target:
            to = int(target[1], 16)
            if to < address and to in places:
                backwards.append((places[to], i))
    inner = [(a, b) for a, b in backwards if not any((c, d) != (a, b) and a <= c and d <= b for c, d in backwards)]
    return [[(name, operands) for _, name, operands in lines[a : b + 1]] for a, b in inner]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["dotprod", "i8mm"])
    parser.add_argument("functions", nargs="+")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-gcc", help="perhaps with options")
    parser.add_argument("--print", action="store_true", help="the loops themselves too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.o"
        subprocess.run([*args.compiler.split(), *FLAGS, "-c", KERNELS / f"isa_{args.set}.c", "-o", made], check=True)
        dump = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", made]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    for name, body in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", text, re.MULTILINE):
        if name.split(".")[0] not in args.functions:
            continue
        lines = [(int(m[1], 16), m[2], m[3].strip()) for m in map(LINE.match, body.splitlines()) if m]
        for loop in innermost_loops(lines):
            kinds = Counter(kind for kind, _ in loop)
            multiply_adds = sum(kinds[kind] * count for kind, count in PRODUCTS.items())
            if not multiply_adds:
                continue
            spills = sum("sp" in operands for _, operands in loop)
            print(
                f"{name}: {len(loop)} instructions, {multiply_adds} multiply-adds, {multiply_adds / len(loop):.1f} "
                f"for each; {spills} on the stack; {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
            )
            if args.print:
                print("".join(f"    {kind:8} {operands}\n" for kind, operands in loop))


if __name__ == "__main__":
    main()
