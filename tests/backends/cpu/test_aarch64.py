"""The kernels for aarch64, compiled for it and run on an emulated processor, where the tools for that are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HERE, KERNELS = Path(__file__).parent, Path(__file__).parents[3] / "common/backends/cpu/csrc"
SOURCES = ("isa_dotprod.c", "isa_i8mm.c", "isa_plain.c", "pack.c", "segments.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(
            f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user); "
            "on aarch64 itself test_cpu_kernels.py runs these kernels"
        )
    made = tmp_path_factory.mktemp("aarch64") / "kernels"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", *warnings, "-static", f"-I{KERNELS}"]
    sources = [HERE / "aarch64.c", *(KERNELS / name for name in SOURCES)]
    subprocess.run([COMPILER, *flags, *sources, "-lm", "-o", made], check=True)
    return made


@pytest.mark.parametrize(
    ("instruction_set", "processor", "comparisons"),
    [("dotprod", "neoverse-n1", 738), ("i8mm", "max", 874)],  # Neoverse N1 has dot products and nothing later
)
def test_kernels_on_an_emulated_processor(
    program: Path, instruction_set: str, processor: str, comparisons: int
) -> None:
    command = [EMULATOR, "-cpu", processor, program, instruction_set]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{instruction_set}: {comparisons} right, 0 wrong\n"
