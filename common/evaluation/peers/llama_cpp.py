"""llama.cpp on CPU, through llama-cpp-python: Q8_0 weights in a GGUF file that is gone once they are loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from quasar.errors import QuasarError
from quasar.evaluation.peers.transformers import transformers_model
from quasar.evaluation.speed import Step, context_ids, rows_kept
from quasar.models.config import ModelConfig

_BIASED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # Qwen2 has biases there, Llama none


def llama_cpp_step(config: ModelConfig, folder: Path | None, context: int, most_rows: int) -> Step:
    """Passes of the Q8_0 model behind `context` tokens."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory(prefix="quasar-llama-cpp-") as scratch:
        file = Path(scratch) / "model.gguf"
        write_gguf(config, folder, file)
        loading = llama_cpp.llama_model_default_params()
        loading.use_mmap = False  # the file goes; and its pages would be read from it, not from memory
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), loading)
    if not model:
        raise QuasarError("--peer llama.cpp: it does not load this model")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = context + most_rows
    settings.n_batch = max(context, most_rows)  # in parts of its default, 512
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    state = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def decode(ids: torch.Tensor, committed: int) -> torch.Tensor:
        batch.n_tokens, kept = len(ids), rows_kept(len(ids))
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token, committed + i, 1, 0, i >= len(ids) - kept,
            )  # fmt: skip
        if code := llama_cpp.llama_decode(state, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(state), (kept, config.vocab_size))
        return torch.from_numpy(logits)

    def run(ids: torch.Tensor) -> torch.Tensor:
        return decode(ids, context)

    decode(context_ids(config.vocab_size, context), 0)
    run.keeps_alive = silent  # llama.cpp calls it as long as the process lives
    memory = llama_cpp.llama_get_memory(state)
    return Step(run, lambda rows: llama_cpp.llama_memory_seq_rm(memory, 0, context, -1))


def write_gguf(config: ModelConfig, folder: Path | None, file: Path) -> None:
    """The checkpoint (or `--dummy`'s random weights) in Q8_0; norms and biases in float32, no vocabulary."""
    import gguf

    arch = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.PANGU_EMBED
    if not config.qk_norm and not config.output_bias:
        arch = gguf.MODEL_ARCH.QWEN2  # not LLAMA, which rotates other pairs of values
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    for name, tensor in transformers_model(config, folder, torch.float32).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        new_name, data = names.get_name(name, (".weight", ".bias")), tensor.numpy()
        if data.ndim == 1:
            writer.add_tensor(new_name, data)
        else:
            writer.add_tensor(new_name, gguf.quantize(data, q8), raw_dtype=q8)
        if arch == gguf.MODEL_ARCH.QWEN2 and not config.attention_bias and name.endswith(_BIASED):
            writer.add_tensor(new_name.replace(".weight", ".bias"), np.zeros(len(data), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
