"""Matmuls of few rows: int8 bit for bit the reference's, floats by tolerance, rows the same in every batch."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar import QuasarError
from quasar.backends.base import Quantized, widest
from quasar.backends.reference import ReferenceBackend

pytest.importorskip("triton")
from quasar_gpu.kernels import linear, rows
from quasar_gpu.kernels.launch import WINDOW

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(tokens, inner, outputs, seed, device):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (tokens, inner), dtype=torch.int8, generator=g).to(device)
    weight = torch.randint(-128, 128, (outputs, inner), dtype=torch.int8, generator=g).to(device)
    scale, weight_scale = (torch.rand(n, generator=g).to(device) / 100 for n in (tokens, outputs))
    return values, scale, weight, weight_scale, torch.randn(outputs, generator=g).to(device)


def of_any_size(test: Callable[..., None]) -> Callable[..., None]:
    """Tokens, inputs, outputs, type, whether there is a bias, seed."""
    sizes = st.integers(1, 64), st.integers(1, 600), st.integers(1, 90)
    return settings(max_examples=12)(given(*sizes, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))(test))


@of_any_size
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


@of_any_size
def test_wide_inputs_are_the_references(tokens, inner, outputs, dtype, biased, seed):
    """Bit for bit: both digits' sums meet as integers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, _, weight, weight_scale, bias = operands(tokens, inner, outputs, seed, device)
    x = torch.randn(tokens, inner, generator=torch.Generator().manual_seed(seed)).to(dtype)
    reference = ReferenceBackend("cpu", dtype)
    reference.int8_matmul = lambda x, w: (x.long() @ w.long().t()).int()  # takes odd sizes
    want = reference.wide_int8_linear(x, (weight.cpu(), weight_scale.cpu()), bias.cpu() if biased else None)
    digits, scale = wide(x.to(device))
    out = torch.empty(tokens, outputs, dtype=dtype, device=device)
    linear.int8_linear(digits, scale, weight, weight_scale, bias if biased else None, out)
    assert torch.equal(out.cpu(), want)


def wide(x):
    digits, scale = torch.empty(2 * len(x), x.shape[1], dtype=torch.int8, device=x.device), torch.empty(len(x))
    rows.digits(x, digits, scale := scale.to(x.device))
    return digits, scale


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_widest_sums_are_exact(kernel_device, sign):
    """At a length where they just fit int32."""
    inner = 8400
    x = torch.full((3, inner), 1.0, device=kernel_device)
    digits, scale = wide(x)
    weights = torch.full((20, inner), 128 * sign if sign < 0 else 127, dtype=torch.int8, device=kernel_device)
    out = torch.empty(3, 20, device=kernel_device)
    linear.int8_linear(digits, torch.ones_like(scale), weights, torch.ones(20, device=kernel_device), None, out)
    largest = widest(inner)
    assert largest < 2039
    assert (out == float(torch.tensor(inner * largest * weights[0, 0].item(), dtype=torch.float32))).all()
    assert inner * largest * 128 < 2**31 < inner * (largest + 2) * 128


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


@pytest.mark.parametrize("outputs", [40, 16384])  # both families of cuts
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, "digits"])
def test_a_row_does_not_depend_on_its_batch(kernel_device, monkeypatch, dtype, outputs):
    """One, two and four tiles of rows; eight of digits."""
    monkeypatch.setattr(linear, "_MANY", 41 if outputs == 40 else 40)
    values, scale, weight, weight_scale, bias = operands(64, 300, 40, 1, kernel_device)

    def run(take):
        out = torch.empty(len(values[take]), 40, device=kernel_device)
        if dtype == "digits":
            linear.int8_linear(*wide(values[take] / 100), weight, weight_scale, bias, out)
        elif dtype == torch.int8:
            linear.int8_linear(values[take], scale[take], weight, weight_scale, bias, out)
        else:
            linear.float_linear((values[take] / 100).to(dtype), (weight / 100).to(dtype), None, out)
        return out

    batch = run(slice(0, 64))
    for part in (slice(2, 8), slice(0, 20), slice(30, 64), slice(0, 1), slice(47, 48), slice(63, 64)):
        assert torch.equal(run(part), batch[part])


