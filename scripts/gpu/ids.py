"""What the shipped models say on a card: what the reference backend says, with graphs and drafts and without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch

import quasar
from quasar import Model, generate
from quasar.backends.base import Batch, Segment
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar_gpu.backend import CudaBackend
from quasar_gpu.kernels.launch import Launching, launching_as

MODELS = ("tiny-qwen3", "tiny-openpangu")
_PROMPT = "class Stack:\n    def push(self, item):\n"
_WINDOW = 6

Load = Callable[[str, str, str], Model]  # model, precision, dtype


def said(model: Model, tokens: int, **settings: object) -> list[int]:
    """Greedy ids unless the settings say otherwise."""
    return generate(model, _PROMPT, max_new_tokens=tokens, ignore_eos=True, **settings).result().token_ids


def same_ids_as_reference(name: str, load: Load, tokens: int) -> bool:
    """Full precision in float32, with drafts, through captured passes."""
    reference = quasar.load(name, device="reference", precision="full", dtype="float32")
    return said(load(name, "full", "float32"), tokens) == said(reference, tokens)


def ways_of_running(model: Model, tokens: int) -> Iterator[tuple[str, bool]]:
    """Whether each way of running gives the ids of the plain one, captured passes of one row. Changes the model's
    backend."""
    plain = said(model, tokens, draft="none")
    yield "drafts, as many as pay", said(model, tokens) == plain
    yield "drafts, gamma 5", said(model, tokens, gamma=5) == plain
    yield "second time", said(model, tokens) == plain
    backend = model.decoder.backend
    assert isinstance(backend, CudaBackend)
    sampled = [said(model, tokens, temperature=0.8, seed=1, draft=draft) for draft in ("none", "ngram")]
    yield "sampled with a seed, drafts", sampled[0] == sampled[1]
    yield "sampled with a seed, twice", sampled[1] == said(model, tokens, temperature=0.8, seed=1)
    with quasar.Engine(model, max_sequences=4) as engine:
        prompts = [_PROMPT, "def main():\n", _PROMPT]
        together = engine.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
    yield "beside others", together[0].token_ids == together[2].token_ids == plain
    backend.graphs = False
    yield "no graphs", said(model, tokens, gamma=5) == plain
    with launching_as(backend.device, Launching(dependent=False)):
        yield "no graphs, no dependent launch", said(model, tokens, gamma=5) == plain
    backend.graphs = True


def top1_agreement(name: str, load: Load, tokens: int) -> float:
    """Share of held-out positions where W8A8 on the device, in its usual type, has the reference backend's likeliest
    token. The text goes through windows, as verification does."""
    best = []
    models = (quasar.load(name, device="reference", precision="w8a8", dtype="float32"), load(name, "w8a8", "auto"))
    for model in models:
        ids = model.encode(read_texts(ASSETS / "heldout.jsonl")[0])[:tokens]
        runtime = model.runtime
        slot = runtime.new_slot(len(ids))
        found: list[int] = []
        for first in range(0, len(ids), _WINDOW):
            window = ids[first : first + _WINDOW]
            logits = runtime.run(Batch([Segment(slot, window, logits_to_keep=len(window))]))
            found += runtime.backend.argmax(logits).tolist()
            slot.commit(len(window))
        best.append(torch.tensor(found))
    return (best[0] == best[1]).float().mean().item()


def bytes_left(name: str, device: str, tokens: int) -> tuple[int, int]:
    """Bytes of the device's memory in use more than before, while the model is there and when it was dropped. Without
    the garbage collector's help: there should be no cycles."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        model = quasar.load(name, device=device, precision="w8a8")
        said(model, tokens)
        during = torch.cuda.memory_allocated() - before
        del model
        return during, torch.cuda.memory_allocated() - before
    finally:
        gc.enable()
