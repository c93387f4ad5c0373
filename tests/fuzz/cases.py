"""The cases: something good is spoiled, and what the product makes of it is checked.

A case ends as "ran" or "refused". Any exception but QuasarError, a refusal that is no line, another text with drafts
than without, and an inspection that says otherwise than loading are failures.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from quasar import GenerationSettings, Model, QuasarError, generate, load
from quasar.checkpoints.gguf import open_gguf
from quasar.cli import main
from quasar.cli.batch import ask
from quasar.cli.inspect import report
from quasar.drafting.memory import DraftMemory
from quasar.drafting.store import CorpusStore
from quasar.engine.engine import Engine
from quasar.models.chat import render_chat
from quasar.models.tokenizer import Tokenizer
from quasar.models.weights_cache import WeightsCache
from tests.fuzz.mutations import dump, random_template, random_value, spoil_bytes, spoil_json, spoil_json_file
from tests.helpers.gguf_files import write_gguf
from tests.helpers.serving import TEMPLATE

GOLDEN = Path(__file__).parents[1] / "golden"
QUANTISED = (
    "llm-compressor",
    "llm-compressor-static",
    "msmodelslim-static-fp16",
    "msmodelslim-mix",
    "msmodelslim-w4a16",
)
MOST_CHARACTERS = 1000  # of a refusal
OFF = WeightsCache(Path("/nonexistent"), gigabytes=0)
DRAFTS = ("ngram", "suffix", "hybrid", "recycling", "corpus", "text")
# What an inspection cannot see, because it reads no weights.
OF_VALUES = ("finite", "above zero", "is not zero", "whole", "no float32 scales", "memory")


class Failure(AssertionError):
    """Something that must not be."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Failure(what)


def one_line(error: QuasarError) -> None:
    text = str(error)
    require("\n" not in text, f"a refusal of several lines: {text[:300]!r}")
    require(len(text) <= MOST_CHARACTERS, f"a refusal of {len(text)} characters: {text[:300]!r}")


def alike(one: QuasarError, other: QuasarError) -> bool:
    """Whether they say the same; of several wrong tensors the safetensors library names any."""
    first, second = (re.sub("tensor `.*?`", "tensor", str(error)) for error in (one, other))
    return first == second


def kind_of(number: int, kinds: tuple[str, ...] = ()) -> str:
    """The kinds take turns."""
    names = kinds or tuple(KINDS)
    return names[number % len(names)]


def run_case(seed: int, number: int, kinds: tuple[str, ...] = ()) -> str:
    """The outcome of a case, which depends on its seed, kind and number alone."""
    kind = kind_of(number, kinds)
    dice = random.Random(f"{seed}/{kind}/{number}")
    with tempfile.TemporaryDirectory(prefix="quasar-fuzz-") as folder:
        return KINDS[kind](dice, Path(folder))


# Checkpoints.


def check_checkpoint(path: Path, dice: random.Random) -> str:
    """Inspects it, loads it, and where it loads uses it."""
    _, problem = report(path)
    if problem is not None:
        one_line(problem)
    precision = dice.choice(("auto", "auto", "auto", "auto", "w8a8", "w4a16"))
    device = dice.choice(("cpu", "cpu", "reference"))
    lossless = precision != "auto" and dice.random() < 0.3
    try:
        model = load(path, device=device, precision=precision, lossless=lossless, force=True, cache=OFF)
    except QuasarError as error:
        one_line(error)
        if precision == "auto":
            agreed = alike(problem, error) if problem else any(word in str(error) for word in OF_VALUES)
            require(agreed, f"inspect says {problem}, load says {error}")
        return "refused"
    require(problem is None, f"inspect says {problem}, and it loads")
    try:
        use(model, dice)
    except QuasarError as error:
        one_line(error)
        return "refused"
    return "ran"


def use(model: Model, dice: random.Random) -> None:
    """Generates with and without drafts, chats and serves."""
    ids = [dice.randrange(model.config.vocab_size) for _ in range(dice.choice((1, 3, 20)))]
    if model.tokenizer is not None and dice.random() < 0.7:
        ids = model.encode("def main():\n    print(1)\n", chat=bool(model.tokenizer.chat_template))
    settings = GenerationSettings(
        max_new_tokens=dice.choice((1, 8, 24)),
        temperature=dice.choice((0.0, 0.7)),
        gamma=dice.choice((None, 1, 5, 32)),
        draft=dice.choice(DRAFTS),
        stop=dice.choice(((), ("a",), ("\n", "é"))),
        lossless=model.full is not None,
    )
    drafted = generate(model, ids, settings).result()
    alone = generate(
        model if model.full is None else model.with_decoder(model.full, "full"),
        ids,
        GenerationSettings(**{**vars(settings), "draft": "none", "lossless": False}),
    ).result()
    require(drafted.token_ids == alone.token_ids, f"{settings.draft} gives {drafted.token_ids}, not {alone.token_ids}")
    drafted.text.encode()
    if dice.random() < 0.25:
        serve(model, dice)


