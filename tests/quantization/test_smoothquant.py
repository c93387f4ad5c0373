"""Smoothing changes nothing in full precision and much in int8."""

import pytest
import torch

from quasar import QuasarError, load, quantize
from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.models.config import read_config
from quasar.models.loader import build_decoder
from quasar.quantization import quantize_w8a8
from quasar.quantization.calibration import SMOOTHED, collect
from quasar.quantization.fidelity import FidelityProbe
from quasar.quantization.smoothquant import smooth_layer, smoothing_scales
from tests.conftest import FAMILIES, random_transformer, save_checkpoint

PROMPTS = [list(range(start, start + 30)) for start in range(0, 100, 10)]


def decoder_of(family, folder, dtype=torch.float32, outliers=False):
    # float64 is for computing in: checkpoints come in 32 bits at most.
    model = random_transformer(family, torch.float32 if dtype == torch.float64 else dtype)
    if outliers:  # a few loud channels: what real models have and SmoothQuant is for
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[3] = 40.0
                layer.post_attention_layernorm.weight[5] = 40.0
                layer.self_attn.v_proj.weight[2] *= 40
                layer.mlp.up_proj.weight[7] *= 40
    folder = save_checkpoint(model, folder)
    return build_decoder(read_config(folder), open_checkpoint(folder), get_backend("reference", dtype))


def logits(decoder):
    ids = torch.arange(100)
    return decoder.read(ids, logits_to_keep=100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_folding_is_exact_in_full_precision(family, alpha, tmp_path):
    decoder = decoder_of(family, tmp_path, torch.float64)
    before = logits(decoder)
    norms = [layer.input_norm.clone() for layer in decoder.layers]
    stats = collect(decoder, PROMPTS, sample=64)
    for layer in decoder.layers:
        smooth_layer(layer, stats[layer.index], alpha, torch.float32)
        assert (layer.input_norm - norms[layer.index]).abs().max() > 0.01  # it did something
    # Folded weights are float32, so exact means to float32's rounding.
    torch.testing.assert_close(logits(decoder), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_exact_although_norms_are_bfloat16(family, tmp_path):
    """What the norm is really divided by, after its rounding, is what the weight is multiplied by."""
    decoder = decoder_of(family, tmp_path, torch.bfloat16)
    stats = collect(decoder, PROMPTS)
    for layer in decoder.layers:
        before = layer.input_norm.float() * layer.qkv.weight.float()
        rows = layer.attention.heads * layer.attention.head_dim  # q: its rows are not divided
        smooth_layer(layer, stats[layer.index], 0.5, torch.bfloat16)
        after = layer.input_norm.float() * layer.qkv.weight
        torch.testing.assert_close(after[:rows], before[:rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_rescues_outliers(family, tmp_path):
    agreement = {}
    for alpha in (0.0, 0.5, None):
        decoder = decoder_of(family, tmp_path / str(alpha), outliers=True)
        probe = FidelityProbe(decoder, PROMPTS)
        quantize_w8a8(decoder, PROMPTS, alpha)
        agreement[alpha] = probe.compare(decoder).mean_kl
    assert agreement[0.5] < 0.6 * agreement[0.0]
    assert agreement[None] < 0.6 * agreement[0.0]


def test_scales_follow_the_formula():
    peak, weight = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([[1.0, -2.0, 0.5], [-4.0, 1.0, 0.25]])
    expected = torch.tensor([4**0.5 / 4**0.5, 1e-5**0.5 / 2**0.5, 9**0.5 / 0.5**0.5])
    torch.testing.assert_close(smoothing_scales(peak, weight, 0.5), expected)


def test_calibration_keeps_maxima_and_a_bounded_sample(tmp_path):
    decoder = decoder_of("qwen3", tmp_path)
    few, many = collect(decoder, PROMPTS[:2], sample=16), collect(decoder, PROMPTS * 4, sample=16)
    for layer_few, layer_many in zip(few, many, strict=True):
        assert set(layer_few) == set(SMOOTHED)
        for name in SMOOTHED:
            assert (layer_many[name].peak >= layer_few[name].peak).all()
            assert layer_few[name].rows.shape == layer_many[name].rows.shape == (16, len(layer_few[name].peak))
            assert (layer_many[name].rows.abs().amax(dim=0) <= layer_many[name].peak).all()


def test_the_sample_is_uniform_over_the_text():
    from quasar.quantization.calibration import InputStats

    stats = InputStats(torch.zeros(1), torch.zeros(0, 1), torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    for start in range(0, 10_000, 100):
        stats.update(torch.arange(start, start + 100.0)[:, None], 500, generator)
    assert abs(stats.rows.mean() - 5000) < 400  # 3 standard errors of the mean of 500 uniform draws
    assert len(stats.rows.unique()) == 500


def test_fidelity_of_an_unchanged_model_is_perfect(tmp_path):
    decoder = decoder_of("qwen3", tmp_path)
    fidelity = FidelityProbe(decoder, PROMPTS, tokens=50).compare(decoder)
    assert fidelity.tokens == 50
    assert (fidelity.mean_kl, fidelity.top1_agreement) == (0.0, 1.0)
    assert fidelity.perplexity == fidelity.perplexity_full > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_models_survive_quantisation(shipped, family):
    """The promise of the README: at least 97 % of held-out tokens keep their top-1."""
    fidelity = shipped(family, "w8a8").fidelity
    assert fidelity.tokens >= 4000
    assert fidelity.top1_agreement >= 0.97
    assert fidelity.perplexity < 1.02 * fidelity.perplexity_full


def test_garbage_is_refused_unless_forced(monkeypatch):
    def ruin(decoder, *_, **__):
        for layer in decoder.layers:
            layer.input_norm = layer.input_norm.flip(0) * 9

    monkeypatch.setattr("quasar.loading.quantize_w8a8", ruin)
    with pytest.raises(QuasarError, match="unusable; try --alpha auto"):
        quantize(load(device="reference"))
    assert quantize(load(device="reference"), force=True).top1_agreement < 0.8


def test_not_a_number_is_garbage_too(monkeypatch):
    def break_it(decoder, *_, **__):
        decoder.norm = decoder.norm * torch.nan

    monkeypatch.setattr("quasar.loading.quantize_w8a8", break_it)
    with pytest.raises(QuasarError, match="unusable"):
        quantize(load(device="reference"))


def test_a_model_is_quantised_once(shipped):
    with pytest.raises(QuasarError, match="already quantised or in use"):
        quantize(shipped("qwen3", "w8a8"))


def test_alpha_is_checked():
    with pytest.raises(QuasarError, match=r"alpha 1\.5"):
        quantize(load(device="reference"), alpha=1.5)
