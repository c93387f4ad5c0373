"""`quasar quantize`: a full-precision checkpoint in, a W8A8 checkpoint out, one decoder layer in memory at a time.

Three sets of hidden states walk through the layers: the calibration set in full precision, which each layer is
smoothed by, and the held-out set in full precision and in W8A8, which show at the end what quantising did. Every
layer is written, and the hidden states behind it, before the next is read. So an interrupted run resumes, in a folder
beside the output that takes its name when everything is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from quasar.backends.base import Backend, Batch, Segment
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import WRITERS, open_checkpoint
from quasar.checkpoints.folder import SafetensorsFolder, read_json
from quasar.checkpoints.weights import FullWeights, Int8Weights
from quasar.errors import QuasarError
from quasar.loading import CALIBRATION_TOKENS, LM_HEADS, check_alpha, require_agreement
from quasar.models.config import ModelConfig, read_config
from quasar.models.decoder import DecoderLayer, rope_tables
from quasar.models.linear import FullLinear, W8A8Linear, quantize_linear
from quasar.models.loader import PROJECTIONS, DecoderParts, build_decoder
from quasar.models.model import ASSETS, LoadOptions, find_checkpoint, load_tokenizer
from quasar.quantization import SEARCH_ROWS, quantize_layer, static_scale
from quasar.quantization.calibration import observing, read_texts
from quasar.quantization.fidelity import Fidelity, FidelityTally, held_out

SCHEMES = ("w8a8", "w8a8-static")
_RESUME, _STATE = "resume.json", "hidden_states.resume"
_COPIED = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_LOGIT_ROWS = 16384  # of lm_head made float at a time


@dataclass(frozen=True)
class ExportSettings:
    """What to write."""

    format: str = "compressed-tensors"  # or ascend
    scheme: str = "w8a8"  # or w8a8-static
    alpha: float | None = 0.5  # SmoothQuant's migration strength; None searches it per layer
    lm_head: str = "full"  # or w8a8

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        for name, allowed in (("format", tuple(WRITERS)), ("scheme", SCHEMES), ("lm_head", LM_HEADS)):
            if getattr(self, name) not in allowed:
                raise QuasarError(f"{name} {getattr(self, name)} is unknown; use one of {', '.join(allowed)}")

    @property
    def static(self) -> bool:
        """Whether activations have one calibrated scale per tensor."""
        return self.scheme == "w8a8-static"


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
) -> Fidelity:
    """Writes a W8A8 checkpoint of `model` (a folder, a shipped model or a hub name) into the new folder `output`.

    calibration and heldout are texts (None: built-in ones); command goes into the model card. An interrupted run
    leaves `output`.partial and goes on from there when it is called with the same arguments. Raises QuasarError on
    what the user can put right, and, unless force, when the result is garbage.
    """
    options = options or LoadOptions()
    refuse_existing(output)
    folder = find_checkpoint(model, options.trust_remote_code)
    config, source, backend = read_config(folder), open_checkpoint(folder), options.backend()
    if source.format != SafetensorsFolder.format:
        raise QuasarError(f"{model} is already quantised ({source.format}); quantise the model it was made of")
    # Shapes and names now rather than after hours: no weight is read on the meta device.
    build_decoder(config, source, ReferenceBackend("meta", config.dtype))
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    limit = min(CALIBRATION_TOKENS, config.max_position_embeddings)
    calibration_texts = calibration or read_texts(ASSETS / "calibration.jsonl")
    sequences = [ids[:limit] for ids in map(tokenizer.encode, calibration_texts) if ids]
    measured = held_out(
        [tokenizer.encode(text) for text in heldout or read_texts(ASSETS / "heldout.jsonl")],
        config.vocab_size,
        config.max_position_embeddings,
    )
    work = _Workspace(output, _identity(folder, settings, sequences, measured, backend))
    work.require_space(_estimated_bytes(config, settings))
    fidelity = _Export(config, source, backend, settings, work, sequences, measured).run(options.progress)
    try:
        require_agreement(model, fidelity, force=force)
    except QuasarError:
        work.discard()
        raise
    work.copy_from(folder)
    card = model_card(model, folder, settings, fidelity, command, sum(map(len, sequences)), calibration is None)
    work.write_text("README.md", card)
    work.finish()
    return fidelity


class _Export:
    """One run through the layers."""

    def __init__(
        self,
        config: ModelConfig,
        source: SafetensorsFolder,
        backend: Backend,
        settings: ExportSettings,
        work: _Workspace,
        sequences: list[list[int]],
        measured: list[list[int]],
    ) -> None:
        self.config, self.backend, self.settings, self.work = config, backend, settings, work
        self.sequences, self.measured = sequences, measured
        self.parts = DecoderParts(config, source, backend)
        self.source = source
        self.writer = WRITERS[settings.format](settings.static, settings.lm_head == "w8a8")
        longest = max(map(len, sequences + measured))
        self.cos, self.sin = rope_tables(replace(config, max_position_embeddings=longest), backend)
        self.steps = config.num_layers + 2  # the embedding, the layers, the head: a shard each

    @torch.inference_mode()
    def run(self, progress: bool) -> Fidelity:
        embedding = self.parts.embedding()
        done, hidden = self.work.state()
        if not done:
            self._write(0, {"model.embed_tokens.weight": embedding.cpu()})
            hidden = [embedding[torch.tensor(ids)].to(self.backend.dtype) for ids in self.sequences]
            held = [embedding[torch.tensor(ids[:-1])].to(self.backend.dtype) for ids in self.measured]
            hidden = [*hidden, *held, *held]
            done = self.work.save_state(1, hidden)
        hidden = [x.to(self.backend.device) for x in hidden]
        bar = tqdm(
            range(1, self.config.num_layers + 1), "quantising", unit="layer", disable=not progress, initial=done - 1
        )
        for step in bar:
            if step >= done:
                hidden = self._layer(step, hidden)
                self.work.save_state(step + 1, hidden)
        return self._head(embedding, hidden)

    def _layer(self, step: int, hidden: list[Tensor]) -> list[Tensor]:
        index, c = step - 1, self.config
        layer = self.parts.layer(index)
        layer.index = 0  # in a KV cache of its own
        for name in PROJECTIONS:  # once, not for each sequence
            linear = getattr(layer, name)
            linear.weight = linear.weight.to(self.backend.dtype)
        calibrated, full, quantized = self._streams(hidden)
        with observing(layer, SEARCH_ROWS if self.settings.alpha is None else 0) as stats:
            calibrated = [self._through(layer, x) for x in calibrated]
        full = [self._through(layer, x) for x in full]
        made = quantize_layer(layer, stats, self.settings.alpha, c.dtype, self.settings.static)
        quantized = [self._through(layer, x) for x in quantized]

        at, tensors = f"model.layers.{index}", {}
        norms = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
        if c.qk_norm:
            norms |= {"self_attn.q_norm": layer.attention.q_norm, "self_attn.k_norm": layer.attention.k_norm}
        for name, norm in norms.items():
            tensors[f"{at}.{name}.weight"] = norm.to(c.dtype)
        for fused, names in PROJECTIONS.items():
            for name, part in zip(names, _split(made[fused], self.parts.sizes[fused]), strict=True):
                tensors |= self.writer.linear(f"{at}.{name}", part, c.dtype)
        self._write(step, tensors)
        return [*calibrated, *full, *quantized]

    def _head(self, embedding: Tensor, hidden: list[Tensor]) -> Fidelity:
        c = self.config
        norm, linear = self.parts.head(embedding)
        calibrated, full, quantized = ([self._normed(x, norm) for x in xs] for xs in self._streams(hidden))
        tensors = {"model.norm.weight": norm.to(c.dtype)}
        changed = linear
        if self.settings.lm_head == "w8a8":
            peak = torch.stack([x.float().abs().amax(dim=0) for x in calibrated]).amax(dim=0)
            made = quantize_linear(linear, static_scale(peak) if self.settings.static else None)
            changed = W8A8Linear.of(self.backend, made)
            tensors |= self.writer.linear("lm_head", made, c.dtype)
        elif not c.tie_word_embeddings:
            tensors |= self.writer.linear("lm_head", FullWeights(linear.weight, None), c.dtype)
        tally = FidelityTally()
        for before, after, ids in zip(full, quantized, self.measured, strict=True):
            tally.add(_log_probs(linear, before), _log_probs(changed, after), ids[1:])
        self._write(self.steps - 1, tensors)
        fields = read_json(self.source.folder / "config.json")
        if self.settings.lm_head == "w8a8":
            fields["tie_word_embeddings"] = False
        names = self.work.index(self._shard, self.steps, self.writer.index)
        with self.work.writing("config.json"):
            self.writer.finish(self.work.folder, fields, names)
        self.work.write_text("config.json", json.dumps(fields, indent=2) + "\n")
        return tally.figures()

    def _streams(self, hidden: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        n, m = len(self.sequences), len(self.measured)
        return hidden[:n], hidden[n : n + m], hidden[n + m :]

    def _through(self, layer: DecoderLayer, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], from position 0."""
        c, tokens = self.config, len(x)
        slot = self.backend.new_slot(1, c.num_kv_heads, tokens, c.head_dim)
        batch = Batch([Segment(slot, [0] * tokens)])
        y, residual = layer(x, None, self.cos[:tokens], self.sin[:tokens], batch)
        return y + residual

    def _normed(self, x: Tensor, norm: Tensor) -> Tensor:
        return self.backend.add_rms_norm(x, None, norm, self.config.rms_norm_eps, None)[0]

    def _shard(self, step: int) -> str:
        return self.writer.shard.format(step + 1, self.steps)

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.work.write_tensors(self._shard(step), {n: t.cpu().contiguous() for n, t in tensors.items()})


