"""The C kernels: exact on integers, close on floats, and a row's result whatever stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quasar.backends.cpu import kernels

pytestmark = pytest.mark.skipif(
    not kernels.available(),
    reason="the C kernels are not built (pip install -e . builds them where there is a C compiler)",
)

SHAPES = st.tuples(st.integers(1, 17), st.integers(1, 100), st.integers(1, 150))  # m, n, k
few = settings(max_examples=15)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(params=kernels.instruction_sets(), autouse=True, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with every instruction set of this processor, plain C among them.

    On one thread unless it asks for more: a team of spinning threads takes long on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with kernels.use_instruction_set(request.param):
        yield request.param
    torch.set_num_threads(before)


def random_int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return (x.long() @ weight.long().T).int()


def packed_int8(weight: Tensor) -> kernels.PackedInt8:
    return kernels.PackedInt8(weight, torch.ones(weight.shape[0]))


def int8_sums(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.int8_linear(x, torch.ones(len(x)), packed_int8(weight))


# Linear layers


@few
@given(SHAPES, st.integers(0, 2**31))
def test_int8_sums_are_exact(shape: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    m, n, k = shape
    x, weight = random_int8(m, k), random_int8(n, k)
    assert torch.equal(int8_sums(x, weight), exact(x, weight).float())


@pytest.mark.parametrize("k", [1, 3, 4, 64, 1023, 3072])
@pytest.mark.parametrize("extremes", [(-128, -128), (-128, 127), (127, -128), (127, 127), (0, -128)])
def test_int8_sums_are_exact_at_the_extremes(extremes: tuple[int, int], k: int) -> None:
    x = torch.full((3, k), extremes[0], dtype=torch.int8)
    weight = torch.full((33, k), extremes[1], dtype=torch.int8)
    assert torch.equal(int8_sums(x, weight), exact(x, weight).float())


@pytest.mark.parametrize("m", [1, 9])
def test_int8_sums_that_wrap_on_the_way_come_back(m: int) -> None:
    """255 * 127 * 70016 passes 2^31 before the shift is undone."""
    x = torch.full((m, 70016), 127, dtype=torch.int8)
    weight = torch.full((2, 70016), 127, dtype=torch.int8)
    assert torch.equal(int8_sums(x, weight), exact(x, weight).float())


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("m", [1, 6, 7, 9, 16, 17, 33, 64, 65, 97])
def test_int8_sums_of_every_tile(m: int, value: int) -> None:
    """Rows of one tile, of several, of more than a panel; inputs of one chunk, of several, and that no tile takes."""
    for n, k in ((70, 64), (33, 576), (64, 1600), (16, 4160), (40, 516)):
        x, weight = random_int8(m, k), random_int8(n, k)
        x[-1], weight[-1] = value, -128
        assert torch.equal(int8_sums(x, weight), exact(x, weight).float())
        linear = kernels.int8_linear(x, torch.rand(m), kernels.PackedInt8(weight, torch.rand(n)), torch.randn(n))
        assert linear.isfinite().all()


def test_a_weight_of_another_instruction_set_is_refused(instruction_set: str) -> None:
    weight = packed_int8(random_int8(32, 64))
    other = next((name for name in kernels.instruction_sets() if name != instruction_set), None)
    if other is None:
        pytest.skip("this processor has one instruction set")
    with kernels.use_instruction_set(other), pytest.raises(ValueError, match=f"packed for {instruction_set}"):
        kernels.int8_linear(random_int8(1, 64), torch.ones(1), weight)


@few
@given(SHAPES, st.booleans())
def test_int8_linear_has_the_bits_of_plain_torch(shape: tuple[int, int, int], with_bias: bool) -> None:
    m, n, k = shape
    x, weight = random_int8(m, k), random_int8(n, k)
    x_scale, scale, bias = torch.rand(m), torch.rand(n), torch.randn(n) if with_bias else None
    expected = exact(x, weight).float() * x_scale[:, None] * scale
    if bias is not None:
        expected = expected + bias
    assert torch.equal(kernels.int8_linear(x, x_scale, kernels.PackedInt8(weight, scale), bias), expected)


FLOAT_PRODUCTS = ("float32", "bf16 weights", "bf16")


def float_product(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result, and in float64 the operands that it multiplied."""
    if kind == "float32":
        return kernels.float_linear(x, kernels.PackedFloat32(weight), bias), x.double(), weight.double()
    weight = weight.bfloat16()
    packed = kernels.PackedBf16(weight)
    if kind == "bf16":
        return kernels.bf16_linear(x, packed, bias), x.bfloat16().double(), weight.double()
    return kernels.float_linear(x, packed, bias), x.double(), weight.double()


