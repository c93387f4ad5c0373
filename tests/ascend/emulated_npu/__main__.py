"""Run a Python module on the emulated NPU: ``python -m emulated_npu quasar_npu.generate --prompt hi``."""

import runpy
import sys

from emulated_npu.toolchain import install, unavailable


def main() -> None:
    """Install the emulation, then run ``sys.argv[1]`` as ``__main__`` with the remaining arguments."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m emulated_npu MODULE [ARGUMENT...]")
    if reason := unavailable():
        sys.exit(f"the emulated Ascend device is not available: {reason}")
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