def serve(model: Model, dice: random.Random) -> None:
    """Two requests at once, in this process."""
    from quasar.server.app import create_app
    from quasar.server.service import ServerOptions

    body = {"prompt": [1, 2, 0], "max_tokens": 4, "temperature": 0}
    if model.tokenizer is not None:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"

    async def both() -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(ask(app, path, json.dumps(body).encode()) for _ in range(2)))

    with Engine(model, 2) as engine:
        app = create_app(model, engine, ServerOptions(draft=dice.choice(DRAFTS)))
        for status, answer in asyncio.run(both()):
            require(status < 500, f"{path}: {status} {answer[:300]!r}")
            json.loads(answer)


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, folder / "model"))


def config(dice: random.Random, folder: Path) -> str:
    model = copied("small-qwen3", folder)
    if dice.random() < 0.3:  # sizes that are possible
        path = model / "config.json"
        names = ("max_position_embeddings", "rope_theta", "rms_norm_eps", "eos_token_id", "num_hidden_layers")
        fields = json.loads(path.read_text()) | {dice.choice(names): dice.choice((1, 2, 17, 20, 1.5, 1 << 20, [1, 2]))}
        path.write_text(json.dumps(fields))
    else:
        spoil_json_file(model / "config.json", dice)
    return check_checkpoint(model, dice)


def header(dice: random.Random, folder: Path) -> str:
    model = copied(dice.choice(("small-qwen3", *QUANTISED)), folder)
    path = dice.choice(sorted(model.glob("*.safetensors")))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if dice.random() < 0.6:
        fields = json.loads(content[8 : 8 + length])
        made = dump(spoil_json(fields, dice)).encode(errors="surrogatepass")
        size = len(made) + dice.choice((0, 0, 0, 0, 1, -1, 2**40))
        content = max(size, 0).to_bytes(8, "little") + made + content[8 + length :]
    else:
        content = spoil_bytes(content, dice, 8 + length)
    path.write_bytes(content)
    return check_checkpoint(model, dice)


def index(dice: random.Random, folder: Path) -> str:
    indexed = [name for name in ("small-qwen3", *QUANTISED) if any((GOLDEN / name).glob("*.index.json"))]
    model = copied(dice.choice([*indexed, "small-qwen3"]), folder)
    path = next(model.glob("*.index.json"), None)
    if path is None:
        length = int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
        names = json.loads((model / "model.safetensors").read_bytes()[8 : 8 + length])
        path = model / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {n: "model.safetensors" for n in names if n != "__metadata__"}}))
    spoil_json_file(path, dice)
    return check_checkpoint(model, dice)


def description(dice: random.Random, folder: Path) -> str:
    model = copied(dice.choice([name for name in QUANTISED if name.startswith("msmodelslim")]), folder)
    spoil_json_file(next(model.glob("quant_model_description*.json")), dice)
    return check_checkpoint(model, dice)


def quantization_config(dice: random.Random, folder: Path) -> str:
    model = copied(dice.choice([name for name in QUANTISED if name.startswith("llm-compressor")]), folder)
    fields = json.loads((model / "config.json").read_text())
    fields["quantization_config"] = spoil_json(fields["quantization_config"], dice)
    (model / "config.json").write_text(dump(fields))
    return check_checkpoint(model, dice)


