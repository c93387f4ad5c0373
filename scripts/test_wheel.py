"""Checks an installed wheel: the C kernels are in it, with every instruction set that this kind of processor can have.

    pip wheel . --no-deps -w dist && python -m venv bare && bare/bin/pip install dist/*.whl
    cd / && env PATH=/nowhere /path/to/bare/bin/python /path/to/scripts/test_wheel.py

Loads the shipped model with each instruction set that this machine runs and generates a few tokens: no compiler is
looked for. --kernels-only stops at what needs no torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

COMPILED = {
    "x86_64": ["amx", "avx512bf16", "avx512", "avxvnni", "avx2", "plain"],
    "aarch64": ["i8mm", "dotprod", "plain"],
}


def extension() -> Path:
    """The file of the installed C kernels."""
    sys.path[:] = [folder for folder in sys.path if not (Path(folder or ".") / "quasar.py").exists()]
    package = importlib.util.find_spec("quasar")
    if package is None or package.origin is None:
        sys.exit("quasar is not installed")
    found = sorted((Path(package.origin).parent / "backends" / "cpu").glob("_kernels*"))
    if not found:
        sys.exit(f"no C kernels in {Path(package.origin).parent}: built without a compiler?")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels-only", action="store_true")
    args = parser.parse_args()
    path = extension()
    spec = importlib.util.spec_from_file_location("_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = COMPILED[platform.machine()]
    if module.compiled() != expected:
        sys.exit(f"{path} has {module.compiled()}, expected {expected}")
    runs = module.supported()
    compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    print(f"{path}: {', '.join(expected)}; this machine runs {', '.join(runs)}; compilers: {compilers or 'none'}")
    if args.kernels_only:
        return
    code = "from quasar import load, generate; m = load('tiny-qwen3', device='cpu', precision='w8a8'); "
    code += "r = generate(m, 'def main():', max_new_tokens=12).result(); assert len(r.token_ids) == 12; print(r.text)"
    for name in runs:
        print(f"{name}: ", end="", flush=True)
        environment = {**os.environ, "QUASAR_NATIVE_ISA": name}
        if subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", check=False).returncode:
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    main()
