"""Conversations: token ids as the models' authors make them, and reasoning apart from the answer."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar import QuasarError
from quasar.models.chat import OPENPANGU, QWEN3, ReasoningSplitter, render_chat, splitter_for, think_markers
from quasar.models.model import ASSETS, load_tokenizer

USER = [{"role": "user", "content": "What is 2 + 2?"}]
# The behaviour of openPangu's template: an empty system turn where none is given, markers that are plain tokens.
PANGU_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}[unused9]system:[unused10]{% endif %}"
    "{% for message in messages %}[unused9]{{ message['role'] }}:{{ message['content'] }}[unused10]{% endfor %}"
    "{% if add_generation_prompt %}[unused9]assistant:{% endif %}"
)
# A slow tokenizer over a SentencePiece model, as Python code in the checkpoint: what openPangu's is.
PANGU_CLASS = """
import sentencepiece
from transformers import PreTrainedTokenizer


class TinyPanguTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **options):
        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**options)

    @property
    def vocab_size(self):
        return self.pieces.get_piece_size()

    def get_vocab(self):
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(self, ids, pair=None):
        return [self.bos_token_id, *ids, *(pair or [])]
"""


@pytest.fixture(scope="module")
def pangu(tmp_path_factory):
    """A tokenizer folder whose class behaves as openPangu's does."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pangu")
    corpus = folder / "corpus.txt"
    corpus.write_text("What is 2 + 2?\nsystem user assistant\nthinking about numbers\nIt is 4.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        hard_vocab_limit=False,
        byte_fallback=False,
        add_dummy_prefix=False,
        user_defined_symbols=[f"[unused{i}]" for i in (9, 10, 16, 17)] + ["\n", ":", "/", "_"],
        minloglevel=2,
    )
    (folder / "tokenization_tiny.py").write_text(PANGU_CLASS)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyPanguTokenizer", None]},
                "tokenizer_class": "TinyPanguTokenizer",
                "bos_token": "<s>",
                "eos_token": "[unused10]",
                "unk_token": "<unk>",
                "chat_template": PANGU_TEMPLATE,
            }
        )
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded"}))
    return folder


