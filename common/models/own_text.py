"""Text that a model writes by itself: what one without a tokenizer is calibrated on."""

from __future__ import annotations

import torch

from quasar.backends.base import Batch, Segment
from quasar.models.decoder import Decoder

SEQUENCES, TOKENS = 8, 64


@torch.inference_mode()
def own_text(decoder: Decoder, sequences: int = SEQUENCES, tokens: int = TOKENS, seed: int = 0) -> list[list[int]]:
    """Token ids sampled from the model at temperature 1, each sequence from a random first token."""
    c, backend = decoder.config, decoder.backend
    tokens = min(tokens, c.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    texts = [[int(i)] for i in torch.randint(0, c.vocab_size, (sequences,), generator=generator)]
    with backend.exact_kv():
        slots = [backend.new_slot(c.num_layers, c.num_kv_heads, tokens, c.head_dim) for _ in texts]
    for _ in range(tokens - 1):
        batch = Batch([Segment(slot, text[-1:]) for slot, text in zip(slots, texts, strict=True)])
        last = torch.tensor([text[-1] for text in texts], device=backend.device)
        chances = decoder(last, batch).float().softmax(dim=-1).cpu()  # [sequences, vocab]
        chosen = torch.multinomial(chances.nan_to_num(), 1, generator=generator).flatten().tolist()
        for slot, text, token in zip(slots, texts, chosen, strict=True):
            slot.commit(1)
            text.append(token)
    return texts
