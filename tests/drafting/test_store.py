"""The corpus in memory and on disk: bounded, crash-safe, refused where it is not this tokenizer's or not ours."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quasar.drafting.corpus import Corpus
from quasar.drafting.hybrid import HybridDrafter
from quasar.drafting.memory import DraftMemory
from quasar.drafting.store import CorpusStore
from quasar.errors import QuasarError

SEQUENCES = [list(range(10, 60)), list(range(30, 90)), [5, 6, 7] * 20]


def held(corpus: Corpus) -> list[int]:
    corpus.work()
    return [token for token in corpus.successors.tokens if token >= 0]


def test_finished_sequences_are_taken_in_little_by_little():
    corpus = Corpus()
    for sequence in SEQUENCES:
        corpus.add(sequence)
    corpus.work(7)
    assert corpus.successors.tokens == SEQUENCES[0][:7]
    corpus.work(60)
    assert [t for t in corpus.successors.tokens if t >= 0] == (SEQUENCES[0] + SEQUENCES[1])[:67]
    assert held(corpus) == [*SEQUENCES[0], *SEQUENCES[1], *SEQUENCES[2]]


def test_a_corpus_keeps_the_latest_half_at_least_and_no_more_than_it_may():
    corpus, everything = Corpus(1000), []
    for n in range(200):
        sequence = [n, *range(n, n + 30)]
        everything += sequence
        corpus.add(sequence)
        tokens = held(corpus)
        assert everything[-len(tokens) :] == tokens
        assert len(tokens) >= min(400, len(everything)) and len(tokens) < 1100


def test_a_follower_survives_the_change_of_index():
    corpus = Corpus(200)
    follower = corpus.follower()
    for n in range(30):
        corpus.add([*range(40)])
        follower.extend([n % 40, (n + 1) % 40])
        corpus.work()
    follower.extend([3, 4])
    assert follower.successors is corpus.successors
    assert 5 in follower.context().nodes[2][1]


def test_an_earlier_request_is_drafted_from():
    memory = DraftMemory(Corpus())
    memory.corpus.add([*range(100, 180)])
    memory.settle()
    drafter = HybridDrafter(memory)
    drafter.extend([7, 8, 120, 121, 122])
    draft = drafter.propose(7)
    assert draft.tokens[0] == 123 and draft.keys[0].source == "corpus"
    assert 124 in draft.tokens and draft.parents[draft.tokens.index(124)] == 0


def test_the_store_is_read_by_the_next_process(tmp_path):
    with CorpusStore(tmp_path / "store", "a", 100) as store:
        for sequence in SEQUENCES:
            store.add(sequence)
    with CorpusStore(tmp_path / "store", "a", 100) as store:
        assert held(store) == [*SEQUENCES[0], *SEQUENCES[1], *SEQUENCES[2]]


def test_another_tokenizers_store_is_refused(tmp_path):
    CorpusStore(tmp_path, "a", 100).close()
    with pytest.raises(QuasarError, match="another tokenizer"):
        CorpusStore(tmp_path, "b", 100)


def test_a_store_in_use_is_refused(tmp_path):
    with CorpusStore(tmp_path, "a", 100), pytest.raises(QuasarError, match="in use by another process"):
        CorpusStore(tmp_path, "a", 100)
    CorpusStore(tmp_path, "a", 100).close()


def test_a_process_that_dies_lets_the_store_go(tmp_path):
    code = (
        "import os, sys; from quasar.drafting.store import CorpusStore; "
        f"s = CorpusStore({str(tmp_path)!r}, 'a', 100); s.add([1, 2, 3]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with CorpusStore(tmp_path, "a", 100) as store:
        assert held(store) == [1, 2, 3]


@pytest.mark.parametrize("kept", [1, 5, 8, 9, 20])
def test_a_torn_last_record_is_cut_off(tmp_path, kept):
    with CorpusStore(tmp_path, "a", 100) as store:
        store.add(SEQUENCES[0])
        whole = (tmp_path / "tokens.bin").stat().st_size
        store.add(SEQUENCES[1])
    content = (tmp_path / "tokens.bin").read_bytes()
    (tmp_path / "tokens.bin").write_bytes(content[: whole + kept])
    with CorpusStore(tmp_path, "a", 100) as store:
        assert held(store) == SEQUENCES[0]
        store.add(SEQUENCES[2])
    with CorpusStore(tmp_path, "a", 100) as store:
        assert held(store) == SEQUENCES[0] + SEQUENCES[2]


@pytest.mark.parametrize("at", [0, 4, 8, 30])
def test_damage_inside_is_one_line(tmp_path, at):
    with CorpusStore(tmp_path, "a", 100) as store:
        for sequence in SEQUENCES:
            store.add(sequence)
    content = bytearray((tmp_path / "tokens.bin").read_bytes())
    content[at + 2] ^= 255
    (tmp_path / "tokens.bin").write_bytes(content)
    with pytest.raises(QuasarError, match=r"tokens\.bin is corrupt at byte 0") as error:
        CorpusStore(tmp_path, "a", 100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("about", ["", "[]", "{}", '{"format": 1}', "\0"])
def test_a_damaged_description_is_one_line(tmp_path, about):
    CorpusStore(tmp_path, "a", 100).close()
    (tmp_path / "store.json").write_text(about)
    with pytest.raises(QuasarError, match=r"store\.json is corrupt"):
        CorpusStore(tmp_path, "a", 100)


def test_a_newer_format_is_refused(tmp_path):
    CorpusStore(tmp_path, "a", 100).close()
    (tmp_path / "store.json").write_text('{"format": 2, "tokenizer": "a"}')
    with pytest.raises(QuasarError, match="has format 2; this version reads 1"):
        CorpusStore(tmp_path, "a", 100)


def test_a_file_in_its_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuasarError, match="cannot be used"):
        CorpusStore(tmp_path / "file", "a", 100)


def test_the_file_stays_bounded(tmp_path):
    with CorpusStore(tmp_path, "a", 100, most_tokens=500) as store:
        for n in range(100):
            store.add([n % 50] * 20)
            assert (tmp_path / "tokens.bin").stat().st_size <= 1100 * 4 + 60 * 8
    with CorpusStore(tmp_path, "a", 100, most_tokens=500) as store:
        assert held(store)[-20:] == [99 % 50] * 20


def test_a_disk_that_fails_stops_the_writing_and_nothing_else(tmp_path, caplog):
    store = CorpusStore(tmp_path, "a", 100)

    class Full:
        def write(self, _: bytes) -> None:
            raise OSError("no space left on device")

        def close(self) -> None:
            pass

    store._file.close()
    store._file = Full()
    store.add([1, 2, 3])
    store.add([4, 5, 6])
    assert held(store) == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count("no space left") == 1