@few
@given(SHAPES, st.sampled_from(FLOAT_PRODUCTS), st.booleans())
def test_float_linear_is_close_to_float64(shape: tuple[int, int, int], kind: str, with_bias: bool) -> None:
    """Tolerance: 256 roundings of the absolute sum, the worst a chain of 256 can do."""
    m, n, k = shape
    bias = torch.randn(n) if with_bias else None
    out, x, weight = float_product(kind, torch.randn(m, k), torch.randn(n, k), bias)
    expected = F.linear(x, weight, None if bias is None else bias.double())
    bound = F.linear(x.abs(), weight.abs()) + (0 if bias is None else bias.double().abs())
    assert ((out - expected).abs() <= 256 * 2**-24 * bound).all()


@pytest.mark.parametrize("kind", FLOAT_PRODUCTS)
def test_long_float_sums_stay_close(kind: str) -> None:
    """More rows than a panel, several chunks of inputs, an odd last one; to 1e-6 of the norm."""
    out, x, weight = float_product(kind, torch.randn(150, 1001), torch.randn(40, 1001))
    expected = x @ weight.T
    assert (out - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", FLOAT_PRODUCTS)
@pytest.mark.parametrize("m", [1, 3, 5, 6, 16, 40])
def test_float_rows_alone_and_together(kind: str, m: int) -> None:
    """Inputs in whole tiles of the tile unit and not; huge numbers, subnormal ones, an infinity in one row."""
    for k in (64, 1600, 2080, 1000):
        x, weight, bias = torch.randn(m, k), torch.randn(70, k), torch.randn(70)
        x[0, :3] = torch.tensor([1e36, -1e36, 1e-40])
        weight[:, :2] = weight[:, :1].clone()  # which cancels the huge ones
        if m > 1:
            x[1, 5] = math.inf
        out, exact_x, exact_weight = float_product(kind, x, weight, bias)
        expected = F.linear(exact_x, exact_weight, bias.double())
        bound = F.linear(exact_x.abs(), exact_weight.abs()) + bias.double().abs()
        rows = [row for row in range(m) if row != 1]
        assert ((out - expected)[rows].abs() <= 256 * 2**-24 * bound[rows]).all()
        for row in range(m):
            alone, _, _ = float_product(kind, x[row : row + 1].contiguous(), weight, bias)
            assert torch.equal(alone[0].nan_to_num(7.0), out[row].nan_to_num(7.0))
        if m > 1:
            assert not out[1].isfinite().any()


@pytest.mark.parametrize("kind", FLOAT_PRODUCTS)
@pytest.mark.parametrize("k", [1, 15, 257])
def test_an_odd_row_ends_where_it_ends(kind: str, k: int) -> None:
    """Its last pair of inputs does not reach into the next row, whose NaN would show."""
    x = torch.randn(2, k)
    x[1] = math.nan
    out, _, _ = float_product(kind, x, torch.randn(3, k))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_inputs_are_rounded_half_to_even() -> None:
    one_and = torch.tensor([0.0, 2**-9, 2**-8, 3 * 2**-8, 2**-8 + 2**-20, 2**-7])
    x = torch.cat(
        [1 + one_and, -1 - one_and, torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 0.0]), torch.randn(99)]
    )
    out = kernels.bf16_linear(x[:, None], kernels.PackedBf16(torch.ones(1, 1).bfloat16()))
    assert torch.equal(out[:, 0].nan_to_num(7.0), x.bfloat16().float().nan_to_num(7.0))


# Row-wise kernels


@few
@given(st.integers(1, 9), st.integers(1, 130), st.floats(-30, 30))
def test_quantize_has_the_bits_of_plain_torch(m: int, k: int, exponent: float) -> None:
    x = torch.randn(m, k) * 10.0**exponent
    q, scale = kernels.quantize_per_token(x)
    expected = (x.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, expected)
    assert torch.equal(q, (x / expected[:, None]).round().to(torch.int8))


@few
@given(st.integers(1, 9), st.integers(1, 130), st.floats(-3, 3))
def test_quantize_by_a_static_scale_clips(m: int, k: int, exponent: float) -> None:
    x, scale = torch.randn(m, k) * 10**exponent, torch.tensor([0.01])
    q, scales = kernels.quantize_static(x, scale)
    assert torch.equal(q, (x / scale).round().clamp(-128, 127).to(torch.int8))
    assert torch.equal(scales, scale.expand(m))


