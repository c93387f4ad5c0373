"""int8 arithmetic against the floating-point numbers it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.backends import get_backend, reference
from quasar.backends.base import ActivationQuant, Quantized
from quasar.checkpoints.weights import FullWeights
from quasar.models.linear import W8A8Linear
from quasar.quantization.rounding import fake_quantized_output, quantize_weight, to_int8

BACKEND = get_backend("reference")


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 70), st.integers(1, 50), st.integers(0, 2**31))
def test_equals_the_fake_quantised_float_result(tokens, inputs, out, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((tokens, inputs), (out, inputs), (out,)))
    y = W8A8Linear(BACKEND, to_int8(FullWeights(weight, bias)))(x)
    torch.testing.assert_close(y, fake_quantized_output(x, weight) + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-128, -127, 127])
@pytest.mark.parametrize("inputs", [2, 63, 64, 300, 12800])
def test_extremes_accumulate_exactly(value, inputs):
    x = torch.full((6, inputs), value, dtype=torch.int8)
    weight = torch.full((24, inputs), -128, dtype=torch.int8)
    handle = BACKEND.int8_weight(weight, torch.ones(24))
    y = BACKEND.int8_linear(Quantized(x, torch.ones(6)), handle, None)
    assert (y == torch.tensor(float(-128 * value * inputs))).all()


@pytest.mark.parametrize("inputs", [1, 300, 1024, 2500])
def test_sums_are_exact_where_onednn_s_are_not(inputs, monkeypatch):
    """As on processors without VNNI."""
    monkeypatch.setattr(reference, "int_mm_is_exact", lambda: False)
    x, weight = (torch.randint(-128, 128, (n, inputs), dtype=torch.int8) for n in (5, 24))
    for a, b in ((x, weight), (torch.full_like(x, -128), torch.full_like(weight, -128))):
        assert torch.equal(reference.int8_matmul(a, b), (a.long() @ b.long().t()).int())


def test_real_integers_are_multiplied(monkeypatch):
    """Not fake quantisation: the matmul sees int8 on both sides."""
    seen = []
    original = reference.int8_matmul
    monkeypatch.setattr(reference, "int8_matmul", lambda a, b: seen.append((a.dtype, b.dtype)) or original(a, b))
    W8A8Linear(BACKEND, to_int8(FullWeights(torch.randn(8, 16), None)))(torch.randn(3, 16))
    assert seen == [(torch.int8, torch.int8)]


def test_activations_round_half_to_even_per_token():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.0, 127.0]])
    quantized = BACKEND.quantize(x, ActivationQuant())
    assert quantized.scale.tolist() == [1.0, 1.0, 2.0]
    assert quantized.values.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 2, 64]]


def test_a_static_scale_saturates():
    quantized = BACKEND.quantize(torch.tensor([[1.0, -300.0, 64.0]]), ActivationQuant(torch.tensor([0.5])))
    assert quantized.values.tolist() == [[2, -128, 127]]
    assert quantized.scale.tolist() == [0.5]


def test_weights_have_one_scale_per_output_channel():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0], [127.0, 63.6]])
    values, scale = quantize_weight(weight)
    assert values.tolist() == [[64, -127], [0, 0], [127, 64]]
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 1.0, 1.0]))


def test_bytes_of_a_pass(shipped):
    """W8A8 reads one byte per weight of the linear layers, and what stays in full precision as it was."""
    decoder = shipped("qwen3", "w8a8", "reference").decoder
    c = decoder.config
    inner = c.num_layers * c.hidden_size * (c.qkv_size + c.num_heads * c.head_dim + 3 * c.intermediate_size)
    scales = 4 * c.num_layers * (c.qkv_size + 2 * c.hidden_size + 2 * c.intermediate_size)
    norms = 4 * c.hidden_size * (2 * c.num_layers + 1)
    lm_head = 4 * c.vocab_size * c.hidden_size
    assert decoder.weight_bytes_per_pass == inner + scales + norms + lm_head
