"""Sampling at the edge of a cdf, in float32 as on devices without float64."""

import pytest
import torch

from quasar.speculation.sampling import sample_inverse_cdf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("total", [1.0, 0.7, 3.0])
def test_an_impossible_token_is_never_sampled(dtype, total):
    """Uniform numbers so near 1 that u * total rounds to the total, before tokens of probability 0."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0, 0.0]], dtype=dtype).repeat(2, 1) * total
    uniform = torch.tensor([1.0, 0.0], dtype=dtype)  # 1 is what rounding makes of 1 - 2**-30 in float32
    assert sample_inverse_cdf(probs, uniform).tolist() == [3, 1]