def test_quantize_ties_zero_rows_and_nan() -> None:
    ties = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, -127.0]])
    assert kernels.quantize_per_token(ties)[0].tolist() == [[127, 0, 2, 0, -2, -127]]
    q, scale = kernels.quantize_per_token(torch.zeros(2, 20))
    assert not q.any()
    assert (scale > 0).all()
    assert kernels.quantize_per_token(torch.tensor([[1.0, math.nan, 2.0]]))[1].isnan().all()
    assert kernels.quantize_per_token(torch.tensor([[1.0, math.inf, 2.0]]))[1].isinf().all()


@few
@given(st.integers(1, 9), st.integers(1, 300), st.booleans())
def test_add_rms_norm(m: int, k: int, with_residual: bool) -> None:
    """To 1e-6 of the result's size; the sum x + residual to the bit."""
    x, weight = torch.randn(m, k), torch.randn(k)
    residual = torch.randn(m, k) if with_residual else None
    total = x + residual if residual is not None else x.clone()
    y = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(x, total)
    expected = total.double() * torch.rsqrt(total.double().pow(2).mean(1, keepdim=True) + 1e-6) * weight
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-30)
    q, scale = kernels.add_rms_norm_quantize(total.clone(), None, weight, 1e-6)
    assert all(map(torch.equal, (q, scale), kernels.quantize_per_token(y)))


@few
@given(st.integers(1, 9), st.integers(1, 300))
def test_swiglu(m: int, k: int) -> None:
    x = torch.randn(m, 2 * k) * 5
    y = kernels.swiglu(x)
    expected = F.silu(x[:, :k].double()) * x[:, k:]
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-30)
    assert all(map(torch.equal, kernels.swiglu_quantize(x), kernels.quantize_per_token(y)))


def test_swiglu_of_large_gates() -> None:
    gates = torch.tensor([[-1e30, -200.0, 200.0, 1e30, 0.0, -0.0]])
    y = kernels.swiglu(torch.cat([gates, torch.ones_like(gates)], dim=1))
    assert torch.allclose(y, torch.tensor([[0.0, 0.0, 200.0, 1e30, 0.0, 0.0]]), atol=1e-6)
    assert kernels.swiglu(torch.tensor([[math.nan, 1.0]])).isnan().all()


def test_exp_is_within_two_ulp() -> None:
    x = torch.linspace(-87, 88, 400_001)
    y = torch.empty_like(x)
    kernels._kernels.exp(x.data_ptr(), y.data_ptr(), x.numel())
    expected = x.double().exp()
    ulp = 2.0 ** (expected.log2().floor() - 23)
    assert ((y - expected).abs() / ulp).max() < 2


def test_argmax_takes_the_lowest_index() -> None:
    x = torch.randn(7, 4099)
    assert torch.equal(kernels.argmax(x), x.argmax(1))
    tied = x.round()
    assert kernels.argmax(tied).tolist() == [row.index(max(row)) for row in tied.tolist()]
    assert kernels.argmax(torch.full((2, 37), -math.inf)).tolist() == [0, 0]
    x[2, 100] = x[2, 4098] = math.nan
    assert kernels.argmax(x)[2] == 100


# Rotary embedding and attention


def tables(positions: int, dim: int, whole: bool) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], 1) if whole else angles
    return angles.cos(), angles.sin()


class Sequence:
    """One slot of one layer, and the kernels over it alone."""

    def __init__(self, heads: int, kv_heads: int, dim: int, capacity: int) -> None:
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim = dim
        self.memory = kernels.SlotMemory(1, kv_heads, capacity, dim)
        self.length = 0

    def table(self, rows: int) -> kernels.Segments:
        segments = kernels.Segments(rows)
        segments.fill([(self.memory.pointer, self.length, rows, None, rows)])
        return segments

    def append(self, qkv: Tensor, cos: Tensor, sin: Tensor, *norms: Tensor | None) -> Tensor:
        return kernels.rope_qk_append(qkv, cos, sin, self.table(len(qkv)), 0, self.heads, self.dim, *norms)

    def attend(self, q: Tensor, scale: float) -> Tensor:
        return kernels.attention(q, self.table(len(q)), 0, self.kv_heads, scale)


