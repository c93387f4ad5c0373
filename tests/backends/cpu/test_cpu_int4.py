"""The int4 kernels against the integers they stand for and the reference backend; Hadamard against the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quasar.backends.base import Quantized
from quasar.backends.cpu import kernels
from quasar.backends.cpu.backend import CpuBackend
from quasar.backends.reference import ReferenceBackend
from quasar.quantization.rotation import hadamard

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(1, 70), st.sampled_from([8, 32, 64, 128]))


@pytest.fixture(params=kernels.instruction_sets(), autouse=True, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with every instruction set of this processor, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with kernels.use_instruction_set(request.param):
        yield request.param
    torch.set_num_threads(before)


def random_weight(outputs: int, groups: int, group: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """values, scale, and what they stand for in float64."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (outputs, groups * group), generator=g, dtype=torch.int8)
    scale = (torch.rand(outputs, groups, generator=g) + 0.1).bfloat16()
    return values, scale, values.double() * scale.double().repeat_interleave(group, 1)


def rounded(x: Tensor, group: int) -> Tensor:
    """What W4A16 multiplies, in float64: integers of 14 bits times a power of two for each group."""
    groups = x.double().view(len(x), -1, group)
    step = 2.0 ** (torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 13)
    return ((groups / step).round() * step).flatten(1)


@settings(max_examples=40)
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_both_products_are_those_of_the_integers(shape, with_bias, with_offset, seed):
    tokens, groups, outputs, group = shape
    values, scale, dense = random_weight(outputs, groups, group, seed)
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(outputs, generator=g) if with_bias else None
    added = bias.double() if with_bias else 0
    offset = torch.randn(outputs, groups, generator=g).bfloat16() if with_offset else None
    if offset is not None:
        dense = dense + offset.double().repeat_interleave(group, 1)
    x = torch.randn(tokens, groups * group, generator=g)
    packed = kernels.PackedInt4(values, scale, offset)
    expected = rounded(x, group) @ dense.t() + added
    torch.testing.assert_close(kernels.int4_linear(x, packed, bias).double(), expected, rtol=1e-5, atol=1e-3)
    integers = torch.randint(-7, 8, x.shape, generator=g, dtype=torch.int8)
    row_scale = torch.rand(tokens, generator=g)
    expected = integers.double() @ dense.t() * row_scale.double()[:, None] + added
    y = kernels.int4_linear((integers, row_scale), packed, bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("weight", "x"), [(-8, 7), (-8, -7), (7, 7), (7, -7), (0, 7)])
@pytest.mark.parametrize("groups", [1, 8])
def test_sums_of_a_group_are_exact_at_the_extremes(weight, x, groups):
    """A group of 1024 too, which is more than 16 bits hold."""
    packed = kernels.PackedInt4(torch.full((5, 1024), weight, dtype=torch.int8), torch.ones(5, groups).bfloat16())
    for tokens in (1, 3, 6, 8, 16, 33):
        y = kernels.int4_linear((torch.full((tokens, 1024), x, dtype=torch.int8), torch.ones(tokens)), packed)
        assert y.tolist() == [[1024.0 * weight * x] * 5] * tokens
        y = kernels.int4_linear(torch.full((tokens, 1024), float(x)), packed)
        assert y.tolist() == [[1024.0 * weight * x] * 5] * tokens


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("weight", "x"), [(-8, 8191.0), (-8, -8191.0), (7, 8191.0), (7, -8191.0)])
def test_sums_of_the_largest_inputs_are_exact(group, weight, x):
    """8191 is the largest integer of 14 bits: both digits are at their ends, and so are the sums of a group."""
    packed = kernels.PackedInt4(torch.full((40, 3 * group), weight, dtype=torch.int8), torch.ones(40, 3).bfloat16())
    for tokens in (1, 2, 6, 16, 17):
        y = kernels.int4_linear(torch.full((tokens, 3 * group), x), packed)
        assert y.tolist() == [[float(3 * group * weight * x)] * 40] * tokens


@pytest.mark.parametrize("tokens", [7, 20])
def test_a_nan_stays_in_its_row(tokens):
    values, scale, _ = random_weight(40, 2, 64, 5)
    packed, x = kernels.PackedInt4(values, scale, scale), torch.randn(tokens, 128)
    x[3, 5], x[4, 70] = torch.nan, torch.inf
    y = kernels.int4_linear(x, packed)
    assert y[3:5].isnan().all()
    assert y[:3].isfinite().all() and y[5:].isfinite().all()


@pytest.mark.parametrize("group", [8, 32, 64, 128, 512])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("has_offset", [False, True])
def test_a_row_does_not_depend_on_its_company(group, quantized, has_offset):
    """Whichever number of rows another kernel begins at; the inputs are no multiple of 64 where groups are 32."""
    values, scale, _ = random_weight(130, 3, group, 1)
    offset = torch.randn(scale.shape, generator=torch.Generator().manual_seed(3)).bfloat16() if has_offset else None
    packed, backend = kernels.PackedInt4(values, scale, offset), CpuBackend()
    x = torch.randn(70, 3 * group, generator=torch.Generator().manual_seed(2))

    def product(rows: Tensor) -> Tensor:
        return backend.int4_linear(backend.quantize_int4(rows) if quantized else rows, packed, None)

    alone = torch.cat([product(row) for row in x.split(1)])
    for tokens in range(1, 71):
        assert torch.equal(product(x[:tokens].contiguous()), alone[:tokens])


def test_backends_agree():
    values, scale, _ = random_weight(64, 2, 128, 3)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(4))
    fast, reference = CpuBackend(), ReferenceBackend()
    q = fast.quantize_int4(x)
    assert torch.equal(q.values, reference.quantize_int4(x).values)
    assert torch.equal(q.scale, reference.quantize_int4(x).scale)
    for given_x in (x, Quantized(q.values, q.scale)):
        y = fast.int4_linear(given_x, fast.int4_weight(values, scale, scale / 4), None)
        expected = reference.int4_linear(given_x, reference.int4_weight(values, scale, scale / 4), None)
        assert (y - expected).norm() < 0.005 * expected.norm()  # PyTorch's kernel rounds its result to bfloat16


def test_groups_that_no_kernel_takes_are_refused():
    with pytest.raises(ValueError, match="3 groups of 36 inputs"):
        kernels.PackedInt4(torch.zeros(4, 36, dtype=torch.int8), torch.ones(4, 3).bfloat16())


@pytest.mark.parametrize("block", [1, 2, 8, 16, 32, 128, 512])
def test_hadamard_is_the_product_with_the_matrix(block):
    x = torch.randn(5, 1536, generator=torch.Generator().manual_seed(block))
    expected = (x.view(5, -1, block).double() @ hadamard(block).double()).flatten(1)
    torch.testing.assert_close(kernels.hadamard(x, block).double(), expected, rtol=1e-5, atol=1e-5)


def test_hadamard_of_other_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks of 96 of 192"):
        kernels.hadamard(torch.zeros(1, 192), 96)
