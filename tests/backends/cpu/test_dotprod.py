"""The kernels for aarch64, compiled for it and run on an emulated processor, where the tools for that are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HERE, KERNELS = Path(__file__).parent, Path(__file__).parents[3] / "common/backends/cpu/csrc"
SOURCES = [HERE / "dotprod.c", *(KERNELS / name for name in ("isa_dotprod.c", "isa_plain.c", "pack.c", "segments.c"))]


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user); "
    "on aarch64 itself test_native.py runs these kernels",
)
def test_dot_products_of_aarch64_on_an_emulated_processor(tmp_path: Path) -> None:
    program = tmp_path / "dotprod"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", *warnings, "-static", f"-I{KERNELS}"]
    subprocess.run([COMPILER, *flags, *SOURCES, "-lm", "-o", program], check=True)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.stdout == "357 right, 0 wrong\n"