def sequence_holding(k: Tensor, v: Tensor, heads: int, length: int) -> Sequence:
    """k, v [kv_heads, capacity, dim], of which `length` positions are committed."""
    kv_heads, capacity, dim = k.shape
    made = Sequence(heads, kv_heads, dim, capacity)
    for memory, rows in zip(made.memory._memory, (k, v), strict=True):
        chunks = memory.view(torch.float32).view(-1, kv_heads, 64, dim).movedim(0, 1)
        padded = F.pad(rows, (0, 0, 0, -capacity % 64), value=math.nan)
        chunks.copy_(padded.reshape(chunks.shape))
    made.length = length
    return made


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 3, 80), (16, 8, 128)])
def test_rope_qk_append(heads: int, kv_heads: int, dim: int, normed: bool, whole: bool) -> None:
    """To 2e-6; nothing is written outside the appended positions."""
    m, start, capacity = 5, 7, 20
    qkv, (cos, sin) = torch.randn(m, (heads + 2 * kv_heads) * dim), tables(capacity, dim, whole)
    weights = (torch.rand(dim), torch.rand(dim)) if normed else (None, None)
    sequence = sequence_holding(*torch.full((2, kv_heads, capacity, dim), 9.0), heads, start)
    q = sequence.append(qkv, cos, sin, *weights)

    new = slice(start, start + m)
    angle_cos, angle_sin = (t[new, None, : dim // 2].double() for t in (cos, sin))

    def expected(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.double()
        if weight is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle_cos - b * angle_sin, b * angle_cos + a * angle_sin], -1)

    parts = qkv.view(m, -1, dim).split([heads, kv_heads, kv_heads], 1)
    assert torch.allclose(q.double(), expected(parts[0], weights[0]), rtol=2e-6, atol=2e-6)
    k, v = sequence.memory.k[0], sequence.memory.v[0]
    assert torch.allclose(k[:, new].transpose(0, 1).double(), expected(parts[1], weights[1]), rtol=2e-6, atol=2e-6)
    assert torch.equal(v[:, new].transpose(0, 1), parts[2])
    for memory in (k, v):
        assert (memory[:, :start] == 9).all()
        assert (memory[:, start + m : capacity] == 9).all()


def attention_in_float64(q: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, scale: float) -> Tensor:
    m, heads, _ = q.shape
    seen = torch.arange(start + m) <= start + torch.arange(m)[:, None]
    k, v = (t[:, : start + m].double().repeat_interleave(heads // t.shape[0], 0) for t in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(q.double().transpose(0, 1), k, v, attn_mask=seen, scale=scale)
    return out.transpose(0, 1).reshape(m, -1)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 80), (16, 8, 128), (7, 1, 48)])
@pytest.mark.parametrize(("start", "m"), [(0, 1), (63, 1), (64, 2), (60, 9), (0, 70), (130, 17)])
def test_attention(heads: int, kv_heads: int, dim: int, start: int, m: int) -> None:
    """To 5e-6, values of about one. What the cache holds beyond a row's position, NaN even, has no effect."""
    q, (k, v) = torch.randn(m, heads, dim), torch.randn(2, kv_heads, start + m + 5, dim)
    k[:, start + m :] = v[:, start + m :] = math.nan
    out = sequence_holding(k, v, heads, start).attend(q, dim**-0.5)
    assert (out - attention_in_float64(q, k, v, start, dim**-0.5)).abs().max() < 5e-6


def test_attention_with_large_scores() -> None:
    """Scores of hundreds, as a badly scaled model gives: the running maximum keeps them finite.

    To 1e-3, values of size one: a float32 score of 500 is itself only known to 1e-4 after 32 roundings.
    """
    q, (k, v) = torch.randn(6, 4, 32) * 30, torch.randn(2, 2, 200, 32)
    k, v = k[:, :196], v[:, :196]
    out = sequence_holding(k, v, 4, 190).attend(q, 1.0)
    assert torch.allclose(out.double(), attention_in_float64(q, k, v, 190, 1.0), atol=1e-3)


# The property that makes speculative output that of plain decoding


