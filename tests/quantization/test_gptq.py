"""GPTQ: on the grid that it is given, and nearer at the outputs than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quasar.checkpoints.weights import FullWeights
from quasar.quantization.calibration import InputStats
from quasar.quantization.gptq import _inverse_factor, gptq
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


def channel_by_channel(weight: Tensor, moments: Tensor, scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """The paper's algorithm in float64, without blocks."""
    moments = moments.double()
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    order = moments.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(moments[order][:, order]), upper=True)
    left, values = weight.double()[:, order], torch.zeros_like(weight, dtype=torch.int8)
    for i, channel in enumerate(order.tolist()):
        group = channel // (weight.shape[1] // scale.shape[1])
        step, zero = scale[:, group].double(), offset[:, group].double()
        rounded = ((left[:, i] - zero) / step).round().clamp(low, high)
        error = (left[:, i] - zero - rounded * step) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
        values[:, channel] = rounded
    return values


@settings(max_examples=20)
@given(st.integers(1, 150), st.integers(1, 20), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_blocks_do_not_change_the_result(size: int, out: int, groups: int, int4: bool, seed: int) -> None:
    inputs, (low, high) = groups * size, (-8, 7) if int4 else (-127, 127)
    x, weight = correlated(50, inputs, seed), torch.randn(out, inputs)
    scale = weight.view(out, groups, size).abs().amax(dim=2).clamp(min=0.1) / high
    offset = torch.randn(out, groups) * scale if int4 else torch.zeros(out, groups)
    made = gptq(weight, x.t() @ x, scale, offset if int4 else None, low, high)
    expected = channel_by_channel(weight, x.t() @ x, scale, offset, low, high)
    # Sums in another order and precision: a number between two steps may fall elsewhere, and others make up for it.
    assert (made != expected).float().mean() < 0.02


@pytest.mark.parametrize("channels", [1, 288, 700])
def test_moments_are_those_of_every_pair_of_channels(channels: int) -> None:
    x, weights = torch.randn(40, channels), torch.rand(40)
    stats, generator = InputStats.empty(channels, moments=True), torch.Generator()
    stats.update(x[:30], weights[:30], 0, generator)
    stats.update(x[30:], weights[30:], 0, generator)
    stats.finish()
    torch.testing.assert_close(stats.moments, (x * weights[:, None]).t() @ x, rtol=1e-4, atol=1e-4)


def test_a_factor_by_halves_is_the_factor() -> None:
    x = correlated(2000, 700)
    moments = x.t() @ x
    factor = _inverse_factor(moments)
    assert torch.equal(factor, factor.triu())
    upper = torch.linalg.inv(factor.double())
    torch.testing.assert_close(upper @ upper.t(), moments.double(), rtol=0, atol=1e-5 * moments.max().item())


def test_channels_that_never_fire_are_rounded_to_nearest() -> None:
    weight = torch.randn(16, 32)
    values, scale = quantize_weight(weight)
    assert torch.equal(gptq(weight, torch.zeros(32, 32), scale[:, None], None, -127, 127), values)
