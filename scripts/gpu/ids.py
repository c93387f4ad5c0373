"""What the shipped models say on a card: what the reference backend says, with graphs and drafts and without."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from quasar import Model, generate, load
from quasar.models.model import ASSETS
from quasar.quantization.calibration import read_texts
from quasar_gpu.backend import CudaBackend

MODELS = ("tiny-qwen3", "tiny-openpangu")
_PROMPT = "class Stack:\n    def push(self, item):\n"
_WINDOW = 6


def said(model: Model, tokens: int, **settings: object) -> list[int]:
    """Greedy ids unless the settings say otherwise."""
    return generate(model, _PROMPT, max_new_tokens=tokens, ignore_eos=True, **settings).result().token_ids


def same_ids_as_reference(name: str, device: str, tokens: int) -> bool:
    """Full precision in float32, with drafts, through captured windows."""
    ids = [said(load(name, device=d, precision="full", dtype="float32"), tokens) for d in ("reference", device)]
    return ids[0] == ids[1]


def ways_of_running(model: Model, tokens: int) -> Iterator[tuple[str, bool]]:
    """Whether each way of running gives the ids of the plain one, captured windows of one token. Changes the model's
    backend."""
    plain = said(model, tokens, draft="none")
    yield "drafts, adaptive window", said(model, tokens) == plain
    yield "drafts, gamma 5", said(model, tokens, gamma=5) == plain
    yield "second time", said(model, tokens) == plain
    backend = model.decoder.backend
    assert isinstance(backend, CudaBackend)
    sampled = [said(model, tokens, temperature=0.8, seed=1, draft=draft) for draft in ("none", "ngram")]
    yield "sampled with a seed, drafts", sampled[0] == sampled[1]
    yield "sampled with a seed, twice", sampled[1] == said(model, tokens, temperature=0.8, seed=1)
    backend.graphs = False
    yield "no graphs", said(model, tokens, gamma=5) == plain
    backend.dependent_launch = False
    yield "no graphs, no dependent launch", said(model, tokens, gamma=5) == plain


def top1_agreement(name: str, device: str, dtype: str, tokens: int) -> float:
    """Share of held-out positions where W8A8 on the device has the reference backend's likeliest token. The text goes
    through windows, as verification does."""
    best = []
    for where, kind in (("reference", "float32"), (device, dtype)):
        model = load(name, device=where, precision="w8a8", dtype=kind)
        ids = model.encode(read_texts(ASSETS / "heldout.jsonl")[0])[:tokens]
        decoder = model.decoder
        cache = decoder.new_cache(len(ids))
        run = decoder.backend.window_pass(decoder, cache)
        found: list[int] = []
        for first in range(0, len(ids), _WINDOW):
            window = ids[first : first + _WINDOW]
            found += run(window, len(window)).argmax(dim=-1).tolist()
            cache.commit(len(window))
        best.append(torch.tensor(found))
    return (best[0] == best[1]).float().mean().item()


def bytes_left(name: str, device: str, tokens: int) -> tuple[int, int]:
    """Bytes of the device's memory in use more than before, while the model is there and when it was dropped. Without
    the garbage collector's help: there should be no cycles."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        model = load(name, device=device, precision="w8a8")
        said(model, tokens)
        during = torch.cuda.memory_allocated() - before
        del model
        return during, torch.cuda.memory_allocated() - before
    finally:
        gc.enable()
