"""Writing into the KV cache at a position held on the device, and weights in FRACTAL_NZ format."""

import torch
import torch_npu

from emulated_npu import counts, graphs
from emulated_npu.limits import (
    FRACTAL_NZ,
    is_fractal,
    need,
    need_dtype,
    need_emulated,
    need_same_dtype,
    need_shape,
    need_training_card,
)
from emulated_npu.memory import host_view

ND = 2


def npu_scatter_nd_update_(input, indices, updates):
    """input[indices[i]] = updates[i], in place; indices [..., a] address the first a dimensions of input."""
    need_training_card("npu_scatter_nd_update_")  # CANN has no binary of it for inference cards
    need_dtype("input", input, torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)
    need_same_dtype(input=input, updates=updates)
    need_dtype("indices", indices, torch.int32, torch.int64)
    need(indices.dim() >= 2, "indices needs at least two dimensions")
    depth = indices.shape[-1]
    need(depth <= input.dim(), "indices address more dimensions than input has")
    need_shape("updates", updates, (*indices.shape[:-1], *input.shape[depth:]))
    flat = indices.reshape(-1, depth).long()
    limit = torch.tensor(input.shape[:depth])
    need(bool(((flat >= 0) & (flat < limit)).all()), "an index lies outside input")
    input[tuple(flat.unbind(-1))] = updates.reshape(flat.shape[0], *input.shape[depth:])
    return input


def npu_format_cast(input, acl_format=None, customize_dtype=None, input_dtype=None, dst=None):
    """A copy of a device tensor in storage format 29 (FRACTAL_NZ) or 2 (ND); shape and values stay.

    The tensor is a real torch_npu one in that format, with storage of that size; only the order of the
    elements inside is the emulation's own (row-major), which nothing but the emulation reads. As with the
    CANN releases before 9.1, the cast silently stays ND unless ``torch.npu.config.allow_internal_format``
    is True.
    """
    need(not graphs.capturing(), "npu_format_cast belongs before graph capture")
    need_emulated(dst is None and customize_dtype is None, "only the plain cast")
    need_emulated(acl_format in (ND, FRACTAL_NZ), "only formats 2 (ND) and 29 (FRACTAL_NZ)")
    need_dtype("input", input, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.int32)
    if is_fractal(host_view(input)) == (acl_format == FRACTAL_NZ):
        return input
    need(input.dim() >= 2, "FRACTAL_NZ needs at least two dimensions")
    need(min(input.shape[-2:]) > 1, f"a FRACTAL_NZ matrix of {tuple(input.shape)}: a dimension of 1 stays ND")
    result = torch_npu.unsafe_empty_with_format(
        input.size(), dtype=input.dtype, device="npu", acl_format=acl_format, keep_format=False
    )
    host_view(result).copy_(host_view(input))
    counts.launched("npu_format_cast")
    return result
