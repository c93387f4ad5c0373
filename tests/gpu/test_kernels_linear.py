"""Matmuls of a window: int8 bit for bit the reference's, floats by tolerance, rows the same in every window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import QuasarError
from quasar.backends.base import Quantized
from quasar.backends.reference import ReferenceBackend

pytest.importorskip("triton")
from quasar_gpu.kernels import linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(tokens, inner, outputs, seed, device):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (tokens, inner), dtype=torch.int8, generator=g).to(device)
    weight = torch.randint(-128, 128, (outputs, inner), dtype=torch.int8, generator=g).to(device)
    scale, weight_scale = (torch.rand(n, generator=g).to(device) / 100 for n in (tokens, outputs))
    return values, scale, weight, weight_scale, torch.randn(outputs, generator=g).to(device)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 16),
    st.integers(1, 600),
    st.integers(1, 90),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_int8_is_the_references(tokens, inner, outputs, dtype, biased, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, scale, weight, weight_scale, bias = operands(tokens, inner, outputs, seed, device)
    out = torch.empty(tokens, outputs, dtype=dtype, device=device)
    linear.int8_linear(values, scale, weight, weight_scale, bias if biased else None, out)
    sums = (values.cpu().long() @ weight.cpu().long().t()).int()
    reference = ReferenceBackend("cpu", dtype)
    reference.int8_matmul = lambda x, w: sums  # torch._int_mm itself is not asked about odd sizes
    quantized, handle = Quantized(values.cpu(), scale.cpu()), (weight.cpu(), weight_scale.cpu())
    assert torch.equal(out.cpu(), reference.int8_linear(quantized, handle, bias.cpu() if biased else None))


@pytest.mark.parametrize(("token", "weight"), [(-128, -128), (127, 127), (127, -128), (-128, 127), (0, -128)])
def test_extreme_sums_are_exact(kernel_device, token, weight):
    inner = 1000
    values = torch.full((3, inner), token, dtype=torch.int8, device=kernel_device)
    weights = torch.full((20, inner), weight, dtype=torch.int8, device=kernel_device)
    out = torch.empty(3, 20, device=kernel_device)
    linear.int8_linear(
        values, torch.ones(3, device=kernel_device), weights, torch.ones(20, device=kernel_device), None, out
    )
    assert (out == inner * token * weight).all()


@pytest.mark.parametrize("config", [None, *linear.linear_configs()], ids=str)
def test_every_config_gives_the_same_numbers(kernel_device, config):
    values, scale, weight, weight_scale, bias = operands(5, 520, 70, 0, kernel_device)
    out = torch.empty(5, 70, device=kernel_device)
    linear.int8_linear(values, scale, weight, weight_scale, bias, out, config)
    want = (values.cpu().long() @ weight.cpu().long().t()).float() * scale.cpu()[:, None] * weight_scale.cpu()
    assert torch.equal(out.cpu(), want + bias.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "outputs"), [(1, 40, 33), (6, 257, 50), (16, 512, 64), (3, 7, 5)])
def test_float(kernel_device, dtype, tokens, inner, outputs):
    g = torch.Generator().manual_seed(inner)
    x, weight = (torch.randn(n, inner, generator=g).to(dtype).to(kernel_device) for n in (tokens, outputs))
    bias = torch.randn(outputs, generator=g).to(dtype).to(kernel_device)
    want = x.cpu().double() @ weight.cpu().double().t()
    logits = torch.empty(tokens, outputs, device=kernel_device)
    linear.float_linear(x, weight, None, logits)
    torch.testing.assert_close(logits.cpu().double(), want, rtol=1e-5, atol=1e-6 * inner)
    out = torch.empty(tokens, outputs, dtype=dtype, device=kernel_device)
    linear.float_linear(x, weight, bias, out)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), want + bias.cpu().double(), rtol=eps, atol=max(eps, 1e-6 * inner))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_row_does_not_depend_on_its_window(kernel_device, dtype):
    values, scale, weight, weight_scale, bias = operands(16, 300, 40, 1, kernel_device)

    def run(take):
        out = torch.empty(len(values[take]), 40, device=kernel_device)
        if dtype == torch.int8:
            linear.int8_linear(values[take], scale[take], weight, weight_scale, bias, out)
        else:
            linear.float_linear((values[take] / 100).to(dtype), (weight / 100).to(dtype), None, out)
        return out

    window = run(slice(0, 16))
    assert torch.equal(run(slice(2, 8)), window[2:8])
    for i in (0, 7, 15):
        assert torch.equal(run(slice(i, i + 1))[0], window[i])


def test_a_longer_window_is_refused(kernel_device):
    x = torch.zeros(17, 32, device=kernel_device)
    with pytest.raises(QuasarError, match="--gamma 16: CUDA kernels take windows of 1 to 16 tokens"):
        linear.float_linear(x, torch.zeros(8, 32, device=kernel_device), None, torch.empty(17, 8, device=kernel_device))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_configs_suit_the_types(dtype):
    for config in (*linear.linear_configs(), *(linear.linear_config(out, dtype) for out in (256, 4096, 151936))):
        assert config.bytes_inside // dtype.itemsize >= 32  # the least that the instruction takes of int8
        assert 256 % config.outputs == 0  # prefetch_weights cuts 256 lines by outputs
