"""Text to token ids and back, and chat templates: tokenizer.json through the `tokenizers` library alone.

transformers takes seconds to import. It is asked only where a checkpoint has no tokenizer.json, or brings Python code
of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.checkpoints.folder import read_json
from quasar.errors import QuasarError, shorten
from quasar.models.chat_template import ChatTemplate
from quasar.reading import is_text

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# A folder without any of these has no tokenizer, and takes token ids.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# transformers gives these the begin and end tokens that tokenizer_config.json asks for, whatever tokenizer.json does.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_KNOWN_CLASSES = (
    *_LLAMA_CLASSES,
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "Qwen3Tokenizer",
    "TokenizersBackend",
)


# What shows only at the first text: fields of a wrong type, and a vocabulary that has no token for what it has not.
_PROBE = "a text, 1 \u2603\n"


class Tokenizer:
    """A tokenizer with the special tokens and the chat template of its checkpoint.

    Its methods have the names and meanings of transformers', so that either kind serves.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        special: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """special: texts by role ("eos_token"), as chat templates see them. chat_template: one, or several by name."""
        self.backend, self.name_or_path = backend, name
        self.special = dict(special or {})
        self.chat_template = chat_template
        self._template: ChatTemplate | None = None

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """What does the work, under the name that transformers has for it."""
        return self.backend

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the begin token where the checkpoint wants one."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            if is_text(text):
                raise
            raise QuasarError(f"{shorten(ascii(text))}: half a surrogate pair is no text") from None

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False, **_ignored: Any) -> str:
        """The text of token ids."""
        return self.backend.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return self.backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of the tokens that stand beside the model's vocabulary and are never cut, special ones among them."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens as the vocabulary spells them; None for those that it has not."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """Tokens as the vocabulary spells them."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(i) for i in ids]

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that `decode` can skip."""
        return [i for i, token in self.backend.get_added_tokens_decoder().items() if token.special]

    @property
    def bos_token(self) -> str | None:
        return self.special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """The conversation as the model was trained to see it: text, or its ids.

        conversation: messages with role and content. variables go to the template. Raises QuasarError where there
        is no template or it fails.
        """
        if return_dict:
            raise TypeError("return_dict is not supported: the result is text or ids")
        template = self._chosen(chat_template, tools)
        text = template.render(
            messages=conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **(self.special | variables),
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _chosen(self, given: str | None, tools: Sequence[Any] | None) -> ChatTemplate:
        source = given if given is not None else self.chat_template
        if isinstance(source, Mapping):  # several by name
            source = source.get("tool_use" if tools and "tool_use" in source else "default")
            if source is None:
                names = ", ".join(sorted(self.chat_template))
                raise QuasarError(f"{self.name_or_path}: none of its chat templates ({shorten(names)}) is the default")
        if not source:
            raise QuasarError(f"{self.name_or_path} has no chat template; leave out --chat")
        if self._template is None or self._template.source != source:
            self._template = ChatTemplate(source, self.name_or_path)
        return self._template

    def check_chat_template(self) -> None:
        """Raises QuasarError where there is a template that cannot even be compiled."""
        sources = self.chat_template.values() if isinstance(self.chat_template, Mapping) else [self.chat_template]
        for source in sources:
            if source:
                ChatTemplate(source, self.name_or_path)

    def save_pretrained(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if isinstance(self.chat_template, str):
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer | PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint folder or GGUF file; None where there is none, QuasarError where it is no use."""
    if folder.is_file():
        from quasar.checkpoints.gguf import open_gguf
        from quasar.models.gguf_tokenizer import gguf_tokenizer

        made = gguf_tokenizer(open_gguf(folder))
        return None if made is None else Tokenizer(made.backend, str(folder), made.special, made.chat_template)
    code = folder.glob("tokenization_*.py")
    if not any((folder / name).exists() for name in _FILES) and not any(folder.glob("*.tiktoken")) and not any(code):
        return None
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    known = config.get("tokenizer_class") in (None, *_KNOWN_CLASSES) and not config.get("auto_map")
    if known and (folder / "tokenizer.json").exists():
        return _from_tokenizer_json(folder, config)
    return _from_transformers(folder, trust_remote_code)


