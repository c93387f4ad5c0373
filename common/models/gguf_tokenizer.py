"""The tokenizer in a GGUF file's metadata, made runnable with the `tokenizers` library.

A file holds the vocabulary and, for byte-level BPE ("gpt2"), the merges; how text is split before them is a name
that llama.cpp knows. SentencePiece vocabularies ("llama") hold scores, from which the merges follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasar.checkpoints.gguf import GGUFFile
from quasar.errors import QuasarError, shorten

if TYPE_CHECKING:
    import tokenizers

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types
_SPACE = "\u2581"
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Control tokens that end a turn, whether or not the file names them as the end token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "[unused10]")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How text is split before byte-level BPE, by the name in tokenizer.ggml.pre: a pattern, or GPT-2's with or without
# digits apart.
_SPLITS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
}
_BEGINS = ("llama-bpe", "llama3", "llama-v3")  # vocabularies whose text begins with a token unless the file says no


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a Tokenizer is made of."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    chat_template: str | None


def gguf_tokenizer(file: GGUFFile) -> GGUFTokenizer | None:
    """The tokenizer, None where the file brings none. Raises QuasarError where it is of an unknown kind or broken."""
    kind = file.metadata.get(_PREFIX + "model")
    if kind is None or kind == "no_vocab":
        return None
    parts = _Parts(file)
    if kind == "gpt2":
        backend = parts.byte_level()
    elif kind == "llama":
        backend = parts.sentencepiece()
    else:
        raise QuasarError(
            f"{file.path}: {_PREFIX}model {shorten(repr(kind))} is not supported; Quasar reads gpt2 and llama"
        )
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise QuasarError(f"{file.path}: tokenizer.chat_template should be a text")
    return GGUFTokenizer(backend, parts.special, template)


def gguf_stop_ids(file: GGUFFile) -> set[int]:
    """Ids that end a text: the end token, the end of a turn, and control tokens known to mean that."""
    named = (file.metadata.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom"))
    ids = {i for i in named if isinstance(i, int)}
    tokens, kinds = file.metadata.get(_PREFIX + "tokens"), file.metadata.get(_PREFIX + "token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        pairs = enumerate(zip(tokens, kinds, strict=False))
        ids |= {i for i, (token, kind) in pairs if kind == _CONTROL and token in _TURN_ENDS}
    return ids


class _Parts:
    """The arrays of the metadata, checked against each other."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.tokens: list[str] = self._array("tokens", str)
        self.kinds: list[int] = self._array("token_type", int, optional=True) or [1] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise QuasarError(
                f"{file.path}: {_PREFIX}token_type has {len(self.kinds)} elements, tokens {len(self.tokens)}"
            )
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        self.special: dict[str, str] = {}
        for role, name in _ROLES.items():
            value = file.metadata.get(_PREFIX + name)
            if value is not None:
                if not isinstance(value, int) or not 0 <= value < len(self.tokens):
                    raise QuasarError(
                        f"{file.path}: {_PREFIX}{name} is {shorten(repr(value))}; the vocabulary has "
                        f"{len(self.tokens)} tokens"
                    )
                self.special[role] = self.tokens[value]

    def byte_level(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        name = self._field("pre", "default")
        split = _SPLITS.get(name) if isinstance(name, str) else None
        if split is None:
            raise QuasarError(
                f"{self.file.path}: {_PREFIX}pre {shorten(repr(name))} is not supported; Quasar knows "
                f"{', '.join(_SPLITS)}"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in self._array("merges", str)]
        if not all(len(pair) == 2 for pair in merges):
            raise QuasarError(f"{self.file.path}: {_PREFIX}merges should hold two tokens each, with a space between")
        backend = self._built(
            lambda: Tokenizer(models.BPE(self.vocab, merges, ignore_merges=name in _BEGINS, fuse_unk=False))
        )
        prefix = bool(self._field("add_space_prefix", False))
        if split in ("gpt2", "digits"):
            steps = [pre_tokenizers.Digits(individual_digits=True)] if split == "digits" else []
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix))
        else:
            steps = [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        return self._finished(backend, begins=name in _BEGINS)

    def sentencepiece(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        if _PREFIX + "merges" in self.file.metadata:
            merges = [tuple(merge.split(" ", 1)) for merge in self._array("merges", str)]
        else:
            merges = self._merges_of_scores()
        unknown = self.special.get("unk_token")
        backend = self._built(
            lambda: Tokenizer(models.BPE(self.vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        )
        prefix = bool(self._field("add_space_prefix", True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first" if prefix else "never", split=False)
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
        return self._finished(backend, begins=True)

    def _merges_of_scores(self) -> list[tuple[str, str]]:
        """Every way to join two tokens to a third, the best-scored third first: SentencePiece joins in that order."""
        scores = self._array("scores", (int, float))
        if len(scores) != len(self.tokens):
            raise QuasarError(f"{self.file.path}: {_PREFIX}scores has {len(scores)} elements, not {len(self.tokens)}")
        plain = {
            t: i for i, (t, k) in enumerate(zip(self.tokens, self.kinds, strict=True)) if k not in (_CONTROL, _BYTE)
        }
        found = []
        for token, i in plain.items():
            if len(token) > 64:  # the longest of real vocabularies are runs of spaces; a longer one costs its square
                continue
            for cut in range(1, len(token)):
                left, right = plain.get(token[:cut]), plain.get(token[cut:])
                if left is not None and right is not None:
                    found.append((-scores[i], left, right))
        found.sort()
        return [(self.tokens[left], self.tokens[right]) for _, left, right in found]

    def _built(self, make: Any) -> tokenizers.Tokenizer:
        try:
            return make()
        except BaseException as error:  # the library raises bare Exceptions, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise QuasarError(f"{self.file.path}: no usable tokenizer ({shorten(str(error), 300)})") from None

    def _finished(self, backend: tokenizers.Tokenizer, begins: bool) -> tokenizers.Tokenizer:
        """Control and user-defined tokens are never cut, and what stands around a text is the file's choice."""
        from tokenizers import AddedToken

        from quasar.models.tokenizer import set_begin_and_end

        typed = list(zip(self.tokens, self.kinds, strict=True))
        unknown = self.special.get("unk_token")
        control = [AddedToken(t, normalized=False, special=True) for t, k in typed if t and k == _CONTROL]
        if unknown:
            control.append(AddedToken(unknown, normalized=False, special=True))
        backend.add_special_tokens(control)
        backend.add_tokens(
            [AddedToken(t, normalized=False, special=False) for t, k in typed if t and k == _USER_DEFINED]
        )
        set_begin_and_end(
            backend,
            self.special.get("bos_token") if self._field("add_bos_token", begins) else None,
            self.special.get("eos_token") if self._field("add_eos_token", False) else None,
        )
        return backend

    def _field(self, name: str, default: Any) -> Any:
        value = self.file.metadata.get(_PREFIX + name)
        return default if value is None else value

    def _array(self, name: str, kind: Any, optional: bool = False) -> list[Any]:
        value = self.file.metadata.get(_PREFIX + name)
        if value is None and optional:
            return []
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise QuasarError(f"{self.file.path}: {_PREFIX}{name} should be an array of a tokenizer's vocabulary")
        return value
