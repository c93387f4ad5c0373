#!/usr/bin/env python3
"""Train the two small models that ship in common/assets/.

Both learn Python from the standard library of the Python that runs this script (PSF licence), so
there is nothing to download. A run has these parts, in this order:

    python scripts/train_tiny.py prepare          # tokenizer, token streams, held-out text
    python scripts/train_tiny.py train  --model tiny-qwen3 --steps 2400 --keep 1700
    python scripts/train_tiny.py train  --model tiny-openpangu --steps 2150 \\
        --start-from build/tiny/tiny-qwen3-1700.pt
    python scripts/train_tiny.py export --model tiny-qwen3       # Hugging Face folder, model card
    python scripts/train_tiny.py export --model tiny-openpangu

`train` goes on from its own checkpoint. The learning rate warms up, stays flat, then decays over the last
28 % of the steps; while it is still flat, starting again with another --steps moves the end. A kept
checkpoint from the flat part is a good start for the other model, which spares it the slow first part.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

ASSETS = Path(__file__).resolve().parent.parent / "common" / "assets"
STDLIB = Path(sysconfig.get_paths()["stdlib"])

MODELS = ("tiny-qwen3", "tiny-openpangu")
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOT_ID, IM_END_ID = 0, 2  # special tokens take the first ids, in this order
VOCAB = 4096
SEED = 20261121

# One token for a line break with the indentation after it, so that a word looks the same at every depth;
# `_name` stays in one piece; digits come one at a time.
SPLIT = r"\s*[\r\n]+[ \t]*| ?_*\p{L}+| ?_+|\p{N}| ?[^\s\p{L}\p{N}_]+|[^\S\r\n]+(?!\S)|[^\S\r\n]+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

HELD_OUT_ALWAYS = {"heapq.py", "json/decoder.py", "queue.py", "shlex.py", "textwrap.py"}
TEST_FOLDERS = {"test", "tests", "idle_test"}

DECAY_SHARE = 0.28
WARMUP_STEPS = 100
TOKENS_PER_STEP = 4096
LENGTH_IN_DECAY = 2048  # the longest context the model has to know; attention costs half the time here


# ---------------------------------------------------------------------------------------------- corpus


def is_code(relative: Path, text: str) -> bool:
    """Leave out tables, generated text and files that are wrong on purpose."""
    if relative.parts[0] in {"site-packages", "dist-packages", "pydoc_data"} or "data" in relative.parts:
        return False
    if relative.parts[0].startswith("config-") or relative.name.startswith(("bad", "_sysconfigdata")):
        return False
    if relative.parts[0] == "encodings" and re.search("decoding_(table|map)", text):
        return False
    if sum(not c.isascii() for c in text) > 0.01 * len(text):
        return False
    if max(map(len, text.splitlines() or [""])) > 400:
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return len(text) > 200


def is_held_out(relative: str) -> bool:
    digest = hashlib.sha256(relative.encode()).digest()
    return relative in HELD_OUT_ALWAYS or digest[0] < 6  # 6 of 256: 2.3 % of the files


def is_test(relative: str) -> bool:
    return not TEST_FOLDERS.isdisjoint(Path(relative).parts)


def read_stdlib() -> dict[str, str]:
    """Path relative to the standard library -> source text, sorted by path."""
    sources = {}
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        if "site-packages" in relative.parts:
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_bytes().decode().replace("\r\n", "\n")
            if is_code(relative, text):
                sources[relative.as_posix()] = text
    return sources


def training_files(sources: dict[str, str]) -> list[str]:
    return [name for name in sources if not is_held_out(name)]


def held_out_files(sources: dict[str, str]) -> list[str]:
    """Tests are held out too, but the library itself is what we measure on."""
    return [name for name in sources if is_held_out(name) and not is_test(name)]


def chats(sources: dict[str, str], rng: random.Random) -> Iterator[str]:
    """Two kinds of small chat from the functions of the library: write one, and rename something in one.

    They give the chat markers a meaning, and renaming teaches the model to copy from its prompt."""
    for name in training_files(sources):
        if is_test(name):
            continue
        for node in ast.walk(ast.parse(sources[name])):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            code = ast.get_source_segment(sources[name], node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or not code or not 120 < len(code) < 1500:
                continue
            code = textwrap.dedent(" " * node.col_offset + code)
            arguments = [a.arg for a in node.args.args if a.arg not in {"self", "cls"}]
            if doc and rng.random() < 0.6:
                summary = " ".join(doc.split("\n\n")[0].split())
                ask, answer = f"Write a Python function `{node.name}`. {summary}", code
            elif arguments and rng.random() < 0.25:
                old = rng.choice(arguments)
                new = rng.choice(["value", "item", "data", "source", "target", "key", "text", "other"])
                ask = f"Rename `{old}` to `{new}` in this function:\n```python\n{code}\n```"
                answer = re.sub(rf"\b{old}\b", new, code)
            else:
                continue
            yield f"{IM_START}user\n{ask}{IM_END}\n{IM_START}assistant\n```python\n{answer}\n```{IM_END}\n"


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the config by hand: the same file then loads in transformers 4 and 5."""
    shutil.copyfile(source, folder / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


# --------------------------------------------------------------------------------------------- prepare


def prepare(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    sources = read_stdlib()
    names = training_files(sources)
    library = [sources[name] for name in names if not is_test(name)]
    tests = [sources[name] for name in names if is_test(name)]
    rng = random.Random(SEED)
    tokenizer = train_tokenizer(library)
    tokenizer.save(str(args.work / "tokenizer.json"))

    # The library twice, its tests once: tests are the larger half and the more repetitive one.
    documents = library * 2 + tests + list(chats(sources, rng))
    rng.shuffle(documents)
    held_out = [sources[name] for name in held_out_files(sources)]
    for split, texts in {"train": documents, "held_out": held_out}.items():
        ids = [[EOT_ID, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
        stream = np.concatenate([np.array(document, dtype=np.uint16) for document in ids])
        np.save(args.work / f"{split}.npy", stream, allow_pickle=False)
        size = sum(len(text.encode()) for text in texts)
        print(f"{split}: {len(texts)} documents, {size:,} bytes, {len(stream):,} tokens")

    rows = list(held_out_rows({name: sources[name] for name in held_out_files(sources)}))
    write_atomically(ASSETS / "heldout.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    shutil.copyfile(STDLIB / "LICENSE.txt", ASSETS / "PYTHON-LICENSE.md")


def held_out_rows(sources: dict[str, str], limit: int = 90_000, chunk: int = 1700) -> Iterator[dict[str, str]]:
    """Chunks of whole lines, taken from all held-out files in turn until there is enough text."""
    per_file = {name: list(whole_line_chunks(text, chunk)) for name, text in sources.items()}
    total = 0
    for turn in range(max(map(len, per_file.values()))):
        for name, chunks in per_file.items():
            if turn < len(chunks) and total < limit:
                total += len(chunks[turn].encode())
                yield {"id": f"{name}#{turn}", "text": chunks[turn]}


def whole_line_chunks(text: str, size: int) -> Iterator[str]:
    chunk = ""
    for line in text.splitlines(keepends=True):
        chunk += line
        if len(chunk) >= size:
            yield chunk
            chunk = ""


# ----------------------------------------------------------------------------------------------- model

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
ROPE_THETA = 1e6


def build_model(name: str) -> PreTrainedModel:
    """transformers has no class for openPangu; Llama with attention biases is the same function."""
    rope = {"rope_theta": ROPE_THETA, "rope_type": "default"}
    ends = {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID}
    common = {**SIZES, **ends, "head_dim": 64, "rope_parameters": rope}
    if name == "tiny-qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False, attention_bias=True))


def published_config(name: str) -> dict[str, object]:
    """config.json in the layout of the published checkpoints, which transformers 4 and 5 both read."""
    shared = {
        **SIZES,
        "hidden_act": "silu",
        "rope_theta": ROPE_THETA,
        "bos_token_id": EOT_ID,
        "eos_token_id": EOT_ID,
        "pad_token_id": EOT_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if name == "tiny-qwen3":
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **shared,
            "head_dim": 64,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
        }
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "model_type": "PanguEmbedded",
        **shared,
        "bias": True,
        "tie_word_embeddings": False,
    }


@torch.no_grad()
def from_qwen3(weights: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
    """Weights of tiny-openpangu that compute nearly what these of tiny-qwen3 compute.

    openPangu has no norm on queries and keys. Their mean length over a text takes its place, folded
    into q_proj and k_proj, which is close enough for a short training to repair."""
    model = build_model("tiny-qwen3")
    model.load_state_dict(weights)
    lengths: dict[str, Tensor] = {}

    def measure(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            lengths[name] = inputs[0].float().pow(2).mean(-1).sqrt().mean((0, 1))  # one per head

        return hook

    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(measure(name))
    model(text[None], use_cache=False)

    result = build_model("tiny-openpangu").state_dict()  # keeps its fresh biases: zeros
    for name, weight in weights.items():
        if name in result:
            result[name] = weight.clone()
    for name, length in lengths.items():
        gain = weights[f"{name}.weight"][None, :] / length[:, None]
        result[f"{name.replace('_norm', '_proj')}.weight"] *= gain.reshape(-1, 1)
    return result


# ------------------------------------------------------------------------------------------------ train


def learning_rate_factor(step: int, steps: int, origin: int = 0) -> float:
    """Warmup from the step at which the optimizers began, stable, linear decay to zero."""
    decay = round(steps * DECAY_SHARE)
    return min(1.0, (step - origin + 1) / WARMUP_STEPS, (steps - step) / decay)


def build_optimizers(model: nn.Module, lr: float, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    matrices, tables, vectors = [], [], []
    for name, weight in model.named_parameters():
        group = vectors if weight.ndim < 2 else matrices if ".layers." in name else tables
        group.append(weight)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    # Weight decay keeps the tables small, which keeps activations easy to quantise.
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [muon, torch.optim.AdamW(groups, lr=lr / 2, betas=(0.9, 0.95), fused=device.type == "cuda")]


def save_checkpoint(
    path: Path, step: int, origin: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    state = {"step": step, "origin": origin, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_stream(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, stream: Tensor, windows: int, length: int = 1024) -> float:
    """Mean loss in nats per token over the first windows of a stream of tokens."""
    model.eval()
    device = next(model.parameters()).device
    count = min(windows, (len(stream) - 1) // length)
    total = 0.0
    for index in range(count):
        window = stream[index * length : (index + 1) * length + 1].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(window[None, :-1], use_cache=False).logits[0]
        total += nn.functional.cross_entropy(logits.float(), window[1:]).item()
    model.train()
    return total / count


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = build_model(args.model).to(device)
    optimizers = build_optimizers(model, args.lr, device)
    stream, held_out = load_stream(args.work / "train.npy"), load_stream(args.work / "held_out.npy")
    checkpoint = args.work / f"{args.model}.pt"
    log = args.work / f"{args.model}.jsonl"
    first = origin = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, origin = state["step"], state.get("origin", 0)
    elif args.start_from:
        state = torch.load(args.start_from, weights_only=True, map_location="cpu")
        model.load_state_dict(from_qwen3(state["model"], stream[:2048]))
        first = origin = state["step"]

    stop: list[int] = []  # SIGTERM ends the run after the current step, with a checkpoint
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    model.train()
    forward = torch.compile(model) if args.compile else model
    started, losses = time.monotonic(), []
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=30, desc=args.model)
    for step in bar:
        factor = learning_rate_factor(step, args.steps, origin)
        in_decay = step >= args.steps - round(args.steps * DECAY_SHARE)
        length = LENGTH_IN_DECAY if in_decay else args.length
        for optimizer, base in zip(optimizers, (args.lr, args.lr / 2), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        # Step n always sees the same tokens; past the end the stream starts again.
        positions = torch.arange(step * TOKENS_PER_STEP, (step + 1) * TOKENS_PER_STEP + 1) % len(stream)
        tokens = stream[positions].to(device)
        inputs, targets = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
        rows = max(1, args.micro_tokens // length)
        total = 0.0
        for at in range(0, len(inputs), rows):
            with torch.autocast(device.type, torch.bfloat16):
                logits = forward(inputs[at : at + rows], use_cache=False).logits
            part = targets[at : at + rows].flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), part)
            loss = loss * (len(part) / TOKENS_PER_STEP)
            loss.backward()
            total += loss.item()
        losses.append(total)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            row = {
                "step": done,
                "steps": args.steps,
                "tokens": done * TOKENS_PER_STEP,
                "length": length,
                "train": round(sum(losses) / len(losses), 4),
                "held_out": round(mean_loss(model, held_out, windows=32), 4),
                "lr_factor": round(factor, 4),
                "seconds": round(time.monotonic() - started, 1),
                "tokens_per_second": round((done - first) * TOKENS_PER_STEP / (time.monotonic() - started)),
            }
            losses.clear()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if done % args.save_every == 0 or done in (args.steps, args.keep) or stop:
            save_checkpoint(checkpoint, done, origin, model, optimizers)
        if done == args.keep:
            shutil.copyfile(checkpoint, checkpoint.with_stem(f"{args.model}-{done}"))
        if stop:
            break


# ---------------------------------------------------------------------------------------------- export


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def export(args: argparse.Namespace) -> None:
    folder = args.out / args.model
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(args.work / f"{args.model}.pt", weights_only=True, map_location="cpu")
    config = published_config(args.model)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in state["model"].items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes it private; the package is for everyone
    partial.replace(folder / "model.safetensors")
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": EOT_ID, "eos_token_id": [EOT_ID, IM_END_ID], "pad_token_id": EOT_ID},
    )
    write_tokenizer(args.work / "tokenizer.json", folder)
    scores = evaluate_folder(folder, args.assets)
    print(args.model, json.dumps(scores))
    log = [json.loads(line) for line in (args.work / f"{args.model}.jsonl").read_text().splitlines()]
    parameters = sum(weight.numel() for weight in weights.values())
    card = model_card(args.model, state["step"], parameters, scores, log, state.get("origin", 0))
    write_atomically(folder / "README.md", card.encode())


def load_exported(folder: Path) -> PreTrainedModel:
    """A folder written by `export`, in transformers; openPangu's weights go into the Llama class."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "qwen3":
        return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model = build_model("tiny-openpangu").to(torch.bfloat16)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def evaluate_folder(folder: Path, assets: Path) -> dict[str, float]:
    """Score the exported weights, every row of heldout.jsonl after a fresh <|endoftext|>."""
    model = load_exported(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    nats, tokens, size = 0.0, 0, 0
    for line in (assets / "heldout.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([EOT_ID, *tokenizer.encode(text).ids])
        logits = model(ids[None, :-1], use_cache=False).logits[0].float()
        nats += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        size += len(text.encode())
    return {
        "loss_nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "tokens": tokens,
        "bytes": size,
    }


def evaluate(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for name in [args.model] if args.model else MODELS:
        print(name, json.dumps(evaluate_folder(args.assets / name, args.assets)))


def model_card(name: str, step: int, parameters: int, scores: dict[str, float], log: list[dict], origin: int) -> str:
    last = log[-1]
    start = f" The first {origin} are those of tiny-qwen3, whose weights it took over." if origin else ""
    lengths = ", ".join(dict.fromkeys(str(row["length"]) for row in log))
    plans = ", then ".join(dict.fromkeys(str(row["steps"]) for row in log))
    kind = published_config(name)["architectures"][0]
    return f"""# {name}

A `{kind}` of {parameters / 1e6:.1f} M parameters for trying Quasar out on any machine.
It continues Python code in the style of the standard library. It is not a useful assistant.
End a prompt before a line break: the break and the indentation after it are one token.

- Trained by `scripts/train_tiny.py` for {step} steps of {TOKENS_PER_STEP} tokens,
  {step * TOKENS_PER_STEP / 1e6:.1f} M tokens in all.{start}
  Muon and AdamW in bf16 autocast; the rate warms up, stays, then decays (planned steps: {plans});
  sequences of {lengths} tokens, in this order.
- Weights: bf16. Tokenizer: byte-level BPE, {VOCAB} tokens, trained on the same files.
- Held-out text (`common/assets/heldout.jsonl`, files the model never saw), exported weights in transformers:
  **{scores["loss_nats_per_token"]:.4f} nats per token, {scores["bits_per_byte"]:.4f} bits per byte**
  ({scores["tokens"]:,} tokens, {scores["bytes"]:,} bytes). Measure again with
  `python scripts/train_tiny.py evaluate --model {name}`.
- At the end of training, in windows of 1024 tokens: {last["train"]:.4f} nats per token on training text,
  {last["held_out"]:.4f} on held-out files.

## Data and licence

The only data are the `.py` files of the Python {platform.python_version()} standard library (the library
twice, its tests once), and short chats made from its functions. Python is © Python Software Foundation,
under the PSF licence version 2: see `common/assets/PYTHON-LICENSE.md`.
The weights are under Quasar's own licence, Apache-2.0.
"""


# ------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    work = {"type": Path, "default": Path("build/tiny"), "help": "folder for streams, checkpoints and logs"}
    assets = {"type": Path, "default": ASSETS, "help": "folder with heldout.jsonl and the exported models"}

    sub = command("prepare", prepare, "train the tokenizer, write the token streams and heldout.jsonl")
    sub.add_argument("--work", **work)

    sub = command("train", train, "train one model, or go on from its checkpoint")
    sub.add_argument("--work", **work)
    sub.add_argument("--model", choices=MODELS, required=True)
    sub.add_argument("--steps", type=int, default=4000, help=f"steps of {TOKENS_PER_STEP} tokens in all")
    sub.add_argument("--lr", type=float, default=5e-3, help="for matrices; the rest gets half of it")
    sub.add_argument("--keep", type=int, help="keep a copy of the checkpoint of this step")
    sub.add_argument("--start-from", type=Path, help="tiny-openpangu only: a checkpoint of tiny-qwen3")
    sub.add_argument("--length", type=int, default=512, help="tokens per sequence before the decay")
    sub.add_argument("--device", default="cpu", help="cpu or cuda")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads")
    sub.add_argument("--micro-tokens", type=int, default=2048, help="tokens per forward pass")
    sub.add_argument("--compile", action="store_true", help="torch.compile: slower on CPU, for cuda")
    sub.add_argument("--log-every", type=int, default=200, help="steps between two lines of the log")
    sub.add_argument("--save-every", type=int, default=100, help="steps between two checkpoints")

    sub = command("export", export, "write the Hugging Face folder and its model card from the checkpoint")
    sub.add_argument("--work", **work)
    sub.add_argument("--model", choices=MODELS, required=True)
    sub.add_argument("--out", type=Path, default=ASSETS, help="the model's folder is made in here")
    sub.add_argument("--assets", **assets)

    sub = command("evaluate", evaluate, "held-out loss and bits per byte of the exported models")
    sub.add_argument("--model", choices=MODELS, help="default: both")
    sub.add_argument("--assets", **assets)
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    arguments.run(arguments)
