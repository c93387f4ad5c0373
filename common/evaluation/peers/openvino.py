"""OpenVINO on CPU: int8 weights by nncf, keys and values in the plugin's own state, its defaults elsewhere."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quasar.evaluation.peers.transformers import transformers_model
from quasar.evaluation.speed import Step, context_ids, rows_kept
from quasar.models.config import ModelConfig


def openvino_step(config: ModelConfig, folder: Path | None, context: int) -> Step:
    """Passes of the compressed model behind `context` tokens."""
    import openvino

    compiled = openvino.Core().compile_model(
        _compressed(config, folder), "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    request = compiled.create_infer_request()
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim).repeat(2)

    def infer(ids: Tensor, committed: int) -> Tensor:
        rows = len(ids)
        angle = torch.arange(committed, committed + rows)[:, None] * frequency
        mask = torch.full((rows, committed + rows), -torch.inf).triu(committed + 1)[None, None]
        kept = torch.arange(rows - rows_kept(rows), rows)
        request.infer([given.numpy() for given in (ids[None], angle.cos(), angle.sin(), mask, kept)])
        return torch.from_numpy(request.get_output_tensor(0).data)[0]

    infer(context_ids(config.vocab_size, context), 0)
    states = request.query_state()
    kept = [state.state.data.copy() for state in states]

    def rewind(rows: int) -> None:
        for state, data in zip(states, kept, strict=True):
            state.state = openvino.Tensor(data)

    return Step(lambda ids: infer(ids, context), rewind)


def _compressed(config: ModelConfig, folder: Path | None) -> Any:
    """The graph with int8 weights, one scale per output channel, keys and values held in its state."""
    import nncf
    import openvino
    from openvino import _offline_transformations as transformations

    module = _Traceable(config, transformers_model(config, folder, torch.float32)).eval()
    past = [torch.zeros(1, config.num_kv_heads, 3, config.head_dim)] * (2 * config.num_layers)
    ids, angle, mask = torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, config.head_dim), torch.zeros(1, 1, 2, 5)
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=(ids, angle, angle, mask, torch.arange(2), *past))
    names = ["ids", "cos", "sin", "mask", "kept", *(f"past.{i}" for i in range(len(past)))]
    shapes = [
        [1, -1],
        *[[-1, config.head_dim]] * 2,
        [1, 1, -1, -1],
        [-1],
        *[[1, config.num_kv_heads, -1, config.head_dim]] * len(past),
    ]
    for port, name, shape in zip(model.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for i, port in enumerate(model.outputs):
        port.get_tensor().set_names({f"present.{i - 1}" if i else "logits"})
    model.validate_nodes_and_infer_types()
    transformations.apply_make_stateful_transformation(model, {f"past.{i}": f"present.{i}" for i in range(len(past))})
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(sys.stderr):  # its progress bars
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


class _Traceable(nn.Module):
    """The decoder in operations that OpenVINO's converter knows by sight (and its CPU plugin fuses)."""

    def __init__(self, config: ModelConfig, model: nn.Module) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(
        self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kept: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """ids [1, rows], cos and sin [rows, head_dim] (computed outside: OpenVINO would make angles bfloat16), mask
        [1, 1, rows, length], kept: rows whose logits are wanted; past: k and v [1, kv_heads, committed, head_dim] of
        each layer. Returns logits [1, kept, vocab], and k and v of each layer with the new rows."""
        inner = self.model.model
        x, present = inner.embed_tokens(ids), []
        for i, layer in enumerate(inner.layers):
            h, k, v = self._attend(
                layer.self_attn, layer.input_layernorm(x), cos, sin, mask, past[2 * i], past[2 * i + 1]
            )
            x = x + h
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            present += [k, v]
        return self.model.lm_head(inner.norm(x.index_select(1, kept))), *present

    def _attend(
        self, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = attention.q_proj(x).view(1, -1, c.num_heads, c.head_dim)
        k = attention.k_proj(x).view(1, -1, c.num_kv_heads, c.head_dim)
        v = attention.v_proj(x).view(1, -1, c.num_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (_rotate(part.transpose(1, 2), cos, sin) for part in (q, k))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        group = c.num_heads // c.num_kv_heads
        shared = (part[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for part in (k, v))
        y = F.scaled_dot_product_attention(q, *shared, attn_mask=mask)
        return attention.o_proj(y.transpose(1, 2).flatten(2)), k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, heads, rows, head_dim] by cos, sin [rows, head_dim]: rope, "half" layout."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