def row_kernels() -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Name -> (kernel of a float32 input [m, width], width)."""
    k, n = 515, 70
    int8, bias = kernels.PackedInt8(random_int8(n, k), torch.rand(n)), torch.randn(n)
    bf16 = kernels.PackedBf16(torch.randn(n, k).bfloat16())
    full = kernels.PackedFloat32(torch.randn(n, k))
    weight = torch.randn(k)

    def stacked(quantized: kernels.Quantized) -> Tensor:
        return torch.cat([quantized[0].float(), quantized[1][:, None]], 1)

    return {
        "int8_linear": (lambda x: kernels.int8_linear(*kernels.quantize_per_token(x), int8, bias), k),
        "wide_int8_linear": (lambda x: kernels.wide_int8_linear(x, int8, bias), k),
        "bf16_weights": (lambda x: kernels.float_linear(x, bf16, bias), k),
        "bf16_linear": (lambda x: kernels.bf16_linear(x, bf16, bias), k),
        "f32_linear": (lambda x: kernels.float_linear(x, full, bias), k),
        "quantize": (lambda x: stacked(kernels.quantize_per_token(x)), k),
        "add_rms_norm": (lambda x: kernels.add_rms_norm(x.clone(), x.flip(1).contiguous(), weight, 1e-6), k),
        "add_rms_norm_quantize": (
            lambda x: stacked(kernels.add_rms_norm_quantize(x.clone(), None, weight, 1e-6)),
            k,
        ),
        "swiglu": (kernels.swiglu, 2 * k),
        "swiglu_quantize": (lambda x: stacked(kernels.swiglu_quantize(x)), 2 * k),
        "argmax": (lambda x: kernels.argmax(x)[:, None], k),
    }


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", row_kernels() if kernels.available() else [])
def test_a_row_does_not_depend_on_its_company(name: str, threads: int) -> None:
    kernel, width = row_kernels()[name]
    x = torch.randn(150, width)  # more than two panels of rows, and enough work for several threads
    whole = kernel(x)
    torch.set_num_threads(1)
    for m in (*range(1, 18), 64, 100):
        for first in (0, 3, 150 - m):
            alone = kernel(x[first : first + m].contiguous())
            assert torch.equal(alone, whole[first : first + m]), (m, first)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (16, 8, 128), (5, 1, 48), (9, 3, 64), (2, 2, 272)])
def test_attention_of_a_token_does_not_depend_on_its_company(heads: int, kv_heads: int, dim: int, threads: int) -> None:
    """A prompt in one pass, in windows, and token by token: rope, cache and attention to the same bits."""
    tokens = 140
    qkv, (cos, sin) = torch.randn(tokens, (heads + 2 * kv_heads) * dim), tables(tokens, dim, False)
    norm = torch.rand(dim)

    def run(window: int) -> tuple[Tensor, Tensor]:
        sequence, rows = Sequence(heads, kv_heads, dim, tokens), []
        for start in range(0, tokens, window):
            part = qkv[start : start + window]
            rows.append(sequence.attend(sequence.append(part, cos, sin, norm, norm), dim**-0.5))
            sequence.length += len(part)
        return torch.cat(rows), torch.cat([sequence.memory.k, sequence.memory.v])[:, :, :tokens]

    whole, caches = run(tokens)
    torch.set_num_threads(1)
    for window in (1, 2, 3, 4, 6, 7, 64):
        out, window_caches = run(window)
        assert torch.equal(out, whole), window
        assert torch.equal(window_caches, caches), window


# What is refused


def test_wrong_tensors_are_refused() -> None:
    weight = packed_int8(random_int8(8, 16))
    x, scale = random_int8(2, 16), torch.ones(2)
    for bad in (x.float(), random_int8(16, 2).T, random_int8(2, 15)):
        with pytest.raises(ValueError, match="contiguous"):
            kernels.int8_linear(bad, scale, weight)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.int8_linear(x, torch.ones(3), weight)
    with pytest.raises(ValueError, match="cannot run"), kernels.use_instruction_set("mmx"):
        pass


def test_one_openmp_runtime() -> None:
    """A second team of threads would spin against torch's."""
    assert kernels.threads_shared()
    with open("/proc/self/maps") as maps:  # noqa: PTH123 (a pseudo-file)
        libraries = {line.split()[-1] for line in maps if ".so" in line}
    libraries = {name for name in libraries if "sentencepiece" not in name}  # brings its own, which starts no team
    runtimes = [name for name in libraries if name.rsplit("/", 1)[-1].startswith(("libgomp", "libomp", "libiomp"))]
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("isa", kernels.instruction_sets())
@pytest.mark.parametrize("n", [8, 17, 1000, 5003])
def test_top_k_is_the_order_of_a_stable_sort(isa, n):
    """Random values, values with many equals, and rising ones, which replace the best at every step."""
    rows = torch.stack([torch.randn(n), torch.randn(n).round(), torch.arange(n).float(), -torch.arange(n).float()])
    with kernels.use_instruction_set(isa):
        found = kernels.top_k(rows, 8)
    assert torch.equal(found, rows.sort(dim=-1, descending=True, stable=True).indices[:, :8])
    with pytest.raises(ValueError, match="the 9 largest of 8"):
        kernels.top_k(torch.zeros(1, 8), 9)
