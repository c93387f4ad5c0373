"""Replaying logs: acceptance as greedy verification would have it, and the formats that are read."""

from __future__ import annotations

import json

import pytest

from quasar.cli import main
from quasar.drafting.free import FREE_DRAFTS
from quasar.drafting.store import CorpusStore
from quasar.errors import QuasarError
from quasar.evaluation.replay import Logged, read_log, replay


def no_tokenizer():
    return None


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


LOOP = Logged([1, 2, 3], [4, 5, 6, 7] * 20)


def test_plain_decoding_takes_a_pass_for_each_token():
    assert replay("x", [LOOP], "none", 8, False).acceptance_length == 1.0
    assert replay("x", [LOOP], "hybrid", 1, False).acceptance_length == 1.0


def test_a_chain_is_accepted_as_published():
    """4 5 6 7 4 comes by five plain passes at least; from then on a window of 8 is right every time."""
    result = replay("x", [Logged([1], [4, 5, 6, 7] * 5)], "ngram", 8, False)
    # 5 6 7 4: one each; then 4 -> 5 6 7 4 5 6 7 and its own token: 8; then the last 7 tokens
    assert (result.tokens, result.passes) == (19, 4 + 2)


@pytest.mark.parametrize("draft", FREE_DRAFTS)
@pytest.mark.parametrize("warm", [False, True])
def test_every_drafter_counts_every_token_once(draft, warm):
    log = [LOOP, Logged([9, 9], [1, 2, 3, 4, 5, 1, 2, 3, 9]), Logged([], [5, 5])]
    result = replay("x", log, draft, 4, warm)
    assert result.tokens == 79 + 8 + 1
    assert 1.0 <= result.acceptance_length <= 4.0
    assert sum(result.accepted_by_source.values()) + result.passes >= result.tokens


def test_warm_requests_learn_from_earlier_ones():
    text = [(n * n * 7919) % 1000 for n in range(150)]
    log = [Logged([1], text), Logged([2], text)]
    cold, warm = (replay("x", log, "hybrid", 8, warm).acceptance_length for warm in (False, True))
    assert warm > 1.5 * cold


def test_runners_up_in_a_log_are_recycled():
    answer = [1, 2, 3, 1, 4, 3, 1, 2, 5, 1, 4] * 4
    top = [[(token, 0.6), (token + 10, 0.3), (token + 20, 0.1)] for token in answer]
    result = replay("x", [Logged([1], answer, top)], "recycling", 8, False)
    assert result.acceptance_length > 1.0 and "recycled" in result.accepted_by_source


def test_formats(tmp_path):
    trace = write(tmp_path / "a.jsonl", {"prompt": [1], "answer": [2, 3], "task": "x"}, {"answer": [4, 5, 6]})
    assert read_log(trace, no_tokenizer) == [Logged([1], [2, 3]), Logged([], [4, 5, 6])]

    class Words:
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return [0] * add_special_tokens + [len(word) for word in text.split()]

    text = write(tmp_path / "b.jsonl", {"prompt": "a bb", "answer": "ccc dddd"})
    assert read_log(text, Words) == [Logged([0, 1, 2], [3, 4])]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh well"}]
    assert read_log(write(tmp_path / "c.jsonl", {"messages": chat}), Words) == [Logged([0, 5, 2, 10], [2, 4])]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answered = {"messages": parts, "response": {"choices": [{"message": chat[1]}]}}
    assert read_log(write(tmp_path / "d.jsonl", answered), Words) == [Logged([0, 5, 2, 10], [2, 4])]
    (tmp_path / "e.txt").write_text("one two three")
    assert read_log(str(tmp_path / "e.txt"), Words) == [Logged([0], [3, 3, 5])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:1: is not JSON"),
        ("[1]", r"a\.jsonl:1: should be a trace"),
        ('{"prompt": [1], "answer": [-1, 2]}', r"a\.jsonl:1: should be a trace"),
        ('{"prompt": [1], "answer": [1.5, 2]}', r"a\.jsonl:1: should be a trace"),
        ('{"prompt": [1], "answer": [1, 2], "top": [[1]]}', r'"top" should be a list of token ids for each of the 2'),
        ('{"answer": [1, 2], "top": [[1], [2]], "shares": [[1], []]}', '"shares" should be a number for each token'),
        ('{"prompt": "a", "answer": "b c"}', "there is no tokenizer"),
        ('{"messages": [3]}', "a message should be"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "holds no answer"),
        ('{"answer": [1]}', "holds no answer of two tokens"),
        ("", "holds no answer"),
    ],
)
def test_anything_else_is_one_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(QuasarError, match=message) as error:
        read_log(str(tmp_path / "a.jsonl"), no_tokenizer)
    assert "\n" not in str(error.value)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    files = [
        write(tmp_path / f"{name}.jsonl", {"prompt": [1], "answer": [4, 5, 6] * length})
        for name, length in (("a", 20), ("b", 30))
    ]
    argv = ["eval", "replay", *files, "--draft", "ngram,hybrid", "--rows", "4,8", "--warm"]
    assert main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "| all together | 8 |" in shown and "| a | 4 |" in shown
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["results"]) == 2 * 2 * 2
    for result in written["results"]:
        assert {"file", "draft", "rows", "warm", "acceptance_length"} <= result.keys()
        assert result["warm"] is True and 1 < result["acceptance_length"] <= result["rows"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--draft", "self:w4a4"], "needs a model"),
        (["--draft", "best"], "drafters without one are"),
        (["--rows", "0"], "numbers of rows from 1 to 256"),
        (["--rows", "x"], "numbers of rows from 1 to 256"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, argv, message):
    file = write(tmp_path / "a.jsonl", {"prompt": [1], "answer": [4, 5, 6]})
    try:
        code = main(["eval", "replay", file, *argv])
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr().err
    assert code == 2 and message in shown and shown.count("\n") == 1


def test_a_file_that_is_not_there_is_one_line(capsys):
    assert main(["eval", "replay", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err


def test_a_corpus_is_built_from_files(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"prompt": [1], "answer": [4, 5, 6] * 5})
    argv = ["corpus", "build", file, "--draft-store", str(tmp_path / "store"), "--model", "tiny-qwen3"]
    assert main(argv) == 0
    assert "16 tokens of 1 file added" in capsys.readouterr().out
    CorpusStore(tmp_path / "other", "another's", 160).close()
    assert main([*argv[:4], str(tmp_path / "other"), *argv[5:]]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    high = write(tmp_path / "b.jsonl", {"prompt": [1], "answer": [4, 10**6]})
    assert main(["corpus", "build", high, *argv[3:]]) == 2
    assert "token 1000000 is not one of" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [{"response": "x"}, {"choices": 5}, {"choices": [{"message": {"role": "tool"}}]}])
def test_odd_fields_beside_messages_are_left_out(tmp_path, odd):
    messages = [{"role": "user", "content": [{"text": 5}]}, {"role": "assistant", "content": "ab c"}]
    path = write(tmp_path / "a.jsonl", {"messages": messages} | odd)

    class Letters:
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

    (logged,) = read_log(path, Letters)
    assert logged.answer == list(b"ab c")
