"""Smoothing changes nothing in full precision and much in int8."""

from dataclasses import replace

import pytest
import torch

from quasar import QuasarError, load, quantize
from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.weights import LINEARS
from quasar.models.build import assemble
from quasar.models.config import read_config
from quasar.models.loader import CheckpointWeights
from quasar.quantization.calibration import InputStats
from quasar.quantization.fidelity import FidelityProbe
from quasar.quantization.methods import W8A8
from quasar.quantization.smoothquant import smoothing_scales
from quasar.quantization.stream import quantized_decoder
from tests.conftest import FAMILIES, random_transformer, save_checkpoint

PROMPTS = [list(range(start, start + 30)) for start in range(0, 100, 10)]


def weights_of(family, folder, dtype=torch.float32, outliers=False):
    """A random checkpoint's configuration, weights, and the reference backend in that type."""
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
    config, backend = read_config(folder), get_backend("reference", dtype)
    return config, CheckpointWeights(config, open_checkpoint(folder), backend.place), backend


def logits(decoder):
    ids = torch.arange(100)
    return decoder.read(ids, logits_to_keep=100)


class Smoothing(W8A8):
    """Smooths, and rounds nothing. Keeps every layer as it was and as it became."""

    def __init__(self, config, alpha):
        super().__init__(config, alpha)
        self.seen = []

    def adapt(self, prepared, stats):
        smoothed = super().adapt(prepared, stats)
        self.seen.append((prepared, smoothed))
        return smoothed

    def round(self, adapted, stats):
        return adapted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_folding_is_exact_in_full_precision(family, alpha, tmp_path):
    config, weights, backend = weights_of(family, tmp_path, torch.float64)
    before = logits(assemble(config, weights, backend))
    method = Smoothing(config, alpha)
    smoothed, _ = quantized_decoder(config, weights, backend, method, PROMPTS)
    for old, new in method.seen:
        assert (old.input_norm - new.input_norm).abs().max() > 0.01  # it did something
    # Folded weights are float32, so exact means to float32's rounding.
    torch.testing.assert_close(logits(smoothed), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_exact_although_norms_are_bfloat16(family, tmp_path):
    """What the norm is really divided by, after its rounding, is what the weight is multiplied by."""
    config, weights, backend = weights_of(family, tmp_path, torch.bfloat16)
    method = Smoothing(config, 0.5)
    quantized_decoder(config, weights, backend, method, PROMPTS)
    for old, new in method.seen:
        rows = config.num_heads * config.head_dim  # q: its rows are not divided
        before, after = (layer.input_norm.float() * layer.qkv.weight.float() for layer in (old, new))
        torch.testing.assert_close(after[:rows], before[:rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_rescues_outliers(family, tmp_path):
    kl = {}
    for alpha in (0.0, 0.5, None):
        config, weights, backend = weights_of(family, tmp_path / str(alpha), outliers=True)
        _, fidelity = quantized_decoder(config, weights, backend, W8A8(config, alpha), PROMPTS, PROMPTS)
        kl[alpha] = fidelity.mean_kl
    assert kl[0.5] < 0.6 * kl[0.0]
    assert kl[None] < 0.6 * kl[0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_figures_are_those_of_the_whole_decoders(family, tmp_path):
    """Hidden states that walk through one layer at a time end where whole decoders end."""
    config, weights, backend = weights_of(family, tmp_path)
    probe = FidelityProbe(assemble(config, weights, backend), PROMPTS)
    made, fidelity = quantized_decoder(config, weights, backend, W8A8(config), PROMPTS, PROMPTS)
    whole = probe.compare(made)
    assert fidelity.tokens == whole.tokens
    assert fidelity.mean_kl == pytest.approx(whole.mean_kl, rel=1e-3)


def test_scales_follow_the_formula():
    peak, weight = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([[1.0, -2.0, 0.5], [-4.0, 1.0, 0.25]])
    expected = torch.tensor([4**0.5 / 4**0.5, 1e-5**0.5 / 2**0.5, 9**0.5 / 0.5**0.5])
    torch.testing.assert_close(smoothing_scales(peak, weight, 0.5), expected)


def stats_of(folder, prompts, sample):
    config, weights, backend = weights_of("qwen3", folder)
    seen = []

    class Looking(W8A8):
        def adapt(self, prepared, stats):
            seen.append(stats)
            return prepared

    method = Looking(config)
    method.sample = sample
    quantized_decoder(config, weights, backend, method, prompts)
    return seen


def test_calibration_keeps_maxima_and_a_bounded_sample(tmp_path):
    few, many = stats_of(tmp_path, PROMPTS[:2], 16), stats_of(tmp_path, PROMPTS * 4, 16)
    for layer_few, layer_many in zip(few, many, strict=True):
        assert set(layer_few) == set(LINEARS)
        for name in LINEARS:
            assert (layer_many[name].peak >= layer_few[name].peak).all()
            assert layer_few[name].rows.shape == layer_many[name].rows.shape == (16, len(layer_few[name].peak))
            assert (layer_many[name].rows.abs().amax(dim=0) <= layer_many[name].peak).all()


def test_the_sample_is_uniform_over_the_text():
    stats = InputStats.empty(1)
    generator = torch.Generator().manual_seed(1)
    for start in range(0, 10_000, 100):
        stats.update(torch.arange(start, start + 100.0)[:, None], torch.ones(100), 500, generator)
    assert abs(stats.rows.mean() - 5000) < 400  # 3 standard errors of the mean of 500 uniform draws
    assert len(stats.rows.unique()) == 500


def test_fidelity_of_an_unchanged_model_is_perfect(tmp_path):
    decoder = assemble(*weights_of("qwen3", tmp_path))
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
    def ruin(self, adapted, stats):
        return replace(adapted, input_norm=adapted.input_norm.flip(0) * 9)

    monkeypatch.setattr(W8A8, "round", ruin)
    with pytest.raises(QuasarError, match="unusable; try --budget 5%"):
        quantize(load(device="cpu"))
    assert quantize(load(device="cpu"), force=True).top1_agreement < 0.8


def test_not_a_number_is_garbage_too(monkeypatch):
    def break_it(self, head):
        return replace(head, norm=head.norm * torch.nan)

    monkeypatch.setattr(W8A8, "head", break_it)
    with pytest.raises(QuasarError, match="unusable"):
        quantize(load(device="cpu"))


def test_a_model_is_quantised_once(shipped):
    with pytest.raises(QuasarError, match="already quantised"):
        quantize(shipped("qwen3", "w8a8"))


def test_alpha_is_checked():
    with pytest.raises(QuasarError, match=r"alpha 1\.5"):
        quantize(load(device="reference"), alpha=1.5)
