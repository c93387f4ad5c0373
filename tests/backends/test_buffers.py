"""Buffers: what is in use is never handed out again, what is not always is."""

import torch

from quasar.backends.buffers import Buffers


def test_a_tensor_in_use_is_not_handed_out_again() -> None:
    buffers = Buffers()
    first = buffers.take((2, 3), torch.float32)
    second = buffers.take((2, 3), torch.float32)
    assert first.data_ptr() != second.data_ptr()


def test_a_dropped_tensor_is_reused() -> None:
    buffers = Buffers()
    address = buffers.take((2, 3), torch.float32).data_ptr()
    kept = buffers.take((2, 3), torch.float32)
    assert kept.data_ptr() == address
    assert buffers.nbytes == kept.nbytes


def test_shape_and_type_are_those_asked_for() -> None:
    buffers = Buffers()
    sizes = {(tuple(t.shape), t.dtype) for t in (buffers.take((2, 3), torch.int8), buffers.take((3, 2), torch.int8))}
    assert sizes == {((2, 3), torch.int8), ((3, 2), torch.int8)}


def test_a_chain_of_operations_holds_two() -> None:
    buffers = Buffers()
    x = buffers.take((4,), torch.float32).fill_(1.0)
    for _ in range(10):
        y = buffers.take((4,), torch.float32)
        torch.add(x, 1.0, out=y)
        x = y
        del y
    assert buffers.nbytes == 2 * x.nbytes
    assert x.tolist() == [11.0] * 4