@pytest.fixture
def pangu_tokenizer(pangu, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_tokenizer(pangu, trust_remote_code=True)


def test_openpangu_is_rendered_then_tokenised_with_its_bos(pangu_tokenizer):
    """As the authors' own script does: tokenizer(rendered text), which begins with <s>."""
    text = pangu_tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    ids = render_chat(pangu_tokenizer, USER)
    assert ids == pangu_tokenizer(text)["input_ids"]
    assert ids[0] == pangu_tokenizer.bos_token_id
    assert ids.count(pangu_tokenizer.bos_token_id) == 1
    assert pangu_tokenizer.decode(ids[1:]).endswith("[unused9]assistant:")


@pytest.mark.parametrize(
    ("think", "end"), [(None, "2?"), ("slow", "2?"), ("fast", "2? /no_think"), ("auto", "2? /auto_think")]
)
def test_openpangu_is_switched_at_the_end_of_the_last_user_turn(pangu_tokenizer, think, end):
    turns = [*USER, {"role": "assistant", "content": "4"}, *USER]
    text = pangu_tokenizer.decode(render_chat(pangu_tokenizer, turns, think=think))
    assert text.endswith(f"{end}[unused10][unused9]assistant:")
    assert text.count("think") == (0 if think in (None, "slow") else 1)
    assert turns[-1] == USER[0]  # the caller's messages stay as they were


def test_a_system_prompt_replaces_the_empty_one(pangu_tokenizer):
    text = pangu_tokenizer.decode(render_chat(pangu_tokenizer, [{"role": "system", "content": "It is 4."}, *USER]))
    assert text.count("[unused9]system:") == 1
    assert "[unused9]system:It is 4.[unused10]" in text


def test_openpangu_s_reasoning_and_answer_survive_decoding(pangu_tokenizer):
    markers = think_markers(pangu_tokenizer)
    assert markers == OPENPANGU
    ids = pangu_tokenizer.encode("[unused16] thinking [unused17] It is 4.", add_special_tokens=False)
    text = pangu_tokenizer.decode([*ids, pangu_tokenizer.eos_token_id], skip_special_tokens=True)
    splitter = splitter_for(pangu_tokenizer, render_chat(pangu_tokenizer, USER))
    assert splitter.push(text) + splitter.finish() == [("reasoning", "thinking"), ("content", "It is 4.")]


def test_python_code_in_a_checkpoint_is_not_run_unasked(pangu):
    with pytest.raises(QuasarError, match="read it, then give --trust-remote-code"):
        load_tokenizer(pangu)


def test_templates_without_a_bos_stay_as_they_are():
    tokenizer = load_tokenizer(ASSETS / "tiny-qwen3")
    expected = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert render_chat(tokenizer, USER) == list(expected)


class Words:
    """As much of a tokenizer as a template needs: a token is a word."""

    name_or_path, bos_token_id, unk_token_id = "words", 1, None

    def __init__(self, template, bos=(), render=None, vocabulary=("<s>", "<think>", "</think>")):
        self.chat_template, self.bos, self.render = template, list(bos), render
        self.ids = {word: i + 1 for i, word in enumerate(vocabulary)}

    def apply_chat_template(self, messages, **options):
        self.asked = options
        return self.render(messages, **options)

    def encode(self, text, add_special_tokens=True):
        ids = [self.ids.setdefault(word, len(self.ids) + 1) for word in text.split()]
        return (self.bos if add_special_tokens else []) + ids

    def convert_tokens_to_ids(self, token):
        return self.ids.get(token)

    def decode(self, ids, skip_special_tokens=False):
        words = {i: word for word, i in self.ids.items()}
        return " ".join(words[i] for i in ids)


def test_a_template_that_brings_its_bos_gets_no_second_one():
    tokenizer = Words("{{ bos }}", bos=[1], render=lambda messages, **_: "<s> hello")
    assert render_chat(tokenizer, USER) == tokenizer.encode("hello")


def test_a_tokenizer_that_adds_none_gets_none():
    tokenizer = Words("{{ messages }}", render=lambda messages, **_: "hello")
    assert render_chat(tokenizer, USER) == tokenizer.encode("hello", add_special_tokens=False)


def test_qwen3_is_switched_in_its_template():
    tokenizer = Words("{% if enable_thinking %}", render=lambda messages, **options: str(options["enable_thinking"]))
    assert tokenizer.decode(render_chat(tokenizer, USER, think="fast")) == "False"
    assert tokenizer.decode(render_chat(tokenizer, USER, think="slow")) == "True"
    with pytest.raises(QuasarError, match="--think auto: this model does not choose by itself; use slow or fast"):
        render_chat(tokenizer, USER, think="auto")
    assert think_markers(tokenizer) == QWEN3


def test_a_template_gets_what_the_caller_gives_it():
    tokenizer = Words("{{ tools }}", render=lambda messages, **_: "hello")
    render_chat(tokenizer, USER, tools=[{"name": "f"}], add_generation_prompt=False)
    assert tokenizer.asked == {"tools": [{"name": "f"}], "add_generation_prompt": False, "tokenize": False}


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "words has no chat template; leave out --chat"),
        ("{{ messages }}", {"think": "fast"}, "--think fast: this model's chat template cannot be switched"),
        ("{{ messages }}", {"think": "hard"}, "--think hard is unknown; use one of slow, fast, auto"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(template, options, message):
    with pytest.raises(QuasarError, match=message):
        render_chat(Words(template, render=lambda messages, **_: ""), USER, **options)


def test_a_template_that_refuses_is_one_line():
    def refuse(messages, **_):
        raise ValueError("roles must alternate\nand more")

    with pytest.raises(QuasarError, match=r"template refuses these messages: roles must alternate$"):
        render_chat(Words("x", render=refuse), USER)


# --- the splitter -------------------------------------------------------------------------------------------


def split(text, cuts=(), markers=QWEN3, inside=False):
    splitter, kinds = ReasoningSplitter(markers, inside), {"reasoning": "", "content": ""}
    ends = [*sorted(cuts), len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        for kind, piece in splitter.push(text[start:end]):
            assert piece
            kinds[kind] += piece
    for kind, piece in splitter.finish():
        kinds[kind] += piece
    return kinds["reasoning"], kinds["content"]


CASES = {
    "<think>\nso\nso\n</think>\n\nfour\n": ("so\nso", "four\n"),
    " \n<think>so</think>four": ("so", "four"),
    "<think></think>four": ("", "four"),
    "<think>\n\n</think>\n\nfour": ("", "four"),
    "four": ("", "four"),
    "  four </think>": ("", "  four </think>"),
    "<think>so": ("so", ""),
    "<think>so < then </thin": ("so < then </thin", ""),
    "<thin": ("", "<thin"),
    "four <think> is a marker </think>": ("", "four <think> is a marker </think>"),
    "<think>so</think>four, said <think>": ("so", "four, said <think>"),
    "": ("", ""),
}


@given(st.sampled_from(sorted(CASES)), st.sets(st.integers(0, 40), max_size=12))
def test_pieces_are_split_wherever_they_are_cut(text, cuts):
    assert split(text, [cut for cut in cuts if cut < len(text)]) == CASES[text]


def test_text_that_begins_inside_the_reasoning():
    assert split("so</think>\nfour", inside=True) == ("so", "four")


def test_openpangu_s_markers():
    text = "[unused16]so[unused17]four"
    assert split(text, range(len(text)), OPENPANGU) == ("so", "four")


def test_without_markers_all_is_content():
    splitter = ReasoningSplitter(None)
    assert splitter.push("<think>") == [("content", "<think>")]
    assert splitter.push("") == splitter.finish() == []
    assert splitter_for(None).push("a") == [("content", "a")]


def test_reasoning_comes_as_soon_as_it_is_certain():
    splitter = ReasoningSplitter(QWEN3)
    assert splitter.push("<think>\n") == []
    assert splitter.push("so ") == [("reasoning", "so")]
    assert splitter.push("far") == [("reasoning", " far")]
    assert splitter.push("</think>\n") == []
    assert splitter.push("four") == [("content", "four")]


def test_a_prompt_that_ends_in_the_open_marker_begins_inside():
    tokenizer = Words("<think>", vocabulary=("<s>", "<think>", "</think>", "hello"))
    assert splitter_for(tokenizer, tokenizer.encode("hello <think>")).push("so") == [("reasoning", "so")]
    assert splitter_for(tokenizer, tokenizer.encode("<think> </think>")).push("so") == [("content", "so")]


def test_the_command_splits_what_a_model_says(capsys):
    from quasar.cli import generate

    generate.stream(iter(["<think>so", "</think>", "four"]), ReasoningSplitter(QWEN3))
    out, err = capsys.readouterr()
    assert (out, err) == ("four", "so")
    text = generate.answer_of("<think>so</think>four", ReasoningSplitter(QWEN3))
    assert text == {"text": "four", "reasoning": "so"}


def test_flags_of_a_chat_need_one(capsys):
    from quasar.cli import main

    assert main(["generate", "hello", "--think", "fast", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "quasar generate: --think goes with --chat\n"
