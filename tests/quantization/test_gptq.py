"""GPTQ: on the grid that it is given, and nearer at the outputs than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.checkpoints.weights import FullWeights
from quasar.quantization.gptq import gptq
from quasar.quantization.int4 import to_int4
from quasar.quantization.rounding import quantize_weight, to_int8_gptq


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs as layers have them: far fewer directions than channels carry most of them, and some channels are loud."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, inputs // 4, generator=g) @ torch.randn(inputs // 4, inputs, generator=g)
    return (few + 0.3 * torch.randn(tokens, inputs, generator=g)) * torch.rand(inputs, generator=g).mul(3).exp()


def test_int8_by_gptq_is_nearer_at_the_outputs() -> None:
    x, weight = correlated(600, 96), torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    values, scale = quantize_weight(weight)
    made = to_int8_gptq(FullWeights(weight, None), x.t() @ x)
    assert torch.equal(made.scale, scale) and made.values.dtype == torch.int8 and made.values.abs().max() <= 127

    def error(v: torch.Tensor) -> float:
        return ((v.float() * scale[:, None] - weight) @ x.t()).square().sum().item()

    assert error(made.values) < 0.5 * error(values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("whole_zeros", [True, False])
def test_int4_by_gptq_is_nearer_at_the_outputs(symmetric: bool, whole_zeros: bool) -> None:
    x, weight = correlated(600, 128), torch.randn(32, 128, generator=torch.Generator().manual_seed(1)) + 0.3
    full = FullWeights(weight, None)

    def error(moments: torch.Tensor | None) -> float:
        made = to_int4(full, moments, group=32, symmetric=symmetric, whole_zeros=whole_zeros)
        assert made.group == 32 and (made.offset is None) == symmetric
        assert made.values.min() >= -8 and made.values.max() <= 7
        dense = made.values.float().view(32, -1, 32) * made.scale.float()[..., None]
        if made.offset is not None:
            dense = dense + made.offset.float()[..., None]
            zero = -made.offset.float() / made.scale.float()
            assert not whole_zeros or ((zero - zero.round()).abs() < 0.1).all()
        return ((dense.flatten(1) - weight) @ x.t()).square().sum().item()

    assert error(x.t() @ x) < 0.7 * error(None)


def test_weights_on_the_grid_stay_where_they_are() -> None:
    """As those of a Q4_1 file lie: nothing is rounded, so nothing is moved to make up for it."""
    g = torch.Generator().manual_seed(2)
    values = torch.randint(0, 16, (32, 4, 32), generator=g).float()
    values[..., 0], values[..., 1] = 0, 15  # every group spans its range
    steps = (torch.rand(32, 4, 1, generator=g) + 0.5).bfloat16().float()
    weight = (values * steps - 4 * steps).flatten(1)
    x = correlated(300, 128)
    for moments in (None, x.t() @ x):
        made = to_int4(FullWeights(weight, None), moments, group=32, symmetric=False)
        dense = made.values.float().view(32, 4, 32) * made.scale.float()[..., None] + made.offset.float()[..., None]
        torch.testing.assert_close(dense.flatten(1), weight, rtol=0, atol=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 64), st.integers(0, 99))
def test_blocks_do_not_change_the_result(inputs: int, out: int, block: int, seed: int) -> None:
    x, weight = correlated(50, 4 * inputs, seed), torch.randn(out, 4 * inputs)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    whole = gptq(weight, x.t() @ x, scale, None, -127, 127, block=4 * inputs)
    parts = gptq(weight, x.t() @ x, scale, None, -127, 127, block=block)
    assert (
        whole != parts
    ).float().mean() < 0.02  # sums in another order: a number between two steps may fall elsewhere


def test_channels_that_never_fire_are_rounded_to_nearest() -> None:
    weight = torch.randn(16, 32)
    values, scale = quantize_weight(weight)
    assert torch.equal(gptq(weight, torch.zeros(32, 32), scale[:, None], None, -127, 127), values)
