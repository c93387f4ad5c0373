"""pack-quantized: what is written is what is read, and what is no int4 checkpoint is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.checkpoints.compressed_tensors import pack, unpack


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 99))
def test_packing_is_undone(rows: int, n: int, seed: int) -> None:
    values = torch.randint(-8, 8, (rows, n), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    words = pack(values, 4)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-n // 8))
    assert torch.equal(unpack(words, 4)[:, :n], values)


@pytest.mark.parametrize(
    ("values", "word"), [([-8] * 8, 0), ([-7] + [-8] * 7, 1), ([7] * 8, -1), ([-8] * 7 + [0], -(1 << 31))]
)
def test_lowest_bits_come_first(values: list[int], word: int) -> None:
    assert pack(torch.tensor([values], dtype=torch.int8), 4).item() == word
