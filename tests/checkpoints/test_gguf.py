"""GGUF files against transformers' own loading of them, and files that lie."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quasar import QuasarError, generate, load
from quasar.backends.reference import ReferenceBackend
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.gguf import open_gguf
from quasar.checkpoints.gguf_blocks import DEQUANTIZE, dequantize_blocks
from quasar.models.config import read_config
from quasar.models.decoder import Decoder
from quasar.models.loader import build_decoder
from quasar.models.tokenizer import load_tokenizer, stop_ids
from tests.conftest import random_transformer
from tests.helpers.gguf_files import write_gguf

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def decoder_of(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return build_decoder(read_config(path), open_checkpoint(path, dtype), ReferenceBackend())


def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.read(ids.tolist(), logits_to_keep=len(ids))


def expected(path: Path, ids: torch.Tensor) -> torch.Tensor:
    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        return oracle(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("kind", sorted(DEQUANTIZE))
def test_blocks_are_bit_for_bit_those_of_the_gguf_package(kind):
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 256, (64, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are not all finite
        theirs = torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))
    torch.testing.assert_close(dequantize_blocks(torch.from_numpy(raw), kind), theirs, rtol=0, atol=0, equal_nan=True)
    assert theirs.shape == (64, block)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_block_equals_transformers(kind, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", kind)
    ids = torch.randint(0, 300, (24,))
    assert (logits(decoder_of(path), ids) - expected(path, ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_equals_transformers(architecture, tied, tmp_path):
    # transformers takes Qwen3's heads to be 128 wide, whatever the file says.
    sizes = {"head_dim": 128} if architecture == "qwen3" else {}
    path = write_gguf(tmp_path / "model.gguf", architecture, "Q8_0", tied=tied, **sizes)
    ids = torch.randint(0, 300, (24,))
    assert (logits(decoder_of(path), ids) - expected(path, ids)).abs().max() <= 1e-4


def test_pangu_embedded_is_what_its_safetensors_are(tmp_path):
    """transformers reads no such GGUF. The oracle is Llama with biases, and its rows are not permuted."""
    path = write_gguf(tmp_path / "model.gguf", "pangu-embedded", "F32")
    source = open_checkpoint(path)
    sizes = {"hidden_size": 256, "vocab_size": 300, "num_hidden_layers": 2, "intermediate_size": 512}
    oracle = random_transformer("openpangu", max_position_embeddings=128, rms_norm_eps=1e-5, **sizes)
    oracle.config.rope_parameters["rope_theta"] = 10000.0
    oracle = LlamaForCausalLM(oracle.config).eval()
    state = {}
    for name, tensor in oracle.state_dict().items():
        state[name] = source.get(name, tuple(tensor.shape)).clone()
    oracle.load_state_dict(state)
    source.finish()
    ids = torch.randint(0, 300, (24,))
    with torch.inference_mode():
        assert (logits(decoder_of(path), ids) - oracle(input_ids=ids[None]).logits[0]).abs().max() <= 1e-4


def test_rope_factors_of_a_file_are_llama3s_scaling(tmp_path):
    """llama.cpp's converter turns Llama 3's scaling into a tensor of divisors."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = scaling | {"original_max_position_embeddings": 32}
    from quasar.models.rope import inverse_frequencies, rope_scaling

    scaled = inverse_frequencies(64, 10000.0, rope_scaling(tmp_path, fields, 128))
    factors = (inverse_frequencies(64, 10000.0, None) / scaled).numpy()
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    path = write_gguf(tmp_path / "model.gguf", rope_factors=factors)
    config = read_config(path)
    torch.testing.assert_close(inverse_frequencies(64, config.rope_theta, config.rope_scaling), scaled)
    decoder_of(path)


