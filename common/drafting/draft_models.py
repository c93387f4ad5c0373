"""The decoders that draft for a model: made on first use, kept with it."""

from __future__ import annotations

from quasar.errors import QuasarError
from quasar.models.decoder import Decoder
from quasar.models.linear_int4 import in_w4a4
from quasar.models.model import ASSETS, LoadOptions, Model, load_checkpoint
from quasar.models.pruning import layers_to_keep
from quasar.models.runtime import Runtime
from quasar.models.sharing import share
from quasar.quantization.calibration import read_texts

_PROMPTS, _PROMPT_TOKENS = 8, 256  # enough to rank layers by


def draft_runtime(model: Model, name: str) -> Runtime:
    """For "self:w4a4", "self:skip=K" or "model:PATH". Raises QuasarError where the model cannot have it."""
    with model.lock:  # made once, whichever thread asks first
        if name not in model.draft_runtimes:
            if name == "self:w4a4":
                made = _in_w4a4(model)
            elif name.startswith("self:"):
                made = _skipping(model, int(name.partition("=")[2]))
            else:
                made = _other_model(model, name.partition(":")[2])
            model.draft_runtimes[name] = Runtime(made)
        return model.draft_runtimes[name]


def _in_w4a4(model: Model) -> Decoder:
    if model.precision != "w4a16":
        raise QuasarError(
            f"--draft self:w4a4 shares the int4 weights of its verifier, and {model.name} is in {model.precision}; "
            "say --precision w4a16"
        )
    return share(model.decoder, convert=in_w4a4)


def _skipping(model: Model, skipped: int) -> Decoder:
    layers = len(model.decoder.layers)
    if not 1 <= skipped <= layers - 2:
        raise QuasarError(
            f"--draft self:skip={skipped}: {model.name} has {layers} layers, the first and last of which stay; "
            f"skip 1 to {layers - 2}"
        )
    return share(model.decoder, keep=layers_to_keep(model.decoder, skipped, calibration_ids(model)))


def calibration_ids(model: Model) -> list[list[int]]:
    """A few built-in prompts as token ids; arbitrary ids for random weights."""
    most = min(_PROMPT_TOKENS, model.config.max_position_embeddings)
    if model.tokenizer is None:
        return [list(range(min(64, most, model.config.vocab_size)))]
    return [model.encode(text)[:most] for text in read_texts(ASSETS / "calibration.jsonl")[:_PROMPTS]]


def _other_model(model: Model, path: str) -> Decoder:
    backend = model.decoder.backend
    device = backend.name if backend.name == "reference" else str(backend.device)
    dtype = str(backend.linear_dtype).removeprefix("torch.")
    draft = load_checkpoint(path, LoadOptions(device, dtype, model.trust_remote_code))
    sizes = [m.config.vocab_size for m in (draft, model)]
    if sizes[0] != sizes[1]:
        raise QuasarError(
            f"--draft model:{path} has a vocabulary of {sizes[0]} tokens and {model.name} one of {sizes[1]}; "
            "a draft model needs the same tokenizer"
        )
    tokenizers = draft.tokenizer, model.tokenizer
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise QuasarError(
            f"--draft model:{path} numbers its tokens differently from {model.name}; a draft model needs the same "
            "tokenizer"
        )
    return draft.decoder
