"""Each emulated npu operator against plain PyTorch written from the formula alone."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from emulated_npu import branch_as, counting
from hypothesis import given, settings
from hypothesis import strategies as st

HALVES = [torch.float16, torch.bfloat16]
EPSILON = {
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.float32: 2**-22,
}  # half a unit in the last place


def near(got: torch.Tensor, expected: torch.Tensor, *, ulps: float = 1.01) -> bool:
    """Equal to the float64 value up to one rounding to the dtype of ``got``."""
    got, bound = got.cpu(), EPSILON[got.dtype]
    return bool(((got.double() - expected).abs() <= ulps * bound * expected.abs() + 1e-6).all())


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    peak = x.float().abs().amax(-1)
    return (x.float() * (127 / peak)[..., None]).round().to(torch.int8), peak / 127


@pytest.fixture(autouse=True)
def _as_installed():
    # The emulation itself is tested with the package that is here, whatever others would say of a call.
    with branch_as("master"):
        yield


@pytest.fixture
def fractal_allowed():
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


# --- quantisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_dynamic_quant(dtype):
    x = torch.randn(2, 5, 33, dtype=dtype)
    y, scale = torch_npu.npu_dynamic_quant(x.npu())
    expected, expected_scale = quantise(x)
    assert scale.shape == (2, 5)
    assert torch.equal(y.cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale)
    assert y.cpu().abs().amax(-1).eq(127).all()


def test_dynamic_quant_rounds_half_to_even_and_survives_zeros():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6]).half()
    y, scale = torch_npu.npu_dynamic_quant(x.npu())
    assert y.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1, 0]


def test_dynamic_quant_smooths_first():
    x, smooth = torch.randn(4, 16).half(), torch.rand(16).half() + 0.5
    y, scale = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu())
    expected, expected_scale = quantise(x.float() * smooth.float())
    assert torch.equal(y.cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_divides_by_a_static_scale(dtype):
    x = torch.randn(3, 40).mul(4).to(dtype)
    scale, zero = torch.tensor([0.03]), torch.tensor([3], dtype=torch.int32)
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), zero.npu(), torch.qint8, -1, True)
    assert y.dtype == torch.int8
    assert torch.equal(y.cpu(), (x.float() / 0.03 + 3).round().clamp(-128, 127).to(torch.int8))


def test_quantize_multiplies_per_channel_without_div_mode():
    x, factor = torch.randn(3, 8).bfloat16(), torch.rand(8).mul(50).bfloat16()
    y = torch_npu.npu_quantize(x.npu(), factor.npu(), None, torch.qint8, -1, False)
    assert torch.equal(y.cpu(), (x.float() * factor.float()).round().clamp(-128, 127).to(torch.int8))


def test_trans_quant_param_keeps_nineteen_bits_and_the_offset():
    scale = torch.rand(64) * 0.01
    packed = torch_npu.npu_trans_quant_param(scale.npu()).cpu()
    assert packed.dtype == torch.int64
    low = (packed & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    assert ((scale - low) / scale).abs().max() < 2**-10
    assert (low <= scale).all()  # truncated, never rounded up
    assert (packed >> 46 == 1).all()
    offsets = torch_npu.npu_trans_quant_param(scale[:2].npu(), torch.tensor([3.0, -300.0]).npu()).cpu()
    assert ((offsets >> 37) & 0x1FF).tolist() == [3, 256]  # -300 clamps to -256, in nine bits


# --- int4 weights -------------------------------------------------------------------------------------------


def int4(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int32)


def test_int4pack_lays_eight_in_a_word_the_first_lowest():
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8], [-1] * 8], dtype=torch.int32)
    packed = torch_npu.npu_convert_weight_to_int4pack(weight.npu()).cpu()
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed.flatten().tolist()] == [0x87654321, 0xFFFFFFFF]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weight_quant_batchmatmul(dtype, group, transposed, zero_points):
    weight, x = int4(160, 24), torch.randn(5, 160, dtype=dtype)
    scale = torch.rand(-(-160 // group) if group else 1, 24).to(dtype)  # the last group of 64 is half a one
    offset = torch.randn_like(scale) * 4 if zero_points else None
    bias = torch.randn(24).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    if transposed:
        packed = torch_npu.npu_convert_weight_to_int4pack(weight.t().contiguous().npu()).t()
    else:
        packed = torch_npu.npu_convert_weight_to_int4pack(weight.npu())
    y = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(),
        packed,
        scale.npu(),
        antiquant_offset=offset.npu() if zero_points else None,
        bias=bias.npu(),
        antiquant_group_size=group,
    )
    rows = torch.arange(160) // (group or 160)
    moved = weight.double() + (offset.double()[rows] if zero_points else 0)  # in steps, before the scale
    assert y.dtype == dtype
    assert near(y, x.double() @ (moved * scale.double()[rows]) + bias.double())


# --- the int8 matrix product --------------------------------------------------------------------------------


@pytest.mark.parametrize("output", HALVES)
@pytest.mark.parametrize("bias", [None, torch.int32, torch.float32, "output"])
def test_quant_matmul_per_token(output, bias):
    x1, x2 = int8(5, 48), int8(48, 24)
    scale, token_scale = torch.rand(24) * 1e-3, torch.rand(5) * 1e-2
    dtype = output if bias == "output" and output == torch.bfloat16 else torch.float32 if bias == "output" else bias
    addend = None if bias is None else torch.randn(24).mul(100 if dtype == torch.int32 else 1).to(dtype)
    got = torch_npu.npu_quant_matmul(
        x1.npu(),
        x2.npu(),
        scale.npu(),
        pertoken_scale=token_scale.npu(),
        bias=None if addend is None else addend.npu(),
        output_dtype=output,
    )
    total = x1.double() @ x2.double()
    if dtype == torch.int32:
        total = total + addend
    expected = total * scale.double() * token_scale.double()[:, None]
    if addend is not None and dtype != torch.int32:
        expected = expected + addend.double()
    assert got.dtype == output
    assert near(got, expected)


def test_quant_matmul_takes_bfloat16_scales_a_transposed_weight_and_more_dimensions():
    x1, weight = int8(2, 3, 16), int8(8, 16)
    scale = torch.rand(8).mul(1e-2).bfloat16()
    token_scale = torch.rand(3)
    got = torch_npu.npu_quant_matmul(
        x1.npu(), weight.npu().t(), scale.npu(), pertoken_scale=token_scale.npu(), output_dtype=torch.bfloat16
    )
    assert near(got, x1.double() @ weight.double().t() * scale.double() * token_scale.double()[:, None])


def test_quant_matmul_with_int32_output_is_the_bare_accumulator():
    x1, x2, bias = int8(3, 32), int8(32, 8), torch.randint(-99, 99, (8,), dtype=torch.int32)
    got = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), torch.rand(8).npu(), bias=bias.npu(), output_dtype=torch.int32)
    assert torch.equal(got.cpu(), x1.int() @ x2.int() + bias)


@pytest.mark.parametrize("packed", [True, False])
def test_quant_matmul_static_float16(packed):
    x1, x2, bias = int8(4, 32), int8(32, 8), torch.randint(-999, 999, (8,), dtype=torch.int32)
    scale = torch.rand(8) * 1e-3
    given_scale = torch_npu.npu_trans_quant_param(scale.npu()) if packed else scale.npu()
    got = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), given_scale, bias=bias.npu(), output_dtype=torch.float16)
    truncated = (scale.view(torch.int32) & -0x2000).view(torch.float32)
    assert not torch.equal(truncated, scale)
    assert near(got, (x1.double() @ x2.double() + bias) * truncated.double())


def test_quant_matmul_defaults_to_int8_output():
    x1, x2 = int8(4, 32), int8(32, 8)
    scale, offset = torch.full((8,), 2.0**-9), torch.full((8,), 5.0)
    got = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), scale.npu(), offset=offset.npu())
    expected = ((x1.double() @ x2.double()) * 2.0**-9 + 5).round().clamp(-128, 127)
    assert torch.equal(got.cpu().double(), expected)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 9), k=st.integers(1, 300), n=st.integers(1, 40))
def test_quant_matmul_accumulates_exactly(m, k, n):
    x1, x2 = torch.full((m, k), -128, dtype=torch.int8), int8(k, n)
    one = torch.ones(1)
    got = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), one.npu(), output_dtype=torch.int32)
    assert torch.equal(got.cpu(), (x1.long() @ x2.long()).int())


# --- formats ------------------------------------------------------------------------------------------------


def test_a_fractal_weight_multiplies_like_the_plain_one(fractal_allowed):
    x1, x2, scale = int8(3, 64), int8(64, 32), torch.rand(32)
    fractal = torch_npu.npu_format_cast(x2.npu(), 29)
    assert int(torch_npu.get_npu_format(fractal)) == 29
    assert torch.equal(fractal.cpu(), x2)
    options = {"pertoken_scale": torch.rand(3).npu(), "output_dtype": torch.bfloat16}
    plain = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), scale.npu(), **options)
    assert torch.equal(torch_npu.npu_quant_matmul(x1.npu(), fractal, scale.npu(), **options).cpu(), plain.cpu())
    with counting() as counts:
        assert torch_npu.npu_format_cast(fractal, 29) is fractal
        back = torch_npu.npu_format_cast(fractal, 2)
    assert counts.launches == {"npu_format_cast": 1}
    assert int(torch_npu.get_npu_format(back)) == 2
    assert torch.equal(back.cpu(), x2)


def test_a_fractal_weight_in_a_floating_point_product(fractal_allowed):
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    fractal = torch_npu.npu_format_cast(weight.npu(), 29)
    assert torch.equal(F.linear(x.npu(), fractal).cpu(), F.linear(x, weight))


@pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format:UserWarning")  # torch_npu's, once
def test_the_cast_stays_nd_unless_torch_npu_allows_internal_formats():
    assert int(torch_npu.get_npu_format(torch_npu.npu_format_cast(int8(32, 32).npu(), 29))) == 2


# --- norms --------------------------------------------------------------------------------------------------


def rms(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gamma.double()


@pytest.mark.parametrize(
    "dtype, gamma_dtype",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ],
)
def test_rms_norm(dtype, gamma_dtype):
    x, gamma = torch.randn(2, 3, 64).to(dtype), torch.rand(64).to(gamma_dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), epsilon=1e-5)
    assert near(y, rms(x, gamma, 1e-5), ulps=2)
    expected = 1 / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(rstd.cpu().double(), expected, rtol=1e-5)
    assert rstd.shape == (2, 3, 1)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_add_rms_norm(dtype):
    a, b, gamma = (torch.randn(*shape).to(dtype) for shape in ((4, 64), (4, 64), (64,)))
    y, rstd, total = torch_npu.npu_add_rms_norm(a.npu(), b.npu(), gamma.npu(), 1e-6)
    assert torch.equal(total.cpu(), a + b)
    # bfloat16 is added in float32, and normalised before it is rounded; then there are two roundings, around gamma.
    added = a.float() + b.float() if dtype == torch.bfloat16 else a + b
    assert near(y, rms(added, gamma, 1e-6), ulps=3)
    assert rstd.shape == (4, 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_add_rms_norm_dynamic_quant(dtype):
    a, b, gamma = (torch.randn(*shape).to(dtype) for shape in ((4, 64), (4, 64), (64,)))
    with counting() as counts:
        y1, y2, total, scale1, scale2 = torch_npu.npu_add_rms_norm_dynamic_quant(a.npu(), b.npu(), gamma.npu())
    assert counts.launches == {"npu_add_rms_norm_dynamic_quant": 1}
    # bfloat16 is added in float32, and normalised before it is rounded.
    added = a.float() + b.float() if dtype == torch.bfloat16 else a + b
    expected, expected_scale = quantise(rms(added, gamma, 1e-6).float())
    assert torch.equal(total.cpu(), a + b)
    assert torch.allclose(scale1.cpu(), expected_scale, rtol=1e-6)
    # float32 here, float64 there: a value that lies within a hair of a tie may round the other way
    assert (y1.cpu().int() - expected.int()).abs().max() <= 1
    assert (y1.cpu() != expected).float().mean() < 0.01
    assert y2.shape == scale2.shape == (0,)


def test_add_rms_norm_dynamic_quant_smooths_into_two_outputs():
    a, gamma = torch.randn(3, 32).half(), torch.ones(32).half()
    one, two = torch.full((32,), 0.5).half(), torch.linspace(1, 2, 32).half()
    zeros = torch.zeros(3, 32).half()
    y1, y2, _, scale1, scale2 = torch_npu.npu_add_rms_norm_dynamic_quant(
        a.npu(),
        zeros.npu(),
        gamma.npu(),
        smooth_scale1=one.npu(),
        smooth_scale2=two.npu(),
        epsilon=1e-5,
        output_mask=[True, True],
    )
    norm = rms(a, gamma, 1e-5)
    for y, scale, smooth in ((y1, scale1, one), (y2, scale2, two)):
        expected, expected_scale = quantise((norm * smooth.double()).float())
        assert torch.allclose(scale.cpu(), expected_scale, rtol=1e-6)
        assert (y.cpu().int() - expected.int()).abs().max() <= 1


# --- rope and swiglu ----------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x.double() * cos.double() + turned.double() * sin.double()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_rotary_mul(dtype):
    x = torch.randn(1, 5, 4, 16).to(dtype)
    angle = torch.randn(1, 5, 1, 16)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu())
    expected = rotate(x, cos, sin)
    assert ((got.cpu().double() - expected).abs() <= EPSILON[dtype] * (expected.abs() + 1)).all()


@pytest.mark.parametrize("layout, lead", [("BSND", (2, 3)), ("TND", (6,))])
def test_apply_rotary_pos_emb_rotates_in_place(layout, lead):
    q, k = torch.randn(*lead, 4, 64).bfloat16(), torch.randn(*lead, 2, 64).bfloat16()
    angle = torch.randn(*lead, 1, 64)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    query, key = q.npu(), k.npu()
    out_q, out_k = torch_npu.npu_apply_rotary_pos_emb(query, key, cos.npu(), sin.npu(), layout=layout)
    assert out_q.data_ptr() == query.data_ptr()
    assert out_k.data_ptr() == key.data_ptr()
    for got, x in ((query, q), (key, k)):
        expected = rotate(x, cos, sin)
        assert ((got.cpu().double() - expected).abs() <= 2**-8 * (expected.abs() + 1)).all()


def test_strided_rope_input_costs_a_copy_each():
    fused = torch.randn(5, 4 * 64).half().npu()
    query, key = (part.unflatten(-1, (-1, 64)) for part in fused.split([128, 128], -1))
    cos = sin = torch.ones(5, 1, 64, dtype=torch.float16, device="npu")
    with counting() as counts:
        torch_npu.npu_apply_rotary_pos_emb(query, key, cos, sin, layout="TND")
    assert counts.launches == {"npu_apply_rotary_pos_emb": 1, "npu_apply_rotary_pos_emb/contiguous": 2}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_swiglu(dtype):
    x = torch.randn(3, 32).to(dtype)
    gate, up = x.double().chunk(2, -1)
    assert near(torch_npu.npu_swiglu(x.npu()), F.silu(gate) * up, ulps=2)


@pytest.mark.parametrize("left", [True, False])
def test_swiglu_quant_operators_agree_with_the_two_steps(left):
    x = torch.randn(4, 64).bfloat16()
    first, second = x.float().chunk(2, -1)
    expected, expected_scale = quantise(F.silu(first) * second if left else F.silu(second) * first)
    options = {"activate_left": left, "quant_mode": 1}
    for operator in (torch_npu.npu_dequant_swiglu_quant, torch_npu.npu_swiglu_quant):
        y, scale = operator(x.npu(), **options)
        assert torch.equal(y.cpu(), expected)
        assert torch.equal(scale.cpu(), expected_scale)


def test_dequant_swiglu_quant_continues_an_int32_product():
    x1, x2 = int8(5, 32), int8(32, 48)
    weight_scale, token_scale = torch.rand(48) * 1e-2, torch.rand(5) * 1e-1
    total = torch_npu.npu_quant_matmul(x1.npu(), x2.npu(), weight_scale.npu(), output_dtype=torch.int32)
    y, scale = torch_npu.npu_dequant_swiglu_quant(
        total,
        weight_scale=weight_scale.npu()[None],
        activation_scale=token_scale.npu()[:, None],
        activate_left=True,
        quant_mode=1,
    )
    gate, up = ((x1.double() @ x2.double()) * weight_scale * token_scale[:, None]).chunk(2, -1)
    expected, expected_scale = quantise((F.silu(gate) * up).float())
    assert torch.allclose(scale.cpu(), expected_scale, rtol=1e-5)
    assert (y.cpu().int() - expected.int()).abs().max() <= 1


# --- attention ----------------------------------------------------------------------------------------------


def attend(q, k, v, hidden=None):
    """[N, q, D] over [kv heads, kv, D] in float64; ``hidden`` True = not looked at."""
    group = q.shape[0] // k.shape[0]
    k, v = k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    scores = q.double() @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def causal(q: int, kv: int) -> torch.Tensor:
    """Bottom-right aligned: the last query sees everything."""
    return torch.arange(kv)[None] > torch.arange(q)[:, None] + (kv - q)


@pytest.fixture(scope="module")
def triangle():
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()


LAYOUTS = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2).contiguous(),
    "BSH": lambda x: x.transpose(1, 2).flatten(2).contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("q_length, valid", [(1, 7), (4, 7), (7, 7), (4, 12)])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_over_a_partly_filled_cache(layout, q_length, valid, dtype, triangle):
    q = torch.randn(1, 4, q_length, 16).to(dtype)
    k, v = (torch.randn(1, 2, 12, 16).to(dtype) for _ in range(2))
    arrange = LAYOUTS[layout]
    masking = {} if q_length == 1 else {"sparse_mode": 3, "atten_mask": triangle}
    got, lse = torch_npu.npu_fused_infer_attention_score(
        *(arrange(x).npu() for x in (q, k, v)),
        num_heads=4,
        num_key_value_heads=2,
        scale=1 / math.sqrt(16),
        input_layout=layout,
        actual_seq_lengths_kv=[valid],
        **masking,
    )
    expected = attend(q[0], k[0, :, :valid], v[0, :, :valid], causal(q_length, valid))[None]
    error = got.cpu().double() - arrange(expected)
    assert got.dtype == dtype
    assert error.abs().max() <= 2 * EPSILON[dtype] * expected.abs().max()
    assert lse.numel() == 0


def test_attention_with_a_full_mask_held_on_the_device():
    q, k = torch.randn(2, 2, 3, 16).half(), torch.randn(2, 2, 6, 16).half()
    hidden = torch.rand(2, 1, 3, 6) > 0.6
    hidden[..., 0] = False
    got, _ = torch_npu.npu_fused_infer_attention_score(
        q.npu(),
        k.npu(),
        k.npu(),
        num_heads=2,
        scale=1 / math.sqrt(16),
        input_layout="BNSD",
        atten_mask=hidden.npu(),
        sparse_mode=0,
    )
    for row in range(2):
        expected = attend(q[row], k[row], k[row], hidden[row])
        assert (got[row].cpu().double() - expected).abs().max() < 2e-3


def test_attention_top_left_causal_and_transposed_output(triangle):
    q, k = torch.randn(1, 2, 3, 16).half(), torch.randn(1, 2, 6, 16).half()
    got, _ = torch_npu.npu_fused_infer_attention_score(
        q.npu(),
        k.npu(),
        k.npu(),
        num_heads=2,
        scale=1 / math.sqrt(16),
        input_layout="BNSD_BSND",
        atten_mask=triangle,
        sparse_mode=2,
    )
    expected = attend(q[0], k[0], k[0], torch.ones(3, 6, dtype=torch.bool).triu(1))
    assert (got[0].transpose(0, 1).cpu().double() - expected).abs().max() < 2e-3


def test_attention_over_sequences_of_different_length(triangle):
    q, k = torch.randn(5, 2, 128).half(), torch.randn(11, 2, 128).half()
    got, _ = torch_npu.npu_fused_infer_attention_score(
        q.npu(),
        k.npu(),
        k.npu(),
        num_heads=2,
        scale=1 / math.sqrt(128),
        input_layout="TND",
        actual_seq_lengths=[2, 5],
        actual_seq_lengths_kv=[4, 11],
        atten_mask=triangle,
        sparse_mode=3,
    )
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 11))):
        one, other = q[rows].transpose(0, 1), k[columns].transpose(0, 1)
        expected = attend(one, other, other, causal(one.shape[1], other.shape[1]))
        assert (got[rows].transpose(0, 1).cpu().double() - expected).abs().max() < 2e-3


def test_rows_past_the_valid_query_are_zero(triangle):
    q = torch.randn(1, 4, 2, 16).half().npu()
    options = {"num_heads": 2, "input_layout": "BSND", "sparse_mode": 3, "atten_mask": triangle}
    got, _ = torch_npu.npu_fused_infer_attention_score(
        q, q, q, actual_seq_lengths=[3], actual_seq_lengths_kv=[3], **options
    )
    assert (got[:, 3] == 0).all()
    assert (got[:, :3] != 0).any()


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.int8])
def test_scatter_nd_update(dtype):
    cache = torch.randn(6, 2, 4).mul(9).to(dtype)
    rows = torch.randn(3, 2, 4).mul(9).to(dtype)
    there = cache.npu()
    places = torch.tensor([[4], [0], [5]], dtype=torch.int32)
    out = torch_npu.npu_scatter_nd_update_(there, places.npu(), rows.npu())
    cache[[4, 0, 5]] = rows
    assert out.data_ptr() == there.data_ptr()
    assert torch.equal(there.cpu(), cache)
