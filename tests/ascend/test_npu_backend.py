"""Each operation of the NPU backend: exactly what the fused rounding gives, and near the reference backend's numbers.

"Near" is derived, not tuned: an output in bfloat16 (float16) has a relative rounding error of 2^-9 (2^-12), and each
bound counts the roundings that the two sides do not share.
"""

import pytest
import torch
from emulated_npu import branch_as, counting
from fused_rounding import FusedRounding

from quasar.backends import get_backend
from quasar.backends.base import ActivationQuant, AttentionSpec, Batch, Quantized, Segment
from quasar.backends.reference import ReferenceBackend
from quasar.models.decoder import rope_tables

DTYPES = {
    "bfloat16": (torch.bfloat16, 2.0**-9),
    "float16": (torch.float16, 2.0**-12),
}  # and half a unit in the last place
DYNAMIC = ActivationQuant()


@pytest.fixture(params=DTYPES)
def sides(request):
    """npu, the oracle on the CPU, the reference backend, and the rounding error of one output."""
    dtype, rounding = DTYPES[request.param]
    return get_backend("npu", dtype), FusedRounding("cpu", dtype), ReferenceBackend("cpu", dtype), rounding


def random(*shape, dtype, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def host(x):
    if isinstance(x, Quantized):
        return Quantized(x.values.cpu(), x.scale.cpu())
    return x.cpu() if isinstance(x, torch.Tensor) else tuple(map(host, x))


def dequantised(x):
    return x.values.float() * x.scale[:, None] if isinstance(x, Quantized) else x.float()


def assert_same(got, expected):
    got = host(got)
    if isinstance(expected, Quantized):
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.scale, expected.scale)
    elif isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def assert_near(got, reference, bound):
    """Relative to the largest value; a step of int8 may fall the other way in either direction."""
    got, reference = host(got), reference
    if isinstance(reference, Quantized):
        bound = bound + 1 / 127
    got, reference = dequantised(got), dequantised(reference)
    assert (got - reference).abs().max() <= bound * reference.abs().max()


