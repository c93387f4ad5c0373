"""What the blocks of a GGUF file stand for. Numbers are stored in blocks that share scales; all are little-endian.

The `gguf` package computes the same numbers, several times slower; the tests compare with it, bit for bit.

    Q8_0    32 numbers: f16 d, 32 int8; x = d q
    Q4_0    32 numbers: f16 d, 16 bytes of two; x = d (q - 8)
    Q4_1    32 numbers: f16 d, f16 m, 16 bytes of two; x = d q + m
    Q4_K    256 numbers: f16 d, f16 dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of two numbers;
            x = (d scale) q - (dmin minimum), a scale and a minimum for each 32
    Q6_K    256 numbers: 128 bytes of low 4 bits, 64 of high 2 bits, 16 int8 scales, f16 d; x = d scale (q - 32),
            a scale for each 16

In Q4_0 and Q4_1 the low halves of the bytes are the first 16 numbers, the high halves the last 16; in Q4_K the same
holds for each 64 numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _f16(raw: Tensor, at: int) -> Tensor:
    """float32 [blocks, 1] of the two bytes at `at`."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8) * _f16(raw, 0)


def _halves(quants: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n]: the low four bits of all, then the high four bits of all."""
    return torch.cat([quants & 15, quants >> 4], dim=-1)


def _q4_0(raw: Tensor) -> Tensor:
    return (_halves(raw[:, 2:]).view(torch.int8) - 8) * _f16(raw, 0)


def _q4_1(raw: Tensor) -> Tensor:
    return (_halves(raw[:, 4:]) * _f16(raw, 0)).add_(_f16(raw, 2))


def _q4_k(raw: Tensor) -> Tensor:
    packed = raw[:, 4:16]  # four bytes each of scales, minima, and the rest of both
    scale, low, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], dim=1)  # [blocks, 8]
    minima = torch.cat([low & 63, (rest >> 4) | ((low >> 2) & 48)], dim=1)
    d, least = _f16(raw, 0) * scales, _f16(raw, 2) * minima
    numbers = _halves(raw[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return (numbers * d[..., None]).sub_(least[..., None])


def _q6_k(raw: Tensor) -> Tensor:
    low = _halves(raw[:, :128].reshape(-1, 2, 64))  # [blocks, 2, 128]
    high = raw[:, 128:192].reshape(-1, 2, 32)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)  # [blocks, 2, 128]
    numbers = (low | (high << 4)).view(torch.int8) - 32
    scale = _f16(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8)  # [blocks, 16]
    return numbers.view(-1, 16, 16) * scale[..., None]


DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def dequantize_blocks(raw: Tensor, kind: str) -> Tensor:
    """uint8 [blocks, bytes of a block] -> float32 [blocks, numbers of a block]."""
    return DEQUANTIZE[kind](raw).view(len(raw), -1)
