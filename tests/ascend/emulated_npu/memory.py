"""Look at device memory from the host: the emulated device's memory is host memory."""

import ctypes
from functools import lru_cache

import torch
import torch_npu

from emulated_npu.limits import FRACTAL_NZ


@lru_cache(maxsize=4096)
def _bytes_at(address: int, size: int) -> torch.UntypedStorage:
    # Owns nothing: valid exactly as long as the device allocation is, like a pointer in a captured kernel.
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).untyped_storage()


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same memory, with the same shape and strides.

    A FRACTAL_NZ tensor keeps its elements in row-major order here (its storage is never smaller), and its
    view carries ``npu_format`` so that operators can tell.
    """
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    if storage.nbytes():
        view.set_(
            _bytes_at(storage.data_ptr(), storage.nbytes()),
            tensor.storage_offset(),
            tensor.size(),
            tensor.stride(),
        )
    else:
        view = view.new_empty(tensor.size())
    if int(torch_npu.get_npu_format(tensor)) == FRACTAL_NZ:
        view.npu_format = FRACTAL_NZ
    return view


def device_copy(host: torch.Tensor) -> torch.Tensor:
    """A new device tensor with the contents, shape and (where dense) strides of a CPU tensor."""
    # Allocated by torch_npu's own caching allocator, so graph pools and memory statistics stay true.
    tensor = torch.empty_like(host, device="npu")
    host_view(tensor).copy_(host)
    return tensor