def test_more_rows_are_refused(kernel_device):
    x, out = torch.zeros(65, 32, device=kernel_device), torch.empty(65, 8, device=kernel_device)
    weight, ones = torch.zeros(8, 32, device=kernel_device), torch.ones(65, device=kernel_device)
    with pytest.raises(QuasarError, match=r"a pass of 65 rows: CUDA kernels .* take 1 to 64"):
        linear.float_linear(x, weight, None, out)
    with pytest.raises(QuasarError, match=r"a pass of 65 rows: CUDA kernels .* take 1 to 64"):
        linear.int8_linear(*wide(x), weight.to(torch.int8), ones[:8], None, out)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_configs_suit_the_types(dtype):
    all_tiles = (1, 2, 4, 8) if dtype == torch.int8 else (1, 2, 4)
    cuts = [linear.linear_config(out, dtype, tiles) for out in (256, 4096, 151936) for tiles in all_tiles]
    for config in (*linear.linear_configs(), *cuts):
        assert config.bytes_inside // dtype.itemsize >= 32  # the least that the instruction takes of int8
        assert 128 % config.outputs == 0  # prefetch_weights cuts 128 requests by outputs
        assert config.outputs * WINDOW // (16 * 8) >= config.warps or config.outputs >= 64  # a tile for every warp


def test_a_weights_cuts_differ_in_nothing_that_orders_sums():
    for outputs in (4096, 151936):
        cuts = [linear.linear_config(outputs, torch.bfloat16, tiles) for tiles in (1, 2, 4)]
        assert len({config.bytes_inside for config in cuts}) == 1
        assert len({config.outputs >= 64 for config in cuts}) == 1  # wgmma or mma


# What is fused into their end.


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inter"), [(3, 21), (18, 40)])
def test_swiglu_at_the_end_is_swiglu_after_it(kernel_device, dtype, tokens, inter, digits):
    values, scale, weight, weight_scale, bias = operands(tokens, 70, 2 * inter, 0, kernel_device)
    if digits:
        values, scale = wide(values.float() / 100)
    peaks = torch.zeros(tokens, dtype=torch.int32, device=kernel_device)
    gate_up = torch.empty(tokens, 2 * inter, dtype=dtype, device=kernel_device)
    want, out = (torch.empty(tokens, inter, dtype=dtype, device=kernel_device) for _ in range(2))
    linear.int8_linear(values, scale, weight, weight_scale, bias, gate_up)
    rows.swiglu(gate_up, want)
    linear.int8_linear(values, scale, weight, weight_scale, bias, out, epilogue=linear.SwiGLU(peaks))
    assert torch.equal(out, want)
    assert torch.equal(peaks.view(torch.float32), want.abs().amax(dim=1).float())
    quantized = [torch.empty_like(out, dtype=torch.int8) for _ in range(2)]
    scales = [torch.empty(tokens, device=kernel_device) for _ in range(2)]
    rows.quantize(want, quantized[0], scales[0])
    rows.quantize_by_peak(out, peaks, quantized[1], scales[1])
    assert torch.equal(*quantized)
    assert torch.equal(*scales)


def test_the_best_token_is_the_first_of_equals(kernel_device):
    weight = torch.zeros(70, 32, device=kernel_device)
    weight[:, 0] = torch.arange(70) % 23
    weight[5, 0] = weight[69, 0] = 40
    x = torch.zeros(5, 32, device=kernel_device)
    x[:, 0] = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0])
    keys = torch.full((64,), linear.LEAST_KEY, device=kernel_device)
    out = torch.empty(5, 70, device=kernel_device)
    linear.float_linear(x, weight, None, out, epilogue=linear.Best(keys))
    assert linear.best_tokens(keys[:5]).tolist() == [5, 0, 0, 0, 5]
    assert torch.equal(linear.best_tokens(keys[:5]), out.argmax(dim=-1))
    assert (keys[5:] == linear.LEAST_KEY).all()
