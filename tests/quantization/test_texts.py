"""JSONL of texts: the shapes people have, and the faults."""

import pytest

from quasar import QuasarError, load
from quasar.quantization import texts
from quasar.quantization.calibration import read_texts


def test_every_field_that_carries_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"text": "b"}\n{"turns": ["c", "d"]}\n{"inputs_pretokenized": "é"}\n', encoding="utf-8"
    )
    assert read_texts(path) == ["a", "b", "c\nd", "é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no texts"),
        (b"\n\n", "holds no texts"),
        (b'{"prompt": "a"}\n{oops\n', r":2: not JSON"),
        (b'{"question": "a"}\n', r":1: no text; a row needs"),
        (b'{"prompt": ""}\n', r":1: no text"),
        (b'{"turns": [1]}\n', r":1: no text"),
        (b"[]\n", r":1: no text"),
        (b"\xff\xfe\n", "cannot be read as text"),
    ],
)
def test_faults_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(QuasarError, match=message):
        read_texts(path)


def test_missing_file(tmp_path):
    with pytest.raises(QuasarError, match=r"nowhere\.jsonl: no such file"):
        read_texts(tmp_path / "nowhere.jsonl")


def test_no_more_conversations_are_put_into_a_template_than_are_used(monkeypatch):
    """A template may make a million tokens of each: a checkpoint's fuzzed one took ten seconds here."""
    model = load("tiny-qwen3", device="reference")
    rendered = []

    def render(tokenizer, messages, **settings):
        rendered.append(messages)
        return [1] * 5000

    monkeypatch.setattr(texts, "render_chat", render)
    calibration, heldout = texts.calibration_and_heldout(model.config, model.tokenizer)
    assert texts.CALIBRATION_TOKENS <= sum(map(len, calibration)) < texts.CALIBRATION_TOKENS + texts.TEXT_TOKENS
    assert sum(len(ids) - 1 for ids in heldout) == 4096
    assert len(rendered) < 20
