"""`quantize_checkpoint`: what is written is what quantising in memory gives, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quasar import QuasarError, load, quantize
from quasar.checkpoints import WRITERS, open_checkpoint
from quasar.export import export as exporting
from quasar.export import workspace
from quasar.export.export import quantize_checkpoint
from quasar.export.settings import ExportSettings
from quasar.models.linear import FullLinear, W8A8Linear
from quasar.models.loader import PROJECTIONS
from quasar.models.model import LoadOptions, open_model
from quasar.quantization.recipe import Recipe
from quasar.quantization.stream import quantized_decoder
from quasar.quantization.texts import calibration_and_heldout

FORMATS = tuple(WRITERS)
TEXTS = ["def main():\n    print('hello')\n" * 8, "One two three four five, once I caught a fish alive." * 3]
HELDOUT = ["Six seven eight nine ten, then I let it go again." * 4]
CPU = LoadOptions(device="reference")


def export(model: Path, output: Path, *, force: bool = True, **settings: object) -> None:
    """Random models are refused as garbage now and then, hence force."""
    if "alpha" in settings:
        settings["recipe"] = Recipe(alpha=settings.pop("alpha"))
    made = ExportSettings(**settings)
    quantize_checkpoint(str(model), output, made, calibration=TEXTS, heldout=HELDOUT, options=CPU, force=force)


def logits(folder: Path) -> torch.Tensor:
    return logits_of(load(str(folder), device="reference"))


def logits_of(model: object) -> torch.Tensor:
    ids = list(range(5, 90))
    return model.decoder.read(ids, logits_to_keep=len(ids))


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "openpangu"])
@pytest.mark.parametrize("alpha", [0.5, None, "fitted"])
def test_saved_is_bit_for_bit_what_quantising_in_memory_gives(
    family: str, alpha: float | None, small: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(str(small(family)), device="reference")
    quantize(model, TEXTS, heldout=HELDOUT, alpha=alpha, force=True)
    for name in FORMATS:
        export(small(family), tmp_path / name, format=name, alpha=alpha)
        assert torch.equal(logits(tmp_path / name), logits_of(model))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["qwen3-tied", "openpangu"])
@pytest.mark.parametrize("group", [32, 64])
def test_int4_with_zero_points_is_read_back(
    name: str, family: str, group: int, small: Callable[[str], Path], tmp_path: Path
) -> None:
    """As vLLM's pack-quantized and msModelSlim have it: what is read is what the method made."""
    export(small(family), tmp_path / "out", format=name, scheme="w4a16", group=group)
    model = load(str(tmp_path / "out"), device="reference")
    assert model.precision == "w4a16"
    full = open_model(str(small(family)), CPU)
    texts, _ = calibration_and_heldout(full.config, full.tokenizer, TEXTS, HELDOUT)
    method = ExportSettings(name, "w4a16", group=group).method(full.config, [])
    made, _ = quantized_decoder(full.config, full.weights, full.backend, method, texts)
    ids = list(range(5, 90))
    assert torch.equal(logits(tmp_path / "out"), made.read(ids, logits_to_keep=len(ids)))
    width = full.config.intermediate_size
    down = "model.layers.0.mlp.down_proj"
    shapes = {name: t.shape for name, t in load_file(next((tmp_path / "out").glob("*00002-*"))).items()}
    if name == "compressed-tensors":
        assert shapes[f"{down}.weight_zero_point"] == (8, width // group)
        return
    assert shapes[f"{down}.weight"] == (32, width)
    assert shapes[f"{down}.weight_offset"] == shapes[f"{down}.weight_scale"] == (64, width // group)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert (description["version"], description["group_size"]) == ("1.0.0", group)
    assert description[f"{down}.weight_offset"] == description["model_quant_type"] == "W4A16"


@pytest.mark.parametrize("name", FORMATS)
def test_kept_inputs_are_named_and_read_back(name: str, small: Callable[[str], Path], tmp_path: Path) -> None:
    export(small("qwen3"), tmp_path / "out", format=name, recipe=Recipe(budget=0.1))
    model = load(str(small("qwen3")), device="reference")
    quantize(model, TEXTS, heldout=HELDOUT, budget=0.1, force=True)
    assert torch.equal(logits(tmp_path / "out"), logits_of(model))
    full = [
        f"model.layers.{layer.index}.{part}"
        for layer in model.decoder.layers
        for fused, parts in PROJECTIONS.items()
        for part in parts
        if isinstance(getattr(layer, fused), FullLinear)
    ]
    assert full
    if name == "compressed-tensors":
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        assert fields["quantization_config"]["ignore"] == [*sorted(full), "lm_head"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"layer {full[0].split('.')[2]}" in card
    assert not list((tmp_path / "out").glob("*.resume"))


@pytest.mark.parametrize("family", ["qwen3", "openpangu"])
def test_static_scales_mean_the_same_in_both_formats(family: str, small: Callable[[str], Path], tmp_path: Path) -> None:
    for name in FORMATS:
        export(small(family), tmp_path / name, format=name, scheme="w8a8-static")
    theirs, ours = logits(tmp_path / "ascend"), logits(tmp_path / "compressed-tensors")
    # Not bit for bit: Ascend rounds biases to the accumulator's grid.
    assert (theirs - ours).norm() < 0.01 * ours.norm()
    full = logits(small(family))
    assert 0 < (ours - full).norm() < 0.2 * full.norm()
    layer = load(str(tmp_path / "ascend"), device="reference").decoder.layers[0]
    assert isinstance(layer.qkv, W8A8Linear)
    assert layer.qkv.activation_quant is not None  # symmetric, so a backend may fuse it
    assert layer.qkv.activation_quant.static_scale.shape == (1,)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_lm_head_in_int8_unties_it(name: str, scheme: str, small: Callable[[str], Path], tmp_path: Path) -> None:
    export(small("qwen3-tied"), tmp_path / "out", format=name, scheme=scheme, lm_head="w8a8")
    model = load(str(tmp_path / "out"), device="reference")
    assert isinstance(model.decoder.lm_head, W8A8Linear)
    assert not model.config.tie_word_embeddings
    full = logits(small("qwen3-tied"))
    assert (logits_of(model) - full).norm() < 0.2 * full.norm()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
@pytest.mark.parametrize("wide", [("lm_head",), ("qkv", "down", "lm_head")])
def test_a_wide_lm_head_is_read_back(
    scheme: str, wide: tuple[str, ...], small: Callable[[str], Path], tmp_path: Path
) -> None:
    made = Recipe(wide=wide)
    export(
        small("qwen3-tied"), tmp_path / "out", format="compressed-tensors", scheme=scheme, lm_head="w8a8", recipe=made
    )
    model = load(str(tmp_path / "out"), device="reference")
    assert isinstance(model.decoder.lm_head, W8A8Linear)
    full = logits(small("qwen3-tied"))
    assert (logits_of(model) - full).norm() < 0.2 * full.norm()


def test_what_comes_along(small: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(small("qwen3"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenization_openpangu.py").write_text("# code\n")
    (source / "LICENSE").write_text("yes\n")
    (source / "training_args.bin").write_bytes(b"pickle")
    export(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja", "tokenization_openpangu.py"} <= names
    assert {"LICENSE", "README.md", "config.json", "model.safetensors.index.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".tmp")) or "resume" in name]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(word in card for word in ("mean KL", "top-1 agreement", "perplexity", "SmoothQuant", "vllm serve"))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())


def test_interrupted_and_run_again_it_resumes(
    small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(small("qwen3"), tmp_path / "whole")
    layer, ran = exporting._Export._layer, []

    def interrupted(self: object, step: int, hidden: list) -> list:
        if step == 2:
            raise KeyboardInterrupt
        ran.append(step)
        return layer(self, step, hidden)

    monkeypatch.setattr(exporting._Export, "_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(small("qwen3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()  # nothing would take it for a checkpoint

    with pytest.raises(QuasarError, match="begun with another recipe; remove it, or repeat that command"):
        export(small("qwen3"), tmp_path / "out", alpha=0.7)

    monkeypatch.setattr(exporting._Export, "_layer", lambda *args: ran.append(args[1]) or layer(*args))
    export(small("qwen3"), tmp_path / "out")
    assert ran == [1, 2]  # the first layer was not done again
    assert not (tmp_path / "out.partial").exists()
    for file in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "out" / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("event", range(1, 5))
def test_killed_at_the_end_it_loses_nothing(
    event: int, small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last file and the last trace of the work: four unlinks, renames and writes."""
    export(small("qwen3"), tmp_path / "whole")
    left = [event]

    def dying(original: Callable) -> Callable:
        def step(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return step

    complete = workspace.Workspace.complete

    def then_die(self: workspace.Workspace, figures: dict) -> None:
        complete(self, figures)
        for name in ("unlink", "rename"):
            monkeypatch.setattr(Path, name, dying(getattr(Path, name)))

    monkeypatch.setattr(workspace.Workspace, "complete", then_die)
    with monkeypatch.context():
        try:
            export(small("qwen3"), tmp_path / "out")
        except KeyboardInterrupt:
            assert event < 4
    monkeypatch.undo()
    monkeypatch.setattr(exporting._Export, "run", None)  # nothing is computed again
    if event < 4:
        export(small("qwen3"), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name != "README.md"}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_one_line_and_loses_nothing(
    error: Exception, small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = workspace.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        if "00003" in path.name:
            path.write_bytes(b"half")
            raise error
        save(tensors, path, metadata)

    monkeypatch.setattr(workspace, "save_file", full)
    with pytest.raises(QuasarError, match=r"00003-of-00004\.safetensors: cannot be written \(the disk is full\)"):
        export(small("qwen3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    monkeypatch.undo()
    export(small("qwen3"), tmp_path / "out")
    assert load(str(tmp_path / "out"), device="reference").precision == "w8a8"


def test_too_little_space_is_said_before_the_work(
    small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(QuasarError, match="GB are needed"):
        export(small("qwen3"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_garbage_is_refused_and_removed(small: Callable[[str], Path], tmp_path: Path, edit: Callable) -> None:
    source = tmp_path / "source"
    shutil.copytree(small("qwen3"), source)
    edit(source, {"model.layers.1.mlp.down_proj.weight": lambda w: torch.full_like(w, float("nan"))})
    with pytest.raises(QuasarError, match="unusable"):
        export(source, tmp_path / "out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refusals(small: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(QuasarError, match="out exists; name a new folder, or remove it"):
        export(small("qwen3"), tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "somebody's").write_text("")
    with pytest.raises(QuasarError, match=r"new\.partial is no interrupted run"):
        export(small("qwen3"), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(QuasarError, match=r"cannot be made \(Not a directory\)"):
        export(small("qwen3"), tmp_path / "file" / "out")
    export(small("qwen3"), tmp_path / "done")
    with pytest.raises(QuasarError, match=r"already quantised \(compressed-tensors\)"):
        export(tmp_path / "done", tmp_path / "again")
    with pytest.raises(QuasarError, match="between 0 and 1"):
        export(small("qwen3"), tmp_path / "other", alpha=2.0)
    with pytest.raises(QuasarError, match="scheme w4 is unknown"):
        export(small("qwen3"), tmp_path / "other", scheme="w4")


def test_two_at_once_into_one_folder(
    small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused, and takes nothing from the first."""
    export(small("qwen3"), tmp_path / "whole")
    layer = exporting._Export._layer

    def meanwhile(self: object, step: int, states: object) -> object:
        with pytest.raises(QuasarError, match=r"out\.partial: another process writes into it"):
            export(small("qwen3"), tmp_path / "out")
        return layer(self, step, states)

    monkeypatch.setattr(exporting._Export, "_layer", meanwhile)
    export(small("qwen3"), tmp_path / "out")
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.name != "README.md"]
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_the_index_is_complete_and_the_description_names_every_tensor(
    small: Callable[[str], Path], tmp_path: Path
) -> None:
    export(small("qwen3-tied"), tmp_path / "out", format="ascend", scheme="w8a8-static")
    folder = open_checkpoint(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert described.pop("version")
    assert described.pop("model_quant_type") == "W8A8"
    assert described.pop("lm_head.weight") == "FLOAT"  # tied: asked for, and not there
    assert described.keys() == folder.files.keys()
    assert described["model.layers.0.self_attn.q_proj.deq_scale"] == "W8A8"
    assert described["model.layers.0.input_layernorm.weight"] == "FLOAT"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