def _split(weights: Int8Weights, sizes: list[int]) -> list[Int8Weights]:
    biases = [None] * len(sizes) if weights.bias is None else weights.bias.split(sizes)
    parts = zip(weights.values.split(sizes), weights.scale.split(sizes), biases, strict=True)
    static = weights.static_scale  # each its own: safetensors does not save one tensor under two names
    return [Int8Weights(*part, None if static is None else static.clone()) for part in parts]


def _log_probs(lm_head: FullLinear | W8A8Linear, x: Tensor) -> Tensor:
    if isinstance(lm_head, W8A8Linear):
        return lm_head(x).float().log_softmax(dim=-1)
    logits = [F.linear(x, rows.to(x.dtype)) for rows in lm_head.weight.split(_LOGIT_ROWS)]
    return torch.cat(logits, dim=-1).float().log_softmax(dim=-1)


def refuse_existing(output: Path) -> None:
    """Raises QuasarError if the folder that is to be written is there already."""
    if output.exists() or output.is_symlink():
        raise QuasarError(f"--output {output} exists; name a new folder, or remove it")


class _Workspace:
    """The folder `output`.partial, which becomes `output` when it is complete."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.output, self.folder = output, output.with_name(output.name + ".partial")
        if self.folder.exists():
            begun = read_json(self.folder / _RESUME) if (self.folder / _RESUME).exists() else None
            if begun is None:
                raise QuasarError(f"{self.folder} is no interrupted run that could resume; remove it")
            other = [name for name in identity if begun.get(name) != identity[name]]
            if other:
                raise QuasarError(
                    f"{self.folder} was begun with another {' and '.join(other)}; remove it, or repeat that command"
                )
            return
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise QuasarError(f"--output {output}: cannot be made ({error.strerror})") from None
        self.write_text(_RESUME, json.dumps(identity, indent=1))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A name to write to, which becomes `name` if all goes well. Errors are the disk's."""
        path, beside = self.folder / name, self.folder / f"{name}.tmp"
        try:
            yield beside
            if beside.exists():
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                beside.chmod(0o644)  # safetensors makes files that a server under another name could not read
                beside.replace(path)
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise QuasarError(
                f"{path}: cannot be written ({reason}); put that right and repeat the command, it resumes"
            ) from None
        finally:
            beside.unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        with self.writing(name) as path:
            save_file(tensors, path, metadata={"format": "pt"})

    def write_text(self, name: str, text: str) -> None:
        with self.writing(name) as path:
            path.write_text(text, encoding="utf-8")

    def save_state(self, step: int, hidden: list[Tensor]) -> int:
        """Everything before `step` is written, and these hidden states go into it."""
        tensors = {f"{step}.{i}": x.cpu().clone() for i, x in enumerate(hidden)}
        self.write_tensors(_STATE, tensors)
        return step

    def state(self) -> tuple[int, list[Tensor]]:
        """What save_state saved last; step 0 if nothing yet."""
        if not (self.folder / _STATE).exists():
            return 0, []
        try:
            tensors = load_file(self.folder / _STATE)
        except (OSError, SafetensorError) as error:
            raise QuasarError(f"{self.folder / _STATE}: cannot be read ({error}); remove {self.folder}") from None
        step = int(next(iter(tensors)).partition(".")[0])
        return step, [tensors[f"{step}.{i}"] for i in range(len(tensors))]

    def index(self, shard: Any, steps: int, name: str) -> dict[str, str]:
        """Writes the index over all shards; returns which tensor is where."""
        from safetensors import safe_open

        where, total = {}, 0
        for step in range(steps):
            with safe_open(self.folder / shard(step), framework="pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), shard(step))
            total += (self.folder / shard(step)).stat().st_size
        content = {"metadata": {"total_size": total}, "weight_map": where}
        self.write_text(name, json.dumps(content, indent=2) + "\n")
        return where

    def copy_from(self, folder: Path) -> None:
        """Tokenizer, chat template, generation config, licences: all that is not weights or written here."""
        for path in sorted(folder.iterdir()):
            wanted = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
            if wanted and path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                with self.writing(path.name) as beside:
                    shutil.copyfile(path, beside)

    def require_space(self, needed: int) -> None:
        """Raises QuasarError if what is still to be written will not fit."""
        here = sum(path.stat().st_size for path in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        if needed > here + free:
            if not (self.folder / _STATE).exists():
                self.discard()
            short = f"{free / 1e9:.1f} GB are free on the disk; {(needed - here) / 1e9:.1f} GB are needed"
            raise QuasarError(f"--output {self.output}: {short}")

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        (self.folder / _STATE).unlink()
        (self.folder / _RESUME).unlink()
        refuse_existing(self.output)
        self.folder.rename(self.output)


def _identity(
    folder: Path,
    settings: ExportSettings,
    sequences: list[list[int]],
    measured: list[list[int]],
    backend: Backend,
) -> dict[str, Any]:
    """What has to be the same for an interrupted run to go on."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return asdict(settings) | {
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "calibration": hashlib.sha256(json.dumps(sequences).encode()).hexdigest(),
        "heldout": hashlib.sha256(json.dumps(measured).encode()).hexdigest(),
        "device": f"{backend.name} {backend.dtype}",
    }


def _estimated_bytes(c: ModelConfig, settings: ExportSettings) -> int:
    linear = c.qkv_size * c.hidden_size + c.num_heads * c.head_dim * c.hidden_size
    linear += 3 * c.hidden_size * c.intermediate_size
    table = c.vocab_size * c.hidden_size
    head = 1 if settings.lm_head == "w8a8" else 0 if c.tie_word_embeddings else c.dtype.itemsize
    return c.num_layers * linear + table * (c.dtype.itemsize + head)


def model_card(
    model: str,
    folder: Path,
    settings: ExportSettings,
    fidelity: Fidelity,
    command: str,
    tokens: int,
    built_in: bool,
) -> str:
    """README.md of a quantised checkpoint."""
    activations = "one calibrated scale per tensor" if settings.static else "one scale per token, computed on the fly"
    serve = "vllm serve DIR" + (" --quantization ascend   # vLLM-Ascend" if settings.format == "ascend" else "")
    alpha = "searched per layer" if settings.alpha is None else f"{settings.alpha:g}"
    base = f"base_model: {model}\n" if "/" in model and not Path(model).exists() else ""
    return f"""---
{base}library_name: transformers
tags: [w8a8, int8, {settings.format}, quasar]
---

# {folder.resolve().name} in W8A8

| | |
|---|---|
| made of | {model} |
| format | {settings.format} |
| scheme | {settings.scheme}: int8 weights, one scale per output channel; int8 activations, {activations} |
| full precision | embedding, norms{"" if settings.lm_head == "w8a8" else ", lm_head"} |
| smoothing | SmoothQuant, alpha {alpha} |
| calibration | {tokens} tokens of {"Quasar's built-in prompts" if built_in else "the file named in the command"} |
| mean KL (full precision to W8A8) | {fidelity.mean_kl:.3e} nats |
| top-1 agreement | {fidelity.top1_agreement:.2%} |
| perplexity | {fidelity.perplexity:.3f} (full precision {fidelity.perplexity_full:.3f}) |
| measured on | {fidelity.tokens} held-out tokens |

Made by

    {command or "quasar.export.export.quantize_checkpoint"}

Run it with

    quasar generate --model DIR "Hello"
    {serve}
"""