@pytest.mark.parametrize("with_bias", [False, True])
def test_wide_int8_linear(sides, with_bias):
    """Two digits and their products are rounded to the type each, and so is their sum."""
    npu, _, _, rounding = sides
    values = torch.randint(-127, 128, (72, 96), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, bias = torch.rand(72) * 1e-2, torch.randn(72) if with_bias else None
    x = random(6, 96, dtype=npu.dtype)
    got = npu.wide_int8_linear(x.npu(), npu.int8_weight(values, scale), None if bias is None else bias.npu())
    expected = torch.nn.functional.linear(x.float(), values.float() * scale[:, None], bias)
    assert got.dtype == npu.dtype
    assert_near(got, expected, 3 * rounding + 2.0**-15 * 96**0.5)


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear(sides, tokens, with_bias):
    npu, oracle, reference, rounding = sides
    values = torch.randint(-127, 128, (72, 96), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, bias = torch.rand(72) * 1e-2, torch.randn(72) if with_bias else None
    x = reference.quantize(random(tokens, 96, dtype=npu.dtype), DYNAMIC)
    got = npu.int8_linear(
        Quantized(x.values.npu(), x.scale.npu()), npu.int8_weight(values, scale), None if bias is None else bias.npu()
    )
    assert_same(got, oracle.int8_linear(x, oracle.int8_weight(values, scale), bias))
    assert_near(got, reference.int8_linear(x, reference.int8_weight(values, scale), bias), 2 * rounding)


def test_an_int8_layer_wider_than_an_operand_may_be(sides):
    """lm_head in W8A8: 65535 columns are the operator's limit, vocabularies are larger."""
    npu, oracle, _, _ = sides
    values = torch.randint(-127, 128, (70_001, 16), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale, bias = torch.rand(70_001), torch.randn(70_001)
    x = oracle.quantize(random(3, 16, dtype=npu.dtype), DYNAMIC)
    weight = npu.int8_weight(values, scale)
    assert len(weight) == 2
    got = npu.int8_linear(Quantized(x.values.npu(), x.scale.npu()), weight, bias.npu())
    assert_same(got, oracle.int8_linear(x, oracle.int8_weight(values, scale), bias))


@pytest.mark.parametrize("with_bias", [False, True])
def test_full_linear(sides, with_bias):
    npu, oracle, reference, rounding = sides
    weight, x = random(70, 48, dtype=npu.dtype), random(5, 48, dtype=npu.dtype, seed=2)
    bias = random(70, dtype=npu.dtype, seed=3) if with_bias else None
    got = npu.linear(x.npu(), npu.full_weight(weight), None if bias is None else bias.npu())
    assert_same(got, oracle.linear(x, weight, bias))
    assert_near(got, reference.linear(x, weight, bias), 4 * rounding)


def test_int8_weights_lie_in_fractal_nz_and_others_where_that_is_asked_for(sides, monkeypatch):
    """Their product is an operator that older CANN cannot capture."""
    import torch_npu

    npu = sides[0]
    (part,) = npu.int8_weight(torch.ones(64, 32, dtype=torch.int8), torch.ones(64))
    assert int(torch_npu.get_npu_format(part.values)) == 29
    assert int(torch_npu.get_npu_format(npu.full_weight(torch.randn(64, 32)))) == 2
    monkeypatch.setenv("QUASAR_NPU_FLOAT_NZ", "1")
    weight = npu.full_weight(torch.randn(64, 32))
    assert int(torch_npu.get_npu_format(weight)) == 29
    assert weight.nbytes == 64 * 32 * 2


def test_a_matrix_of_one_column_stays_as_it_is(sides):
    """FRACTAL_NZ has no such matrices."""
    import torch_npu

    (part,) = sides[0].int8_weight(torch.ones(1, 32, dtype=torch.int8), torch.ones(1))
    assert int(torch_npu.get_npu_format(part.values)) == 2


@pytest.mark.parametrize("operators", ["norm", "swiglu"])
def test_norm_and_swiglu_without_the_fused_operators(operators, monkeypatch):
    """Switchable, since only hardware can say which is faster; with the same values but for one rounding more."""
    monkeypatch.setenv(f"QUASAR_NPU_FUSED_{operators.upper()}", "0")
    npu = get_backend("npu", torch.bfloat16)
    reference, rounding = ReferenceBackend("cpu", torch.bfloat16), 2.0**-9
    x, weight = random(6, 96, dtype=npu.dtype), random(96, dtype=npu.dtype, seed=2)
    with counting() as counts:
        if operators == "norm":
            got = npu.add_rms_norm(x.npu(), x.npu(), weight.npu(), 1e-6, DYNAMIC)[0]
            expected = reference.add_rms_norm(x, x, weight, 1e-6, DYNAMIC)[0]
        else:
            got, expected = npu.swiglu(x.npu(), DYNAMIC), reference.swiglu(x, DYNAMIC)
    fused = {"norm": "npu_add_rms_norm", "swiglu": "npu_swiglu"}[operators]
    assert counts.launches == {fused: 1, "npu_dynamic_quant": 1}
    assert_near(got, expected, 4 * rounding)


def test_before_cann_8_3_norm_and_quantisation_are_two_operators():
    with branch_as("7.0.0"):
        npu = get_backend("npu", torch.bfloat16)
        assert not npu.fuses_norm_and_quant
        x = random(6, 96, dtype=npu.dtype).npu()
        with counting() as counts:
            npu.add_rms_norm(x, x, torch.ones_like(x[0]), 1e-6, DYNAMIC)
            npu.add_rms_norm(x, None, torch.ones_like(x[0]), 1e-6, DYNAMIC)
    assert counts.launches["npu_add_rms_norm"] == counts.launches["npu_rms_norm"] == 1
    assert counts.launches["npu_dynamic_quant"] == 2
    assert counts.launches["npu_add_rms_norm_dynamic_quant"] == 0


@pytest.mark.parametrize(
    "quant", [None, DYNAMIC, ActivationQuant(torch.tensor([0.02]))], ids=["none", "dynamic", "static"]
)
@pytest.mark.parametrize("first", [False, True])
def test_add_rms_norm(sides, quant, first):
    npu, oracle, reference, rounding = sides
    x, weight = random(6, 64, dtype=npu.dtype), random(64, dtype=npu.dtype, seed=2)
    residual = None if first else random(6, 64, dtype=npu.dtype, seed=3, scale=4.0)
    got = npu.add_rms_norm(x.npu(), None if first else residual.npu(), weight.npu(), 1e-6, on_npu(quant))
    assert_same(got, oracle.add_rms_norm(x, residual, weight, 1e-6, quant))
    expected = reference.add_rms_norm(x, residual, weight, 1e-6, quant)
    assert_near(got[0], expected[0], 2 * rounding)
    assert torch.equal(got[1].cpu(), expected[1])  # the residual stream: the same single rounding


@pytest.mark.parametrize(
    "quant", [None, DYNAMIC, ActivationQuant(torch.tensor([0.02]))], ids=["none", "dynamic", "static"]
)
def test_swiglu(sides, quant):
    npu, oracle, reference, rounding = sides
    x = random(6, 96, dtype=npu.dtype, scale=2.0)
    got = npu.swiglu(x.npu(), on_npu(quant))
    assert_same(got, oracle.swiglu(x, quant))
    assert_near(got, reference.swiglu(x, quant), 4 * rounding)


def test_quantize_of_a_row_of_zeros_is_zeros(sides):
    npu = sides[0]
    got = host(npu.quantize(torch.zeros(2, 32, dtype=npu.dtype, device="npu"), DYNAMIC))
    assert not got.values.any()
    assert not dequantised(got).any()


SPECS = {
    "openpangu": AttentionSpec(6, 2, 64, None, None, 1e-6),
    "qwen3": AttentionSpec(6, 2, 64, torch.randn(64).abs() * 3 + 0.1, torch.randn(64).abs() + 0.1, 1e-6),
    "small heads": AttentionSpec(4, 4, 16, None, None, 1e-6),
}


class Positions:
    """Enough of a model's config for its rope tables."""

    rope_theta, max_position_embeddings, rope_scaling = 1e6, 128, None

    def __init__(self, head_dim):
        self.head_dim = head_dim


@pytest.mark.parametrize("rows_from", ["rope_rows", "plain rows"])
@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (0, 40), (40, 1), (40, 6)])
@pytest.mark.parametrize("name", SPECS)
def test_append_and_attention(sides, name, before, tokens, rows_from):
    npu, oracle, reference, rounding = sides
    spec = SPECS[name]
    outputs, caches = [], []
    for backend in (npu, oracle, reference):
        local = AttentionSpec(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            *(norm_on(n, backend) for n in (spec.q_norm, spec.k_norm)),
            spec.eps,
        )
        cos, sin = rope_tables(Positions(spec.head_dim), backend)
        slot = backend.new_slot(2, spec.kv_heads, 64, spec.head_dim)
        for start, count in ((0, before), (before, tokens)):
            slot.length = start
            if not count:
                continue
            batch = Batch([Segment(slot, [0] * count)])
            qkv = random(count, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, dtype=npu.dtype, seed=count)
            if rows_from == "plain rows":
                rows = cos[start : start + count], sin[start : start + count]
            else:
                rows = list(backend.rope_rows(cos, sin, [local, local], batch))[1]
            q = backend.append_rotated(qkv.to(backend.device), local, *rows, batch, 1)
            out = backend.attention(q, local, batch, 1)
        outputs.append((q.cpu(), out.cpu()))
        caches.append((slot.k.cpu(), slot.v.cpu()))
    assert_same(outputs[0], outputs[1])
    assert_same(caches[0], caches[1])
    # cos or sin, norm and output each round by themselves; in the reference attention's scores and probabilities too.
    assert_near(outputs[0][0], outputs[2][0], 6 * rounding)
    assert_near(caches[0][0], caches[2][0], 6 * rounding)
    assert torch.equal(caches[0][1], caches[2][1])
    assert_near(outputs[0][1], outputs[2][1], 24 * rounding)


def on_npu(quant):
    return None if quant is None else ActivationQuant(None if quant.static_scale is None else quant.static_scale.npu())


def norm_on(norm, backend):
    return None if norm is None else norm.to(backend.device, backend.dtype)
