"""int4 matmuls of a window and the rotation: float64's numbers, exact sums of groups, rows the same in every window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quasar.backends.reference import ReferenceBackend
from quasar.quantization.rotation import hadamard

pytest.importorskip("triton")
from quasar_gpu.kernels import int4, rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (32, 64, 128)


def random_weight(outputs, groups, group, seed, device, zeros=False):
    """What pack_int4 made, with zero points or symmetric, and what it stands for in float64."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (outputs, groups * group), generator=g, dtype=torch.int8)
    scale = (torch.rand(outputs, groups, generator=g) + 0.1).bfloat16()
    dense = values.double() * scale.double().repeat_interleave(group, 1)
    offset = None
    if zeros:
        offset = torch.randn(outputs, groups, generator=g).bfloat16()
        dense += offset.double().repeat_interleave(group, 1)
        offset = offset.to(device)
    return int4.pack_int4(values.to(device), scale.to(device), offset), dense


def product(x, scale, weight, bias=None, dtype=torch.float32):
    out = torch.empty(len(x), len(weight.values), dtype=dtype, device=x.device)
    int4.int4_linear(x, scale, weight, bias, out)
    return out


@settings(max_examples=20)
@given(
    st.integers(1, 20),  # 17 and more run in the tall tile
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from(GROUPS),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_both_products_are_those_of_the_integers(tokens, groups, outputs, group, dtype, biased, zeros, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, dense = random_weight(outputs, groups, group, seed, device, zeros)
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(outputs, generator=g).to(device) if biased else None
    offset = bias.cpu().double() if biased else 0
    x = torch.randn(tokens, groups * group, generator=g).to(dtype).to(device)
    expected = x.cpu().double() @ dense.t() + offset
    near = {"rtol": 1e-5, "atol": 1e-6 * dense.shape[1]}
    torch.testing.assert_close(product(x, None, weight, bias).cpu().double(), expected, **near)
    eps = torch.finfo(dtype).eps
    rounded = product(x, None, weight, bias, dtype).cpu().double()
    torch.testing.assert_close(rounded, expected, rtol=max(eps, 1e-5), atol=near["atol"])
    integers = torch.randint(-7, 8, x.shape, generator=g, dtype=torch.int8).to(device)
    scale = torch.rand(tokens, generator=g).to(device)
    expected = integers.cpu().double() @ dense.t() * scale.cpu().double()[:, None] + offset
    torch.testing.assert_close(product(integers, scale, weight, bias).cpu().double(), expected, **near)


@pytest.mark.parametrize(("weight", "x"), [(-8, 7), (-8, -7), (7, 7), (7, -7), (0, 7), (-8, -127), (7, 127)])
def test_extreme_sums_are_exact(kernel_device, weight, x):
    values = torch.full((20, 640), weight, dtype=torch.int8, device=kernel_device)
    packed = int4.pack_int4(values, torch.ones(20, 5, dtype=torch.bfloat16, device=kernel_device))
    tokens = torch.full((3, 640), x, dtype=torch.int8, device=kernel_device)
    assert (product(tokens, torch.ones(3, device=kernel_device), packed) == 640 * weight * x).all()
    for dtype in DTYPES:
        assert (product(tokens.to(dtype), None, packed) == 640 * weight * x).all()


@pytest.mark.parametrize("zeros", [False, True])
def test_every_nibble_meets_its_input(kernel_device, zeros):
    """One input at a time gives one column of the weights, whichever half of a byte it lies in."""
    weight, dense = random_weight(16, 3, 32, 0, kernel_device, zeros)
    columns = product(torch.eye(96, device=kernel_device), None, weight)
    if zeros:  # a product and an offset are added, which rounds
        torch.testing.assert_close(columns.cpu().double(), dense.t(), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(columns.cpu().double(), dense.t())


@pytest.mark.parametrize(("weight", "x"), [(-8, 7), (7, -7), (0, -7)])
def test_offsets_meet_exact_sums_of_inputs(kernel_device, weight, x):
    values = torch.full((20, 640), weight, dtype=torch.int8, device=kernel_device)
    ones = torch.ones(20, 5, dtype=torch.bfloat16, device=kernel_device)
    packed = int4.pack_int4(values, ones, -3 * ones)
    tokens = torch.full((3, 640), x, dtype=torch.int8, device=kernel_device)
    assert (product(tokens, torch.ones(3, device=kernel_device), packed) == 640 * (weight - 3) * x).all()
    for dtype in DTYPES:
        assert (product(tokens.to(dtype), None, packed) == 640 * (weight - 3) * x).all()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_row_does_not_depend_on_its_window(kernel_device, dtype, zeros):
    weight, _ = random_weight(40, 3, 64, 1, kernel_device, zeros)
    x = torch.randn(70, 192, generator=torch.Generator().manual_seed(2))
    x = ((x * 3).round().clamp(-7, 7) if dtype == torch.int8 else x).to(dtype).to(kernel_device)
    scale = torch.rand(70, device=kernel_device) if dtype == torch.int8 else None

    def run(take):
        return product(x[take], None if scale is None else scale[take], weight)

    window = run(slice(0, 16))  # the tiles have 8, 16 and 64 rows
    assert torch.equal(run(slice(2, 8)), window[2:8])
    tall = run(slice(0, 70))
    assert torch.equal(tall[:16], window)
    assert torch.equal(run(slice(60, 70)), tall[60:])
    for i in (0, 7, 15):
        assert torch.equal(run(slice(i, i + 1))[0], window[i])


def test_other_groups_are_refused():
    with pytest.raises(ValueError, match="36 inputs in 3 groups; a group has 32, 64 or 128"):
        int4.pack_int4(torch.zeros(4, 36, dtype=torch.int8), torch.ones(4, 3).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.float32, 2), (torch.float32, 128), (torch.bfloat16, 1), (torch.bfloat16, 128), (torch.float16, 1024)],
)
def test_rotation_is_the_product_with_the_matrix(kernel_device, dtype, block):
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(block)).to(dtype)
    matrix = hadamard(block).to(dtype)
    out = torch.empty_like(x, device=kernel_device)
    int4.rotate(x.to(kernel_device), matrix.to(kernel_device), out)
    expected = (x.double().view(3, -1, block) @ matrix.double()).flatten(1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), expected, rtol=eps, atol=2e-6)
    alone = torch.empty_like(out[1:2])
    int4.rotate(x[1:2].to(kernel_device), matrix.to(kernel_device), alone)
    assert torch.equal(alone[0], out[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_activations_are_the_references(kernel_device, dtype):
    x = torch.randn(4, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[2] = -3e4
    x[3, :6] = torch.tensor([7, 0.5, 1.5, 2.5, -0.5, -6.5], dtype=dtype)  # scale 1: ties to even
    x[3, 6:] = 0
    want = ReferenceBackend("cpu", dtype).quantize_int4(x)
    values, scale = torch.empty_like(x, dtype=torch.int8, device=kernel_device), torch.empty(4, device=kernel_device)
    rows.quantize(x.to(kernel_device), values, scale, rows.INT4)
    assert torch.equal(values.cpu(), want.values)
    assert torch.equal(scale.cpu(), want.scale)
    assert values[3, :6].tolist() == [7, 0, 2, 2, 0, -6]


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
@pytest.mark.parametrize("outputs", [1024, 4096, 24576])
def test_a_warp_for_each_16_outputs(rows, outputs):
    """With more, Triton has several warps unpack the same weights."""
    config = int4.int4_config(rows, outputs, 128, torch.bfloat16)
    assert config.outputs == 16 * config.warps
    assert rows <= config.rows <= 16
    integers = int4.int4_config(rows, outputs, 128, torch.int8)
    assert integers.outputs == 16 * integers.warps
