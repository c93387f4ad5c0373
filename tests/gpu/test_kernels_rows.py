"""Kernels that handle a row in one program, against the reference backend."""

import pytest
import torch

from quasar.backends.base import ActivationQuant
from quasar.backends.reference import ReferenceBackend

pytest.importorskip("triton")
from quasar_gpu.kernels import rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN = ActivationQuant()


def random(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def quantized_like(x):
    return torch.empty_like(x, dtype=torch.int8), torch.empty(len(x), device=x.device)


def close(got, want, places=1):
    """Within some units in the last place of the type."""
    assert got.dtype == want.dtype
    tolerance = places * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=tolerance, atol=tolerance)


def same_values(values, scale, want, dtype):
    """A value may round to the neighbour where its float differs in the last place; most are equal."""
    off = (values.cpu().int() - want.values.int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.02
    torch.testing.assert_close(scale.cpu(), want.scale, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [37, 1200])
def test_add_rms_norm(kernel_device, dtype, hidden):
    reference = ReferenceBackend("cpu", dtype)
    x, residual = (random(3, hidden, dtype=dtype, device=kernel_device, seed=seed) for seed in (1, 2))
    weight = random(hidden, dtype=dtype, device=kernel_device, seed=3)
    want, want_total = reference.add_rms_norm(x.cpu(), residual.cpu(), weight.cpu(), 1e-6, None)
    total, out = torch.empty_like(x), torch.empty_like(x)
    rows.add_rms_norm(x, residual, weight, 1e-6, total, out)
    assert torch.equal(total.cpu(), want_total)
    close(out, want, places=2)

    values, scale = quantized_like(x)
    stream = residual.clone()
    rows.add_rms_norm_quantize(x, stream, weight, 1e-6, stream, values, scale)  # in place
    assert torch.equal(stream, total)
    same_values(values, scale, reference.quantize(want, TOKEN), dtype)


def test_without_residual_the_total_is_left_alone(kernel_device):
    x, weight = random(2, 19, dtype=torch.float32, device=kernel_device), torch.ones(19, device=kernel_device)
    total, out = torch.full_like(x, 7.0), torch.empty_like(x)
    rows.add_rms_norm(x, None, weight, 1e-5, total, out)
    assert (total == 7).all()
    close(out, ReferenceBackend().add_rms_norm(x.cpu(), None, weight.cpu(), 1e-5, None)[0], places=2)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; infinity is what is wanted there
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(kernel_device, dtype):
    reference = ReferenceBackend("cpu", dtype)
    gate_up = random(3, 2 * 333, dtype=dtype, device=kernel_device) * 4
    gate_up[0, :3] = torch.tensor([-100.0, 0.0, 60.0], dtype=dtype)
    out = torch.empty(3, 333, dtype=dtype, device=kernel_device)
    rows.swiglu(gate_up, out)
    want = reference.swiglu(gate_up.cpu(), None)
    close(out, want, places=4)
    values, scale = quantized_like(out)
    rows.swiglu_quantize(gate_up, values, scale)
    same_values(values, scale, reference.quantize(want, TOKEN), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_references(kernel_device, dtype):
    x = random(5, 130, dtype=dtype, device=kernel_device)
    x[1] = 0
    x[2] = -3e4
    x[3, :8] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 125.5], dtype=dtype)  # scale 1: ties to even
    x[4] *= 1e-4
    values, scale = quantized_like(x)
    rows.quantize(x, values, scale)
    want = ReferenceBackend("cpu", dtype).quantize(x.cpu(), TOKEN)
    assert torch.equal(values.cpu(), want.values)
    assert torch.equal(scale.cpu(), want.scale)
    assert scale[1] == 1
    assert values[3, :8].tolist() == [127, 0, 2, 2, 0, -2, -126, 126]


@pytest.mark.parametrize("size", [130, 9000])  # 9000: smaller integers, or sums would overflow
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_digits_are_the_references(kernel_device, dtype, size):
    x = random(5, size, dtype=dtype, device=kernel_device)
    x[1] = 0
    x[2, 0] = 3e4
    x[3, :2] = torch.tensor([-2039, 7.5], dtype=dtype)  # scale 1 and the widest integer there is, and a tie
    want = ReferenceBackend("cpu", dtype).digits(x.cpu())
    peaks = x.abs().amax(dim=1).float().view(torch.int32)
    for quantise in (rows.digits, lambda x, *out: rows.quantize_by_peak(x, peaks, *out)):
        values = torch.empty(10, size, dtype=torch.int8, device=kernel_device)
        scale = torch.empty(5, device=kernel_device)
        quantise(x, values, scale)
        assert torch.equal(values.cpu(), want.values)
        assert torch.equal(scale.cpu(), want.scale[5:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_made_by_what_comes_before(kernel_device, dtype):
    """Norm and SwiGLU write those of what they would have written."""
    x, residual = (random(3, 200, dtype=dtype, device=kernel_device, seed=seed) for seed in (1, 2))
    weight = random(200, dtype=dtype, device=kernel_device, seed=3)

    def run(kernel):
        values, scale = torch.empty(6, 200, dtype=torch.int8, device=kernel_device), torch.empty(3).to(kernel_device)
        kernel(values, scale)
        return values, scale

    total, out = torch.empty_like(x), torch.empty_like(x)
    rows.add_rms_norm(x, residual, weight, 1e-6, total, out)
    found = run(lambda *into: rows.add_rms_norm_quantize(x, residual, weight, 1e-6, total, *into))
    assert all(map(torch.equal, found, run(lambda *into: rows.digits(out, *into))))
    gate_up = random(3, 400, dtype=dtype, device=kernel_device)
    rows.swiglu(gate_up, out)
    found = run(lambda *into: rows.swiglu_quantize(gate_up, *into))
    assert all(map(torch.equal, found, run(lambda *into: rows.digits(out, *into))))


def test_embed(kernel_device):
    table = random(11, 1030, dtype=torch.bfloat16, device=kernel_device)
    ids = torch.tensor([3, 0, 10, 3], device=kernel_device)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(4, 1030, dtype=dtype, device=kernel_device)
        rows.embed(table, ids, out)
        assert torch.equal(out, table[ids].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_window(kernel_device, dtype):
    x, residual, weight = (random(n, 70, dtype=dtype, device=kernel_device, seed=n) for n in (5, 5, 1))
    gate_up = random(5, 140, dtype=dtype, device=kernel_device)

    def run(take):
        total, out = torch.empty_like(x[take]), torch.empty_like(x[take])
        (values, scale), (more_values, more_scale) = quantized_like(out), quantized_like(out)
        rows.add_rms_norm(x[take], residual[take], weight[0], 1e-6, total, out)
        rows.add_rms_norm_quantize(x[take], residual[take], weight[0], 1e-6, total, values, scale)
        rows.swiglu_quantize(gate_up[take], more_values, more_scale)
        return total, out, values, scale, more_values, more_scale

    window = run(slice(0, 5))
    for i in range(5):
        for one, among in zip(run(slice(i, i + 1)), window, strict=True):
            assert torch.equal(one[0], among[i])


def test_scattered_tensors_are_refused(kernel_device):
    x = torch.zeros(6, 4, device=kernel_device).t()
    with pytest.raises(ValueError, match="_quantize: every tensor has to be contiguous"):
        rows.quantize(x, *quantized_like(x.contiguous()))
