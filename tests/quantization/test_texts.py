"""JSONL of texts: the shapes people have, and the faults."""

import pytest

from quasar import QuasarError
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
