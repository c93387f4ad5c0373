"""`quasar quantize`: a full-precision checkpoint in, a W8A8 checkpoint out, one decoder layer in memory at a time.

Three sets of hidden states walk through the layers: the calibration set in full precision, which each layer is
smoothed by, and the held-out set in full precision and in W8A8, which show at the end what quantising did. Every
layer is written, and the hidden states behind it, before the next is read. So an interrupted run resumes, in a folder
beside the output that takes its name when everything is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import Backend
from quasar.checkpoints import GGUFSource
from quasar.checkpoints.folder import read_json
from quasar.checkpoints.gguf import gguf_config
from quasar.checkpoints.weights import FullWeights, LayerWeights
from quasar.errors import QuasarError
from quasar.export.model_card import model_card
from quasar.export.settings import ExportSettings
from quasar.export.workspace import Workspace, refuse_existing
from quasar.loading import quantized_bytes, require_agreement
from quasar.models.fidelity import Fidelity
from quasar.models.loader import PROJECTIONS, output_sizes, split
from quasar.models.model import Checkpoint, LoadOptions, find_checkpoint, open_model
from quasar.models.opening import check_shapes
from quasar.quantization.budget import Kept, choose_kept, describe
from quasar.quantization.methods import Method
from quasar.quantization.recipe import pass_bytes
from quasar.quantization.stream import HiddenStates, LayerQuantizer
from quasar.quantization.texts import calibration_and_heldout

_KEPT = "kept.resume"
log = logging.getLogger(__name__)


def quantize_checkpoint(
    model: str,
    output: Path,
    settings: ExportSettings,
    *,
    calibration: Sequence[str] | None = None,
    heldout: Sequence[str] | None = None,
    options: LoadOptions | None = None,
    force: bool = False,
    command: str = "",
    report: Callable[[str], object] = log.info,
) -> Fidelity:
    """Writes a W8A8 checkpoint of `model` (a folder, a shipped model or a hub name) into the new folder `output`.

    calibration and heldout are texts (None: built-in ones); command goes into the model card. An interrupted run
    leaves `output`.partial and goes on from there when it is called with the same arguments. Raises QuasarError on
    what the user can put right, and, unless force, when the result is garbage.
    """
    options = options or LoadOptions()
    refuse_existing(output)
    folder = find_checkpoint(model, options.trust_remote_code)
    found = open_model(str(folder), options)
    config, backend = found.config, found.backend
    if found.is_quantized:
        form = found.weights.source.format
        raise QuasarError(f"{model} is already quantised ({form}); quantise the model it was made of")
    if config.rope_scaling is not None and config.rope_scaling.kind == "factors":
        raise QuasarError(
            f"{model}: its rotary divisors have no place in config.json; quantise the original checkpoint"
        )
    if found.tokenizer is None:
        raise QuasarError(f"{model} has no tokenizer: there is no text to calibrate and measure on")
    # Shapes and names now rather than after hours: no weight is read on the meta device.
    check_shapes(config, found.weights.source)
    sequences, measured = calibration_and_heldout(config, found.tokenizer, calibration, heldout)
    work = Workspace(output, _identity(folder, settings, sequences, measured, backend))
    with work.alone():
        figures = work.figures
        if figures is not None:
            work.finish()
            return Fidelity(**figures)
        work.require_space(quantized_bytes(config, settings.scheme.partition("-")[0], settings.lm_head))
        kept = _kept(found, settings, work, sequences, options.progress)
        report(f"method: {settings.how()}")
        if settings.recipe.budget:
            report(describe(kept, pass_bytes(config)))
        method = settings.method(config, [(each.layer, each.name) for each in kept])
        # Before the weights, so that config.json comes when all else that a loader wants is there.
        if folder.is_file():
            _write_tokenizer(found, work)
        else:
            work.copy_from(folder)
        fidelity = _Export(found, settings, work, method, sequences, measured).run(options.progress)
        try:
            require_agreement(model, fidelity, settings.scheme.partition("-")[0], force=force)
        except QuasarError:
            work.discard()
            raise
        of = "Quasar's built-in prompts" if calibration is None else "the file named in the command"
        calibrated = f"{sum(map(len, sequences))} tokens of {of}"
        card = model_card(model, folder, settings, fidelity, command, settings.how(), calibrated, kept)
        work.write_text("README.md", card)
        work.complete(asdict(fidelity))
        work.finish()
        return fidelity


def _write_tokenizer(found: Checkpoint, work: Workspace) -> None:
    """What a GGUF file holds of a tokenizer, in the files that others read."""
    with tempfile.TemporaryDirectory() as scratch:
        found.tokenizer.save_pretrained(Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            work.write_text(path.name, path.read_text(encoding="utf-8"))


def _kept(
    found: Checkpoint, settings: ExportSettings, work: Workspace, sequences: list[list[int]], progress: bool
) -> list[Kept]:
    """The layers that stay in 16 bits; chosen once, also by a run that was interrupted."""
    budget = int(settings.recipe.budget * pass_bytes(found.config))
    if not budget or settings.scheme == "w4a16":
        return []
    if work.note(_KEPT) is None:
        method = settings.method(found.config, [])
        kept = choose_kept(found.config, found.weights, found.backend, method, sequences, budget, progress)
        work.write_text(_KEPT, json.dumps([asdict(each) for each in kept]))
    return [Kept(**fields) for fields in json.loads(work.note(_KEPT))]


class _Export:
    """One run through the layers."""

    def __init__(
        self,
        found: Checkpoint,
        settings: ExportSettings,
        work: Workspace,
        method: Method,
        sequences: list[list[int]],
        measured: list[list[int]],
    ) -> None:
        c = found.config
        self.found = found
        self.settings = settings
        self.work = work
        self.config = c
        self.quantizer = LayerQuantizer(c, found.weights, found.backend, method, sequences, measured)
        self.writer = settings.writer()
        self.steps = c.num_layers + 2  # the embedding, the layers, the head: a shard each

    @torch.inference_mode()
    def run(self, progress: bool) -> Fidelity:
        """Goes on where an interrupted run stopped."""
        done, hidden = self.work.state()
        if done:
            states = self._states([x.to(self.found.backend.device) for x in hidden])
        else:
            self._write(0, {"model.embed_tokens.weight": self.found.weights.embedding()})
            states = self.quantizer.start()
            done = 1
            self._save(done, states)
        layers = self.config.num_layers
        bar = tqdm(range(1, layers + 1), "quantising", unit="layer", disable=not progress, initial=done - 1)
        for step in bar:
            if step >= done:
                states = self._layer(step, states)
                self._save(step + 1, states)
        return self._head(states)

    def _layer(self, step: int, states: HiddenStates) -> HiddenStates:
        made, _, states = self.quantizer.layer(step - 1, states)
        self._write(step, self._tensors(made))
        return states

    def _tensors(self, made: LayerWeights) -> dict[str, Tensor]:
        """As the format wants them."""
        c, at = self.config, f"model.layers.{made.index}"
        norms = {
            "input_layernorm": made.input_norm,
            "post_attention_layernorm": made.post_norm,
            "self_attn.q_norm": made.q_norm,
            "self_attn.k_norm": made.k_norm,
        }
        tensors = {f"{at}.{name}.weight": norm.to(c.dtype) for name, norm in norms.items() if norm is not None}
        sizes = output_sizes(c)
        for fused, names in PROJECTIONS.items():
            for name, part in zip(names, split(getattr(made, fused), sizes[fused]), strict=True):
                tensors |= self.writer.linear(f"{at}.{name}", part, c.dtype)
        return tensors

    def _head(self, states: HiddenStates) -> Fidelity:
        c = self.config
        head, _, fidelity = self.quantizer.head(states, self.settings.lm_head, self.settings.static)
        tensors = {"model.norm.weight": head.norm.to(c.dtype)}
        if not (c.tie_word_embeddings and isinstance(head.lm_head, FullWeights)):
            tensors |= self.writer.linear("lm_head", head.lm_head, c.dtype)
        self._write(self.steps - 1, tensors)
        source = self.found.weights.source
        if isinstance(source, GGUFSource):
            fields = gguf_config(source.file) | {"eos_token_id": sorted(self.found.stop_ids)}
        else:
            fields = read_json(source.folder / "config.json")
        if self.settings.lm_head == "w8a8":
            fields["tie_word_embeddings"] = False
        names = self.work.index(self._shard, self.steps, self.writer.index)
        with self.work.writing("config.json"):
            self.writer.finish(self.work.folder, fields, names)
        self.work.write_text("config.json", json.dumps(fields, indent=2) + "\n")
        return fidelity

    def _save(self, step: int, states: HiddenStates) -> None:
        self.work.save_state(step, [*states.calibrated, *states.full, *states.quantized])

    def _states(self, hidden: list[Tensor]) -> HiddenStates:
        n, m = len(self.quantizer.calibration), len(self.quantizer.heldout)
        return HiddenStates(hidden[:n], hidden[n : n + m], hidden[n + m :])

    def _shard(self, step: int) -> str:
        return self.writer.shard.format(step + 1, self.steps)

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.work.write_tensors(self._shard(step), {n: t.cpu().contiguous() for n, t in tensors.items()})


def _identity(
    folder: Path,
    settings: ExportSettings,
    sequences: list[list[int]],
    measured: list[list[int]],
    backend: Backend,
) -> dict[str, Any]:
    """What has to be the same for an interrupted run to go on."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return json.loads(json.dumps(asdict(settings))) | {  # as it will be read back: lists, not tuples
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "calibration": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
        "heldout": hashlib.sha256(json.dumps(measured).encode()).hexdigest(),
        "device": f"{backend.name} {backend.dtype}",
    }