def test_bfloat16_rounds_what_blocks_stand_for(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q4_1")
    name, shape = "model.layers.1.mlp.up_proj.weight", (512, 256)
    exact, rounded = (open_checkpoint(path, t).get(name, shape) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.bfloat16(), rounded)
    assert read_config(path).dtype == torch.bfloat16


def test_a_file_brings_tokenizer_template_and_stop_ids(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q8_0")
    model = load(path, device="reference")
    text = "the thing in  12 caf\u00e9 \U0001f600\n<|im_end|>"
    ids = model.encode(text)
    assert model.tokenizer.decode(ids) == text
    assert model.decode(ids) == text.removesuffix("<|im_end|>")
    assert ids[0] == model.tokenizer.convert_tokens_to_ids("the")
    assert model.stop_ids == {261, 263}
    assert model.tokenizer.decode(model.encode("Hi", chat=True)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(generate(model, "the", max_new_tokens=4, ignore_eos=True).result().token_ids) == 4


def test_a_file_without_a_tokenizer_takes_ids(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tokenizer=False)
    assert load_tokenizer(path) is None
    assert stop_ids(path, None) == frozenset()
    model = load(path, device="reference")
    assert len(generate(model, [1, 2, 3], max_new_tokens=4).result().token_ids) == 4
    with pytest.raises(QuasarError, match="has no tokenizer; give token ids"):
        model.encode("text")


# What lies.


def refusal(path: Path) -> str:
    with pytest.raises(QuasarError) as caught:
        decoder_of(path)
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture mamba is not supported; Quasar runs llama, qwen2"),
        ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
        (
            {"llama.feed_forward_length": 1024},
            "ffn_gate.weight has shape [512, 256]; the metadata",
        ),
        ({"llama.embedding_length": 512}, "dimension_count is 64; Quasar rotates whole heads, which have 128"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1}, "tensors that this architecture does not have: blk.1."),
        ({"llama.expert_count": 8}, "mixtures of experts are not supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"llama.rope.dimension_count": 32}, "rotates whole heads, which have 64"),
        ({"split.count": 4}, "one of several parts"),
        ({"tokenizer.ggml.pre": "own"}, "tokenizer.ggml.pre 'own' is not supported"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not supported"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300; the vocabulary has 300 tokens"),
        ({"tokenizer.ggml.merges": "a b"}, "merges should be an array"),
    ],
)
def test_metadata_that_does_not_fit(metadata, message, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    real = open_gguf(path)
    changed = type(real)(real.path, real.metadata | metadata, real.tensors)
    for module in ("quasar.checkpoints", "quasar.models.config", "quasar.checkpoints.gguf"):
        monkeypatch.setattr(f"{module}.open_gguf", lambda _: changed)
    assert message in refusal(path)


def test_headers_that_lie(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    whole = path.read_bytes()

    def lie(at: int, form: str, value: int) -> str:
        data = bytearray(whole)
        struct.pack_into(form, data, at, value)
        path.write_bytes(data)
        return refusal(path)

    assert "version 9 is not supported" in lie(4, "<I", 9)
    assert "it is big-endian" in lie(4, ">I", 3)
    assert "states 18446744073709551615 tensors" in lie(8, "<Q", (1 << 64) - 1)
    assert "states 1152921504606846976 metadata entries" in lie(16, "<Q", 1 << 60)
    assert "states a text of 4611686018427387904 bytes" in lie(24, "<Q", 1 << 62)

    tensor = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    assert "has 200 dimensions" in lie(tensor, "<I", 200)
    assert "has shape [256, 0]" in lie(tensor + 4, "<Q", 0)
    assert "it is cut short, download it again" in lie(tensor + 4, "<Q", 1 << 61)
    assert "has type 77, which Quasar does not read" in lie(tensor + 20, "<I", 77)
    assert "overlaps tensor" in lie(tensor + 24, "<Q", 0)
    assert "not at a multiple of 32" in lie(tensor + 24, "<Q", 7)
    assert "it is cut short, download it again" in lie(tensor + 24, "<Q", 1 << 62)

    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    assert "holds arrays within an array" in lie(tokens + 4, "<I", 9)
    assert "states 1152921504606846976 texts" in lie(tokens + 8, "<Q", 1 << 60)
    assert "type 99; types 0 to 12 exist" in lie(tokens, "<I", 99)
    path.write_bytes(b"GGML" + whole[4:])
    assert "not a GGUF file" in refusal(path)


def test_scales_that_are_not_finite(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q8_0")
    start = open_gguf(path).tensors["blk.1.ffn_up.weight"].start
    data = bytearray(path.read_bytes())
    data[start : start + 2] = np.float16("inf").tobytes()
    path.write_bytes(data)
    assert "tensor blk.1.ffn_up.weight holds scales that are not finite" in refusal(path)


def test_truncated_and_spoiled_files_are_one_line_or_a_model(tmp_path):
    """Cut at every kind of place, and with bytes changed anywhere in the header."""
    rng = random.Random(0)
    path = write_gguf(tmp_path / "model.gguf", layers=1, hidden=64, heads=2, kv_heads=1, head_dim=32, intermediate=64)
    whole = path.read_bytes()
    header = min(tensor.start for tensor in open_gguf(path).tensors.values())
    refused = 0
    for case in range(300):
        if case < 60:
            data = bytearray(whole[: rng.randrange(header if case % 2 else len(whole))])
        else:
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(header)
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            build_decoder(read_config(path), open_checkpoint(path), ReferenceBackend("meta"))
            tokenizer = load_tokenizer(path)
            if tokenizer is not None:
                tokenizer.decode(tokenizer.encode("the text"))
            stop_ids(path, tokenizer)
        except QuasarError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 600
    assert refused > 100


def test_q_and_k_are_permuted_back(tmp_path):
    """The permutation that llama.cpp's converter applies to q and k is undone: the same model from safetensors."""
    path = write_gguf(tmp_path / "model.gguf", "llama", "F32")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    folder = tmp_path / "folder"
    plain = type(oracle)(oracle.config)  # transformers refuses to save what it read from a GGUF file
    plain.load_state_dict(oracle.state_dict())
    del plain.config.quantization_config
    plain.save_pretrained(folder)
    ids = torch.randint(0, 300, (24,))
    assert (logits(decoder_of(folder), ids) - logits(decoder_of(path), ids)).abs().max() <= 1e-5


_PEAK = """
import sys, threading, time
from quasar.backends import get_backend
from quasar.checkpoints import open_checkpoint
from quasar.models.build import assemble
from quasar.models.config import read_config
from quasar.models.loader import CheckpointWeights
from pathlib import Path

def anonymous():  # memory of our own: pages of the mapped file are the system's to drop
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

seen, path = [], Path(sys.argv[1])
def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)

config, backend = read_config(path), get_backend("reference")
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
decoder = assemble(config, CheckpointWeights(config, open_checkpoint(path), backend.place), backend)
print(max(seen) - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_takes_a_layer_more_than_the_result(tmp_path):
    """Roughly: a layer on its way from blocks to the device lies in memory a few times over, in float32."""
    path = write_gguf(tmp_path / "a.gguf", kind="Q4_1", layers=12, hidden=512, heads=8, intermediate=1536)
    layer = 4 * (3 * 512 * 1536 + 2 * 512 * 512 + 2 * 128 * 512)  # bytes in float32
    command = [sys.executable, "-c", _PEAK, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    peak, result = map(int, run.stdout.split())
    assert result > 12 * layer * 0.9
    assert peak < result + 4 * layer
