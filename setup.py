"""The one part of the build that pyproject.toml cannot say: the optional C kernels for CPU.

Where no C compiler is found, or it fails, the package installs without them and the reference backend serves.
"""

from pathlib import Path

from setuptools import Extension, setup

sources = Path("common/backends/native/csrc")

setup(
    ext_modules=[
        Extension(
            "common.backends.native._kernels",
            sources=sorted(str(path) for path in sources.glob("*.c")),
            depends=sorted(str(path) for path in sources.glob("*.h")),
            # No -march: each isa_*.c states its own instruction set, and the processor decides at run time.
            # No contraction: a fused multiply-add stands where it was asked for, so results are reproducible.
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-Wno-unknown-pragmas",
            ],
            libraries=["m", "dl"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
