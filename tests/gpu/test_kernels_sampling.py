"""Sampled tokens are the host's."""

import numpy as np
import pytest
import torch

from quasar.speculation import sampling

pytest.importorskip("triton")
from quasar_gpu.kernels.sampling import gumbel_best


def test_tokens_are_those_that_the_host_samples(kernel_device):
    logits = torch.randn(5, 4500, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, 7] = 60  # certain
    asked = [sampling.Sampling(t, seed=s) for t, s in ((0.7, 1), (1.0, 2), (2.5, 2**70 + 3), (0.01, -5), (1.0, 2))]
    indices = [0, 3, 10**6, 12, 4]
    states = [sampling.noise_state(one.seed, index) for one, index in zip(asked, indices, strict=True)]
    signed = torch.from_numpy(np.array(states, dtype=np.uint64).view(np.int64)).to(kernel_device)
    temperatures = torch.tensor([one.temperature for one in asked], dtype=torch.float64, device=kernel_device)
    found = gumbel_best(logits.to(kernel_device), signed, temperatures).tolist()
    assert found == [sampling.own_token(*given) for given in zip(logits, asked, indices, strict=True)]
    assert found[1] == 7
