"""`python -m quasar_gpu.generate`: `quasar generate` on an NVIDIA card."""

import sys

import torch

from quasar.cli import main


def run(argv: list[str]) -> int:
    """Takes the flags of `quasar generate`. Without a CUDA device it says so in one line and runs on CPU."""
    if torch.cuda.is_available():
        return main(["generate", *argv], default_device="cuda")
    print("quasar_gpu: no CUDA device here, running on CPU", file=sys.stderr)
    return main(["generate", *argv], default_device="cpu")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