def stop_ids(folder: Path, tokenizer: Tokenizer | PreTrainedTokenizerBase | None) -> frozenset[int]:
    """From generation_config.json, else config.json, or the GGUF file; and the tokenizer's own end token."""
    ids: set[int] = set()
    if folder.is_file():
        from quasar.checkpoints.gguf import open_gguf
        from quasar.models.gguf_tokenizer import gguf_stop_ids

        ids |= gguf_stop_ids(open_gguf(folder))
    for file in ("generation_config.json", "config.json"):
        if not ids and not folder.is_file() and (folder / file).exists():
            value = read_json(folder / file).get("eos_token_id")
            ids.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _from_tokenizer_json(folder: Path, config: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    backend = _parse(path)
    config_path = folder / "tokenizer_config.json"
    special: dict[str, str] = {}
    for role in SPECIAL:
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(token, str):
            raise QuasarError(f"{config_path}: {role} is {shorten(repr(token))}; it should be a text")
        special[role] = token
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in declared.values()
    ):
        raise QuasarError(f"{config_path}: added_tokens_decoder should map ids to objects with a content")
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in declared.values():
        if token["content"] not in added:
            flags = {k: bool(token.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([_added(config_path, token["content"], **flags)])
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    texts = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in texts]
    for text in [*special.values(), *(text for text in texts if isinstance(text, str))]:
        if text and not (text in added and added[text].special):
            backend.add_special_tokens([_added(config_path, text, normalized=False, special=True)])
    if config.get("tokenizer_class") in _LLAMA_CLASSES and ("add_bos_token" in config or "add_eos_token" in config):
        set_begin_and_end(
            backend,
            special.get("bos_token") if config.get("add_bos_token", True) else None,
            special.get("eos_token") if config.get("add_eos_token", False) else None,
        )
    try:
        backend.encode(_PROBE)
    except Exception as error:  # a bare one
        raise QuasarError(f"{folder}: no usable tokenizer ({_first_line(error)})") from None
    return Tokenizer(backend, str(folder), special, _template_of(folder, config))


def _added(path: Path, text: str, **flags: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    try:
        return AddedToken(text, **flags)
    except UnicodeEncodeError:
        raise QuasarError(f"{path}: the token {shorten(repr(text))} holds half a surrogate pair") from None


def set_begin_and_end(backend: tokenizers.Tokenizer, begin: str | None, end: str | None) -> None:
    """Has `encode` put these tokens around a text; None: nothing there."""
    from tokenizers import processors

    around = [token for token in (begin, end) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*([begin] if begin else []), "$A", *([end] if end else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def _parse(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # the library raises bare Exceptions, and panics, on files that it cannot parse
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise QuasarError(f"{path.parent}: no usable tokenizer ({_first_line(error)})") from None


def _template_of(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja, else the field of tokenizer_config.json: a text, or several with names."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QuasarError(f"{path}: cannot be read as text ({_first_line(error)})") from None
    value = config.get("chat_template")
    if isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    ):
        return {one["name"]: one["template"] for one in value}
    if value is not None and not isinstance(value, str):
        raise QuasarError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {shorten(repr(value))}; it should be a text"
        )
    return value


def _from_transformers(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # takes seconds to import
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    # It warns that it has no such model as PanguEmbedded: only the tokenizer is asked for.
    transformers_logging.set_verbosity_error()
    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        made.encode(_PROBE)
        return made
    except Exception as error:  # the tokenizers library raises bare Exceptions on files that it cannot parse
        if "trust_remote_code" in str(error):
            raise QuasarError(
                f"{folder}: the tokenizer is Python code in the checkpoint; read it, then give --trust-remote-code"
            ) from None
        raise QuasarError(f"{folder}: no usable tokenizer ({_first_line(error)})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return shorten(text.splitlines()[0], 300) if text else type(error).__name__