def tokenizer(dice: random.Random, folder: Path) -> str:
    model = copied("small-qwen3", folder)
    name = dice.choice(("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "generation_config.json"))
    if name == "tokenizer_config.json" and dice.random() < 0.5:
        fields = json.loads((model / name).read_text())
        roles = ("eos_token", "bos_token", "model_max_length", "added_tokens_decoder", "additional_special_tokens")
        key = dice.choice((*roles, "tokenizer_class", "add_bos_token", "extra_special_tokens", "auto_map"))
        classes = ("LlamaTokenizer", "Qwen2Tokenizer", "BertTokenizer", "NoSuchTokenizer")
        fields[key] = dice.choice(classes) if key == "tokenizer_class" else random_value(dice)
        (model / name).write_text(dump(fields))
    else:
        spoil_json_file(model / name, dice)
    return check_checkpoint(model, dice)


def template(dice: random.Random, folder: Path) -> str:
    model = copied("small-qwen3", folder)
    made = random_template(dice, TEMPLATE)
    if dice.random() < 0.7:
        (model / "chat_template.jinja").write_bytes(made.encode(errors="surrogatepass"))
    else:
        fields = json.loads((model / "tokenizer_config.json").read_text())
        several = [{"name": dice.choice(("default", "tool_use", "x")), "template": made}]
        fields["chat_template"] = dice.choice((made, several, random_value(dice)))
        (model / "tokenizer_config.json").write_text(dump(fields))
    return check_checkpoint(model, dice)


@cache
def _good_gguf() -> tuple[bytes, int]:
    """The bytes of a file, and where its tensors begin."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(
            Path(folder) / "model.gguf", layers=1, hidden=64, heads=2, kv_heads=1, head_dim=32, intermediate=64
        )
        return path.read_bytes(), min(tensor.start for tensor in open_gguf(path).tensors.values())


def gguf(dice: random.Random, folder: Path) -> str:
    path = folder / "model.gguf"
    path.write_bytes(spoil_bytes(*_good_gguf()[:1], dice, _good_gguf()[1]))
    return check_checkpoint(path, dice)


# What drafters and quantising keep.


@cache
def good_model(precision: str = "full") -> Model:
    return load(GOLDEN / "small-qwen3", device="cpu", precision=precision, force=True, cache=OFF)


def store(dice: random.Random, folder: Path) -> str:
    model = good_model()
    place = folder / "store"
    most = dice.choice((40, 10_000))
    with CorpusStore(place, "fingerprint", 257, most) as made:
        for _ in range(dice.choice((0, 1, 5))):
            made.add([dice.randrange(257) for _ in range(30)])
    path = dice.choice(sorted(place.iterdir()))
    if path.suffix == ".json" and dice.random() < 0.7:
        spoil_json_file(path, dice)
    else:
        path.write_bytes(spoil_bytes(path.read_bytes(), dice))
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(dump(spoil_json([1, 2, 3], dice)) for _ in range(3)))
    try:
        with CorpusStore(place, "fingerprint", 257, most) as opened:
            settings = GenerationSettings(max_new_tokens=8, draft=dice.choice(("hybrid", "corpus")), ignore_eos=True)
            drafted = generate(model, [1, 2, 3], settings, draft_memory=DraftMemory(opened)).result()
        CorpusStore(place, "fingerprint", 257, most).close()
        alone = generate(model, [1, 2, 3], max_new_tokens=8, draft="none", ignore_eos=True).result()
        require(drafted.token_ids == alone.token_ids, "a spoiled store changes ids")
        generate(model, [1, 2, 3], max_new_tokens=4, draft=f"suffix:{texts}").result()
    except QuasarError as error:
        one_line(error)
        return "refused"
    return "ran"


@cache
def _good_cache() -> tuple[tempfile.TemporaryDirectory[str], list[int]]:
    """A cache that holds a quantised model, and what the model says."""
    folder = tempfile.TemporaryDirectory(prefix="quasar-fuzz-cache-")
    return folder, _say(Path(folder.name))


def _say(folder: Path) -> list[int]:
    model = load(GOLDEN / "small-qwen3", device="cpu", precision="w8a8", force=True, cache=WeightsCache(folder, 1))
    return generate(model, [1, 2, 3], max_new_tokens=8, draft="none", ignore_eos=True).result().token_ids


def weights_cache(dice: random.Random, folder: Path) -> str:
    """What is damaged is made again, and says the same."""
    good, expected = _good_cache()
    place = Path(shutil.copytree(good.name, folder / "cache"))
    path = dice.choice([path for path in sorted(place.rglob("*")) if path.is_file()])
    if path.suffix == ".json" and dice.random() < 0.7:
        spoil_json_file(path, dice)
    else:
        content = path.read_bytes()
        # Values of weights carry no checksum: a bit that a disk flips there is the disk's.
        length = int.from_bytes(content[:8], "little") + 8 if path.suffix == ".safetensors" else len(content)
        path.write_bytes(spoil_bytes(content[:length], dice) + content[length:])
    require(_say(place) == expected, f"{path.name} spoiled changes the model")
    WeightsCache(place, 1).entries()
    return "ran"


# Requests.

_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0.5, "seed": 1, "n": 2},
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "H"}]},
            ],
            "max_completion_tokens": 4,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 3,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        },
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 4,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            },
            "frequency_penalty": 0.5,
            "logit_bias": {"5": 3},
        },
    ],
    "/v1/completions": [
        {"prompt": "def", "max_tokens": 4, "echo": True, "logprobs": 2, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"prompt": [[1, 2], [3]], "max_tokens": 4, "stream": True, "presence_penalty": 1, "ignore_eos": True},
        {"prompt": "a", "max_tokens": 4, "guided_regex": "[a-z]+", "suffix": None, "best_of": 2, "user": "u"},
    ],
    "/v1/responses": [{"input": "Hi", "max_output_tokens": 4, "instructions": "x", "stream": False}],
    "/v1/messages": [
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "system": "s", "stream": True}
    ],
    "/v1/messages/count_tokens": [{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}],
    "/tokenize": [{"prompt": "Hi", "add_special_tokens": True}, {"messages": [{"role": "user", "content": "Hi"}]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}


@cache
def _app() -> Any:
    from quasar.server.app import create_app
    from quasar.server.service import ServerOptions

    full = good_model()
    model = full.with_decoder(full.decoder, "full")
    model.tokenizer = Tokenizer(full.tokenizer.backend, "small", full.tokenizer.special, TEMPLATE)
    return create_app(model, Engine(model, 4), ServerOptions(draft="hybrid", default_max_tokens=8))


def http(dice: random.Random, folder: Path) -> str:
    path = dice.choice(sorted(_BODIES))
    body = json.loads(json.dumps(dice.choice(_BODIES[path])))
    for _ in range(dice.choice((1, 1, 2, 3))):
        body = spoil_json(body, dice)
    content = dump(body).encode(errors="surrogatepass")
    if dice.random() < 0.15:
        content = spoil_bytes(content, dice)
    status, answer = asyncio.run(ask(_app(), path, content))
    require(status < 500, f"{path}: {status} {answer[:500]!r} to {content[:500]!r}")
    if answer.startswith((b"data:", b"event:")):
        lines = [line for line in answer.decode().split("\n") if line.startswith("data:")]
        for line in lines:
            if line != "data: [DONE]":
                json.loads(line[5:])
    else:
        json.loads(answer)
    return "ran" if status == 200 else "refused"


_LINES = (
    {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}},
    {"prompt": "a b c", "answer": "d e f"},
    {"prompt": [1, 2, 3], "answer": [4, 5, 6], "top": [[1], [2], [3]]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}], "choices": []},
    {"question_id": 1, "category": "c", "turns": ["a", "b"]},
)


def files(dice: random.Random, folder: Path) -> str:
    """Commands whose input is a file."""
    path = folder / "lines.jsonl"
    lines = [dump(spoil_json(json.loads(json.dumps(dice.choice(_LINES))), dice)) for _ in range(dice.choice((1, 2, 4)))]
    content = "\n".join(lines).encode(errors="surrogatepass")
    path.write_bytes(spoil_bytes(content, dice) if dice.random() < 0.2 else content)
    model = ("--model", str(GOLDEN / "small-qwen3"))
    argv = dice.choice(
        (
            ("eval", "replay", str(path), "--draft", "ngram,recycling", *model),
            ("corpus", "build", str(path), "--draft-store", str(folder / "store"), *model),
            ("batch", str(path), "--output", str(folder / "out"), "--precision", "full", "--device", "cpu", *model),
            ("generate", "--prompt-file", str(path), "--precision", "full", "--max-new-tokens", "4", *model),
            ("eval", "tasks", "--tasks", str(path), "--schemes", "plain-full", "--max-new-tokens", "2", *model),
        )
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    require(code in (0, 2), f"exit code {code}")
    said = err.getvalue()
    if code == 2:
        require(said.count("\n") == 1 and len(said) <= MOST_CHARACTERS + 50, f"{argv[0]} says {said[:400]!r}")
    return "ran" if code == 0 else "refused"


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    made.__name__: made
    for made in (
        config,
        header,
        index,
        description,
        quantization_config,
        tokenizer,
        template,
        gguf,
        store,
        weights_cache,
        http,
        files,
    )
}


def clean_up() -> None:
    """Removes what cases share, where the process ends at once."""
    _good_cache()[0].cleanup()


def warm_up() -> None:
    """Imports and makes what cases share, so that no case pays for it."""
    import transformers.models.auto.tokenization_auto  # noqa: F401 - asked for where there is no tokenizer.json

    for make in (_good_gguf, _good_cache, _app):
        make()
    render_chat(_app().state.service.model.tokenizer, [{"role": "user", "content": "Hi"}])
    with tempfile.TemporaryDirectory() as folder:
        check_checkpoint(copied("small-qwen3", Path(folder)), random.Random(0))
    sys.stderr.flush()
