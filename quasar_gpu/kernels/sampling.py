"""Sampling by the Gumbel-max trick where the logits are: the noise of common/speculation/sampling.py, bit by bit of its
hash, and logarithms in float64, whose last place may be another than the host's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quasar_gpu.kernels.launch import await_inputs, jit, launch

_BLOCK = 2048  # tokens that one program looks at


def gumbel_best(logits: Tensor, states: Tensor, temperatures: Tensor) -> Tensor:
    """The argmax int64 [rows] of logits / temperature + noise, the first of equals.

    logits float32 [rows, vocab]; states int64 [rows]: `sampling.noise_state` of each row's seed and output index, as
    signed numbers; temperatures float64 [rows].
    """
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, _BLOCK)
    scores = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    launch(_gumbel_best, (rows, blocks), logits, states, temperatures, scores, tokens, vocab, warps=8, BLOCK=_BLOCK)
    return tokens.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]


@jit()
def _gumbel_best(
    logits, states, temperatures, scores, tokens, vocab, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    await_inputs(DEPENDENT)
    # splitmix64's finaliser, with its constants as signed numbers.
    x = (token.to(tl.int64) * -7046029254386353131 + tl.load(states + row)).to(tl.uint64, bitcast=True)
    x = x ^ (x >> 30)
    x = x * tl.full((BLOCK,), -4658895280553007687, tl.int64).to(tl.uint64, bitcast=True)
    x = x ^ (x >> 27)
    x = x * tl.full((BLOCK,), -7723592293110705685, tl.int64).to(tl.uint64, bitcast=True)
    x = x ^ (x >> 31)
    uniform = ((x >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    score = tl.load(logits + row.to(tl.int64) * vocab + token, mask=inside, other=0).to(tl.float64)
    score = score / tl.load(temperatures + row) - tl.log(-tl.log(uniform))
    score = tl.where(inside, score, float("-inf"))
    best = tl.argmax(score, axis=0)
    at = row * tl.num_programs(1) + block
    tl.store(scores + at, tl.max(score, axis=0))
    tl.store(tokens + at, (block * BLOCK + best).to(tl.int64))
