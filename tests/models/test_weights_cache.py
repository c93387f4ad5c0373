"""What is quantised once is mapped from then on: the same model, only sooner; and a damaged cache costs time alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from quasar import QuasarError, load
from quasar.checkpoints.weights import FullWeights, HeadWeights, Int4Weights, Int8Weights, LayerWeights
from quasar.cli import main
from quasar.models.weights_cache import WeightsCache
from quasar.quantization.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["def main():\n    return 1\n", "The quick brown fox jumps over the lazy dog."]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "small-qwen3", tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "cache")


def quantized(checkpoint: Path, cache: WeightsCache, **options):
    options = {"precision": "w8a8", "prompts": TEXTS, "heldout": TEXTS, "force": True, "device": "reference"} | options
    return load(checkpoint, cache=cache, **options)


def logits(model) -> torch.Tensor:
    return model.decoder.read([5, 6, 7, 8, 9, 10], logits_to_keep=6)


def no_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise AssertionError("quantised again")

    monkeypatch.setattr("quasar.loading.quantized_decoder", fail)


@pytest.mark.parametrize("precision", ["w8a8", "w4a16", "w4a4"])
@pytest.mark.parametrize("lm_head", ["full", "w8a8"])
def test_the_second_start_maps_the_same_model(checkpoint, cache, precision, lm_head, monkeypatch):
    first = quantized(checkpoint, cache, precision=precision, lm_head=lm_head, device="cpu")
    no_quantising(monkeypatch)
    second = quantized(checkpoint, cache, precision=precision, lm_head=lm_head, device="cpu")
    assert torch.equal(logits(first), logits(second))
    assert second.fidelity == first.fidelity
    assert second.precision == precision
    assert second.decoder.weight_bytes_per_pass == first.decoder.weight_bytes_per_pass


def test_w4a4_is_w4a16_with_other_activations(checkpoint, cache, monkeypatch):
    quantized(checkpoint, cache, precision="w4a16", device="cpu")
    no_quantising(monkeypatch)
    assert quantized(checkpoint, cache, precision="w4a4", device="cpu").precision == "w4a4"


def test_whatever_weights_depend_on_makes_another_entry(checkpoint, cache, monkeypatch):
    count = 0

    def entries_grew() -> bool:
        nonlocal count
        before, count = count, len(cache.entries())
        return count == before + 1

    quantized(checkpoint, cache)
    assert entries_grew()
    quantized(checkpoint, cache)
    assert not entries_grew()
    quantized(checkpoint, cache, prompts=TEXTS[:1])
    assert entries_grew()
    quantized(checkpoint, cache, heldout=TEXTS[:1])
    assert entries_grew()
    quantized(checkpoint, cache, recipe=Recipe(alpha=0.3))
    assert entries_grew()
    quantized(checkpoint, cache, lm_head="w8a8")
    assert entries_grew()
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    quantized(checkpoint, cache)
    assert entries_grew()
    monkeypatch.setattr("quasar.loading.source_digest", lambda _: "other code")
    quantized(checkpoint, cache)
    assert entries_grew()


def test_damage_is_seen_and_mended(checkpoint, cache):
    expected = logits(quantized(checkpoint, cache))
    (entry,) = cache.entries()
    for path in sorted(entry.folder.iterdir()):
        whole = path.read_bytes()
        for spoiled in (whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:], b"", None):
            if spoiled is None:
                path.unlink()
            else:
                path.write_bytes(spoiled)
            assert torch.equal(logits(quantized(checkpoint, cache)), expected), path.name
            assert path.read_bytes() == whole


def test_a_run_that_was_killed_leaves_no_entry(checkpoint, cache, monkeypatch):
    def killed(self, about):
        raise KeyboardInterrupt

    monkeypatch.setattr("quasar.models.weights_cache.CacheWriter.finish", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(checkpoint, cache)
    assert cache.entries() == []
    monkeypatch.undo()
    quantized(checkpoint, cache)
    assert len(cache.entries()) == 1


def test_a_failure_while_quantising_leaves_nothing(checkpoint, cache, monkeypatch):
    monkeypatch.setattr("quasar.quantization.stream.LayerQuantizer.head", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantized(checkpoint, cache)
    assert not list(cache.folder.glob(".*-*"))


def test_the_bound_keeps_the_latest_used(checkpoint, tmp_path):
    cache = WeightsCache(tmp_path / "cache")
    for alpha in (0.3, 0.4, 0.5):
        quantized(checkpoint, cache, recipe=Recipe(alpha=alpha))
    oldest, middle, latest = cache.entries()
    past = time.time()
    for age, entry in ((300, latest), (200, oldest), (100, middle)):
        os.utime(entry.folder / "entry.json", (past - age, past - age))
    bounded = WeightsCache(tmp_path / "cache", gigabytes=2.5 * oldest.nbytes / 1e9)
    quantized(checkpoint, bounded, recipe=Recipe(alpha=0.6))
    kept = {entry.key for entry in cache.entries()}
    assert middle.key in kept
    assert not {oldest.key, latest.key} & kept
    assert len(kept) == 2


def test_switched_off(checkpoint, tmp_path):
    quantized(checkpoint, WeightsCache(tmp_path / "cache", gigabytes=0))
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(checkpoint, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    quantized(checkpoint, WeightsCache(tmp_path / "cache"))
    assert "cannot be written" in caplog.text


def test_garbage_is_refused_from_the_cache_too(checkpoint, cache, monkeypatch):
    monkeypatch.setattr("quasar.loading.MIN_AGREEMENT", {"w8a8": 2.0})
    quantized(checkpoint, cache, force=True)
    no_quantising(monkeypatch)
    with pytest.raises(QuasarError, match="unusable"):
        quantized(checkpoint, cache, force=False)


def test_a_model_without_a_tokenizer_is_calibrated_on_its_own_text(checkpoint, cache):
    for path in checkpoint.glob("token*"):
        path.unlink()
    model = quantized(checkpoint, cache, prompts=None, heldout=None)
    assert model.fidelity is None
    assert logits(model).isfinite().all()
    full = load(checkpoint, device="reference")
    assert 0 < (logits(model) - logits(full)).abs().max() < 0.5


def test_ids_for_a_model_without_a_tokenizer_at_the_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "own"))
    for path in checkpoint.glob("token*"):
        path.unlink()
    argv = ["generate", "--model", str(checkpoint), "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--ignore-eos"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 4 and all(word.isdigit() for word in out.split())
    assert "4 tokens" in err
    assert main(["cache", "list"]) == 0
    assert "w8a8" in capsys.readouterr().out


def test_list_and_clear(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "own"))
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith("0 quantised models, 0.00 GB of at most 20 GB")
    cache = WeightsCache()
    quantized(checkpoint, cache)
    quantized(checkpoint, cache, recipe=Recipe(alpha=0.3))
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "w8a8, mean KL " in lines[0]
    assert lines[-1].startswith("2 quantised models")
    assert main(["cache", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["entries"]
    assert rows[0]["precision"] == "w8a8"
    assert rows[0]["fidelity"]["mean_kl"] == rows[0]["mean_kl"]
    assert main(["cache", "clear", "nothing"]) == 2
    assert "KEY nothing: no entry" in capsys.readouterr().err
    assert main(["cache", "clear", lines[0].split()[0]]) == 0
    assert len(cache.entries()) == 1
    assert main(["cache", "clear"]) == 0
    assert cache.entries() == []
    monkeypatch.setenv("QUASAR_CACHE_GB", "much")
    assert main(["cache", "list"]) == 2
    assert "QUASAR_CACHE_GB is 'much'" in capsys.readouterr().err


def test_every_kind_of_weights_comes_back_as_it_was(cache):
    torch.manual_seed(0)

    def int8(out: int) -> Int8Weights:
        return Int8Weights(torch.randint(-127, 128, (out, 8), dtype=torch.int8), torch.rand(out), None)

    values = torch.randint(-8, 8, (4, 8), dtype=torch.int8)
    int4 = Int4Weights(values, torch.rand(4, 1).bfloat16(), None, torch.rand(4), torch.rand(2, 2))
    table = torch.rand(6, 8).bfloat16()
    full = FullWeights(torch.rand(4, 8).half(), None)
    layer = LayerWeights(3, torch.rand(8), None, torch.rand(2), int8(4), int4, torch.rand(8), full, int8(5))
    writer = cache.writer("0" * 32)
    writer.embedding(table)
    writer.layer(layer)
    writer.head(HeadWeights(torch.rand(8), FullWeights(table, None)), table)
    writer.finish({"model": "parts"})
    read = cache.open("0" * 32)
    assert torch.equal(read.embedding(), table)
    assert read.head(table).lm_head.weight is table
    back = read.layer(3)
    assert (back.index, back.q_norm) == (3, None)
    assert torch.equal(back.k_norm, layer.k_norm)
    for name, weights in layer.linears().items():
        other = getattr(back, name)
        assert type(other) is type(weights)
        for field, value in vars(weights).items():
            found = getattr(other, field)
            same = torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
            assert same, (name, field)
