"""Where the kernels run: on a card, compiled, where there is one; else in Triton's interpreter on the CPU."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import interpreted_dot

    interpreted_dot.install()


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """tests/conftest.py chooses the interpreter."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
