"""`python -m quasar_npu.generate`: `quasar generate` on an Ascend NPU."""

import sys

from quasar.cli import main
from quasar.errors import QuasarError
from quasar_npu.device import open_npu


def run(argv: list[str]) -> int:
    """Takes the flags of `quasar generate`. Without an NPU it says so in one line and runs on CPU."""
    try:
        open_npu("npu")
    except QuasarError as error:
        print(f"quasar_npu: {str(error).removeprefix('--device npu: ')}; running on CPU", file=sys.stderr)
        return main(["generate", *argv], default_device="cpu")
    return main(["generate", *argv], default_device="npu")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
