"""int4 on the NPU: each operation, then whole models by W4A16 and W4A4, QSpec and window graphs included.

The bounds are those of test_npu_backend.py: `rounding` is half a unit in the last place of the activations' type.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from emulated_npu import counting
from fused_rounding import FusedRounding
from npu_models import CALIBRATION, on_backend
from test_npu_backend import assert_near, assert_same, random, sides
from test_npu_ids import GOLDEN, logits_of
from test_npu_passes import AROUND, runtime_of, step, window_of

from quasar import QuasarError, generate, load, quantize
from quasar.backends import get_backend
from quasar.backends.base import Quantized
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.weights import FullWeights
from quasar.export.export import quantize_checkpoint
from quasar.export.settings import ExportSettings
from quasar.models.linear_int4 import in_w4a4
from quasar.models.loader import build_decoder
from quasar.models.sharing import share
from quasar.quantization.int4 import quantize_weight_int4, to_int4
from quasar.quantization.methods import Int4
from quasar.quantization.rotation import hadamard
from quasar.quantization.stream import quantized_decoder
from quasar_npu.inference_card import InferenceCardBackend
from tests.conftest import FAMILIES

__all__ = ["sides"]  # the fixture


ZERO_POINTS = {"group": 32, "symmetric": False}


@cache
def model_on(family, precision, backend, zero_points=False):
    """Rotated and quantised on that backend; symmetric groups of 128, or groups of 32 with zero points."""
    model = on_backend(family, "full", backend)
    method = Int4(model.config, **(ZERO_POINTS if zero_points else {}))
    decoder, _ = quantized_decoder(model.config, model.weights, backend, method, [])
    if precision == "w4a4":
        decoder = share(decoder, convert=in_w4a4)
    return model.with_decoder(decoder, precision)


@cache
def npu():
    return get_backend("npu", torch.bfloat16)


@cache
def oracle():
    return FusedRounding("cpu", torch.bfloat16)


def int4_weights(inputs, zero_points=None):
    """48 outputs: symmetric, or shifted weights with any zero points, or with whole ones."""
    weight = random(48, inputs, dtype=torch.float32, seed=1)
    if zero_points is None:
        return *quantize_weight_int4(weight), None
    shift = random(48, 1, dtype=torch.float32, seed=2)
    group = 128 if inputs % 128 == 0 else 32
    made = to_int4(
        FullWeights(weight + shift, None), group=group, symmetric=False, whole_zeros=zero_points == "whole zero points"
    )
    return made.values, made.scale, made.offset


@pytest.mark.parametrize("zero_points", [None, "zero points", "whole zero points"])
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inputs", [384, 192, 96, 128], ids=["groups of 128", "of 64", "of 32", "one group"])
def test_w4a16_linear(sides, inputs, with_bias, tokens, zero_points):
    npu, oracle, reference, rounding = sides
    weights = int4_weights(inputs, zero_points)
    x, bias = random(tokens, inputs, dtype=npu.dtype), torch.randn(48) if with_bias else None
    got = npu.int4_linear(x.npu(), npu.int4_weight(*weights), None if bias is None else bias.npu())
    assert_same(got, oracle.int4_linear(x, oracle.int4_weight(*weights), bias))
    expected = reference.int4_linear(x, reference.int4_weight(*weights), bias)
    # The reference's kernel takes and gives bfloat16, whatever the activations are.
    assert_near(got, expected, 4 * rounding + 4 * 2.0**-9)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("zero_points", [None, "zero points"])
def test_w4a4_linear(sides, with_bias, tokens, zero_points):
    npu, oracle, reference, rounding = sides
    weights = int4_weights(384, zero_points)
    bias, x = torch.randn(48) if with_bias else None, reference.quantize_int4(random(tokens, 384, dtype=npu.dtype))
    got = npu.int4_linear(
        Quantized(x.values.npu(), x.scale.npu()), npu.int4_weight(*weights), None if bias is None else bias.npu()
    )
    assert_same(got, oracle.int4_linear(x, oracle.int4_weight(*weights), bias))
    expected = reference.int4_linear(x, reference.int4_weight(*weights), bias)
    assert_near(got, expected, 4 * rounding + 2 * 2.0**-9)


def test_quantize_int4_is_the_reference_s(sides):
    npu, _, reference, _ = sides
    x = random(6, 96, dtype=npu.dtype)
    x[2] = 0
    expected = reference.quantize_int4(x)
    assert_same(npu.quantize_int4(x.npu()), expected)
    assert expected.scale[2] == 1


def test_rotate(sides):
    npu, oracle, reference, rounding = sides
    x, matrix = random(6, 768, dtype=npu.dtype), hadamard(768, 128).to(npu.dtype)
    got = npu.rotate(x.npu(), matrix.npu())
    assert_same(got, oracle.rotate(x, matrix))
    assert_near(got, reference.rotate(x, matrix), 4 * rounding)


def test_four_bits_a_weight(sides):
    weight = sides[0].int4_weight(torch.zeros(64, 256, dtype=torch.int8), torch.ones(64, 2, dtype=torch.bfloat16))
    assert weight.values.nbytes == 64 * 256 // 2
    assert (weight.scale.shape, weight.scale.dtype, weight.group) == ((2, 64), sides[0].dtype, 128)
    assert weight.offset is None


def test_whole_zero_points_arrive_exactly():
    """Offsets are stored as -zero * scale in bfloat16; the operator wants them in steps."""
    scale = random(16 * 64, 1, dtype=torch.bfloat16).abs() + 1e-3
    zero = (torch.arange(16 * 64) % 16 - 8)[:, None]
    offset = (-zero.float() * scale.float()).bfloat16()
    weight = npu().int4_weight(torch.zeros(len(zero), 32, dtype=torch.int8), scale, offset)
    assert torch.equal(weight.offset.cpu(), -zero.t().bfloat16())


def test_zero_points_that_float16_cannot_hold_are_refused_in_one_line():
    weights = torch.zeros(16, 32, dtype=torch.int8), *(torch.full((16, 1), v).bfloat16() for v in (1e-6, 0.5))
    with pytest.raises(QuasarError, match="zero points beyond 65504 steps, which float16 cannot hold; use --dtype bf"):
        get_backend("npu", torch.float16).int4_weight(*weights)
    assert npu().int4_weight(*weights).offset.isfinite().all()


def test_a_layer_beyond_the_operator_s_limit_is_refused_in_one_line():
    with pytest.raises(QuasarError, match="a linear layer of 32 inputs and 65536 outputs cannot be int4 on Ascend"):
        npu().int4_weight(torch.zeros(65536, 32, dtype=torch.int8), torch.ones(65536, 1, dtype=torch.bfloat16))


def test_inference_cards_refuse_in_one_line(inference_card):
    card = InferenceCardBackend(torch.device("npu", 0), torch.float16, "Ascend310P3")
    with pytest.raises(QuasarError, match=r"Ascend310P3 has no int4 weights .*; use --precision w8a8 or full"):
        Int4(on_backend("qwen3", "full", card).config).check(card)


PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n    def push"
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}


def result_of(model, **options):
    return generate(model, PROMPT, max_new_tokens=16, ignore_eos=True, **options).result()


@cache
def plain_ids(family, precision, zero_points=False):
    """Of the oracle, without drafts: those must not matter."""
    return result_of(model_on(family, precision, oracle(), zero_points), draft="none", **GREEDY).token_ids


@pytest.mark.parametrize("draft", [{"draft": "none"}, {"draft": "ngram", "gamma": 4}], ids=["plain", "ngram"])
@pytest.mark.parametrize(
    ("family", "precision", "zero_points"),
    [
        *((family, precision, False) for family in FAMILIES for precision in ("w4a16", "w4a4")),
        ("qwen3", "w4a16", True),
        ("openpangu", "w4a4", True),
    ],
)
def test_same_ids_as_the_cpu_with_the_same_rounding(family, precision, draft, zero_points):
    result = result_of(model_on(family, precision, npu(), zero_points), **GREEDY, **draft)
    assert result.token_ids == plain_ids(family, precision, zero_points)
    if "gamma" in draft:
        assert result.stats.accepted > 0  # or the drafts would have been compared with nothing


def test_a_seed_says_the_same_with_and_without_drafts():
    model = model_on("openpangu", "w4a16", npu())
    drafted = result_of(model, draft="ngram", gamma=4, **SAMPLED)
    assert drafted.token_ids == result_of(model, draft="none", **SAMPLED).token_ids


@pytest.mark.parametrize(("family", "zero_points"), [*((family, False) for family in FAMILIES), ("qwen3", True)])
def test_qspec_drafts_in_w4a4_and_says_what_w4a16_says(family, zero_points):
    """Both decoders' graphs replay in turns on one KV cache, and the drafts are as good as the oracle's."""
    got, expected = (
        result_of(model_on(family, "w4a16", backend, zero_points), draft="self:w4a4", gamma=3, **GREEDY)
        for backend in (npu(), oracle())
    )
    assert got.token_ids == plain_ids(family, "w4a16", zero_points)
    assert got.stats.accepted == expected.stats.accepted > 0


def test_layers_are_skipped_on_the_npu_as_on_the_cpu():
    """self:skip drafts from W4A16: which layers go is measured on the device."""
    got, expected = (
        result_of(model_on("qwen3", "w4a16", backend), draft="self:skip=1", gamma=3, **GREEDY)
        for backend in (npu(), oracle())
    )
    assert got.token_ids == expected.token_ids
    assert got.stats.accepted == expected.stats.accepted > 0


@pytest.mark.parametrize(("precision", "zero_points"), [("w4a16", False), ("w4a4", False), ("w4a16", True)])
def test_as_near_to_float32_as_the_reference_backend_in_bfloat16(precision, zero_points):
    exact, plain, got = (
        logits_of(model_on("openpangu", precision, backend, zero_points))
        for backend in (ReferenceBackend("cpu", torch.float32), ReferenceBackend("cpu", torch.bfloat16), npu())
    )
    assert (got - exact).abs().mean() <= 1.15 * (plain - exact).abs().mean()


def test_quantised_from_a_checkpoint_and_measured_on_the_npu():
    """Random weights, and few: GPTQ of a shipped model is a hundred thousand calls of the emulation for each layer."""
    model = load(str(GOLDEN / "small-qwen3"), device="npu", precision="full")
    fidelity = quantize(model, [CALIBRATION], heldout=[PROMPT, CALIBRATION], precision="w4a16", force=True)
    assert 0 < fidelity.mean_kl < 0.02
    assert all(layer.down.packed.offset is not None and layer.down.packed.group == 32 for layer in model.decoder.layers)
    assert result_of(model, draft="none", **GREEDY).token_ids == result_of(model, **GREEDY).token_ids


@pytest.mark.parametrize("format", ["compressed-tensors", "ascend"])
def test_a_checkpoint_with_zero_points_says_the_same_ids(format, tmp_path):
    settings, texts = ExportSettings(format, "w4a16"), {"calibration": [CALIBRATION], "heldout": [PROMPT]}
    quantize_checkpoint(str(GOLDEN / "small-qwen3"), tmp_path / "out", settings, **texts, force=True)
    model = load(str(tmp_path / "out"), device="npu", dtype="bfloat16")
    assert model.precision == "w4a16"
    assert all(layer.qkv.packed.offset is not None for layer in model.decoder.layers)
    decoder = build_decoder(model.config, open_checkpoint(tmp_path / "out"), oracle())
    expected = result_of(replace(model, decoder=decoder), draft="none", **GREEDY).token_ids
    assert result_of(model, draft="ngram", gamma=4, **GREEDY).token_ids == expected
    drafted = result_of(model, draft="self:w4a4", gamma=3, **GREEDY)
    assert drafted.token_ids == expected and drafted.stats.accepted > 0


# (family, precision) -> launches per layer of a window of 6 tokens, and of a plain step.
LAUNCHES = {
    ("openpangu", "w4a16"): (12, 11),
    ("qwen3", "w4a16"): (14, 13),
}


@pytest.mark.parametrize("family_precision", LAUNCHES, ids="-".join)
def test_launches_per_layer(family_precision):
    decoder = model_on(*family_precision, npu()).decoder
    _, slot = runtime_of(decoder)
    for tokens, per_layer in zip((6, 1), LAUNCHES[family_precision], strict=True):
        batch, ids = window_of(slot, range(tokens)), torch.arange(tokens, device="npu")
        decoder(ids, batch)
        with counting() as counts:
            decoder(ids, batch)
        print(
            f"\n{' '.join(family_precision)}, {tokens} tokens: {per_layer} launches per layer, {dict(counts.launches)}"
        )
        assert counts.total_launches == per_layer * len(decoder.layers) + AROUND + (tokens > 1)
        assert not any(name.endswith("/contiguous") for name in counts.launches)
        assert counts.host_waits == counts.device_to_host == 0


@pytest.mark.parametrize(("precision", "zero_points"), [("w4a16", False), ("w4a4", False), ("w4a16", True)])
def test_captured_and_plain_windows_give_the_same_logits(precision, zero_points):
    decoder = model_on("qwen3", precision, npu(), zero_points).decoder
    runtime, slot = runtime_of(decoder)
    for count in range(4):
        batch = window_of(slot, [(7 * count + i) % 100 for i in range(4)])
        expected = decoder(torch.tensor(batch.ids).npu(), batch).cpu()
        with counting() as counts:
            logits = runtime.run(batch).cpu()
        assert counts.graph_replays == (count >= 1)  # run plainly once, then captured
        assert torch.equal(logits, expected)
        slot.commit(2)


def test_a_window_is_one_replay_one_copy_and_one_wait():
    runtime, slot = runtime_of(model_on("openpangu", "w4a16", npu()).decoder)
    for _ in range(2):  # run plainly, then captured
        step(runtime, slot)
    with counting() as counts:
        step(runtime, slot)
    assert (counts.graph_replays, counts.device_to_host, counts.host_waits) == (1, 1, 1)
