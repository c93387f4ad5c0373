"""The verifier on a model that is a table: what follows a token depends on that token alone, so an oracle is a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quasar.backends.base import Batch
from quasar.speculation.choice import Rules, TokenChooser
from quasar.speculation.draft import Draft
from quasar.speculation.sampling import Sampling, gumbel, noise_state, own_token
from quasar.speculation.verifier import UNKNOWN, Verifier, Window, logprobs_of
from tests.helpers.trees import trees

VOCAB = 5
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))  # [token, what follows]


class Device:
    """A backend that counts what it is asked for."""

    def __init__(self, cheap_top_k: bool = False, samples: bool = False) -> None:
        self.cheap_top_k, self.samples = cheap_top_k, samples
        self.asked: list[str] = []

    def argmax(self, logits: Tensor) -> Tensor:
        self.asked.append("argmax")
        return logits.argmax(dim=-1)

    def top_k(self, logits: Tensor, k: int) -> Tensor:
        self.asked.append(f"top {k}")
        return logits.topk(k, dim=-1).indices

    def gumbel_argmax(self, logits: Tensor, states: list[int], temperatures: list[float]) -> list[int] | None:
        self.asked.append("sample")
        if not self.samples:
            return None
        assert len(states) == len(temperatures) == len(logits)
        return [_SAMPLED[state](row) if state else -7 for state, row in zip(states, logits, strict=True)]


_SAMPLED: dict[int, Any] = {}  # by the state of the noise: what the host would say


class Runtime:
    """Looks rows up in the table."""

    def __init__(self, device: Device) -> None:
        self.backend = device
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        rows = [i for segment in batch.segments for i in segment.ids[len(segment.ids) - segment.logits_to_keep :]]
        return TABLE[rows]


class Slot:
    """Remembers what it was told to keep."""

    kept: Any = None
    length, free = 0, 100

    def commit(self, rows: Any) -> None:
        self.kept = rows


def step(windows: list[Window], device: Device | None = None) -> tuple[list[Any], Runtime]:
    runtime = Runtime(device or Device())
    return Verifier(runtime).step(windows), runtime


def plainly(last: int, count: int, chooser: TokenChooser) -> list[int]:
    """What decoding token by token gives."""
    said = [last]
    for _ in range(count):
        said.append(chooser.choose(TABLE[said[-1]].clone()))
    return said[1:]


def draft_of(tree: tuple[list[int], list[int]]) -> Draft:
    return Draft(tree[0], tree[1], [0.5] * len(tree[0]), list(range(len(tree[0]))))


CHOOSERS = {
    "greedy": lambda: TokenChooser(),
    "sampled": lambda: TokenChooser(Sampling(temperature=0.7, seed=3)),
    "top-p": lambda: TokenChooser(Sampling(top_p=0.6, seed=4)),
    "rules": lambda: TokenChooser(None, Rules(presence_penalty=3.0)),
}


@pytest.mark.parametrize("cheap_top_k", [False, True])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*CHOOSERS, "prompt"]),
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3),
            trees(tokens=VOCAB),
            st.sampled_from([0, 0, 2, 3]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_many_windows_get_what_each_decodes_alone(cheap_top_k: bool, asked: list[Any]) -> None:
    windows, expected = [], []
    for kind, uncached, tree, top_k in asked:
        if kind == "prompt":
            windows.append(Window(Slot(), uncached, None))
            expected.append(None)
            continue
        draft = draft_of(tree)
        windows.append(Window(Slot(), uncached, CHOOSERS[kind](), draft, top_k))
        expected.append(plainly(uncached[-1], len(draft) + 1, CHOOSERS[kind]()))
    verdicts, runtime = step(windows, Device(cheap_top_k))
    for (kind, uncached, _, top_k), window, verdict, said in zip(asked, windows, verdicts, expected, strict=True):
        if said is None:
            assert window.slot.kept == len(uncached) and not verdict.tokens and verdict.top is None
            continue
        path = verdict.accepted
        assert verdict.tokens == said[: len(path) + 1]
        assert [window.draft.tokens[row] for row in path] == verdict.tokens[:-1]
        assert [window.draft.parents[row] for row in path] == [-1, *path][:-1]
        children = {window.draft.tokens[i] for i, p in enumerate(window.draft.parents) if p == [-1, *path][-1]}
        assert verdict.tokens[-1] not in children  # nothing more was right
        assert window.slot.kept == [*range(len(uncached)), *(len(uncached) + row for row in path)]
        assert window.chooser.index == len(verdict.tokens)
        rows = [uncached[-1], *window.draft.tokens]
        assert [verdict.own[row + 1] for row in [-1, *path]] == verdict.tokens
        if kind == "greedy":
            assert verdict.own == TABLE[rows].argmax(dim=-1).tolist()
        else:
            others = set(range(len(rows))) - {row + 1 for row in [-1, *path]}
            assert {verdict.own[row] for row in others} <= {UNKNOWN}
        assert (verdict.top is None) == (top_k == 0)
        for row, best in zip(rows, verdict.top or [], strict=False):
            values, tokens = TABLE[row].topk(top_k)
            assert [token for token, _ in best] == tokens.tolist()
            assert [share for _, share in best] == pytest.approx(values.softmax(dim=-1).tolist())
        assert verdict.top is None or len(verdict.top) == len(rows)
    for segment, (kind, uncached, tree, _) in zip(runtime.batches[0].segments, asked, strict=True):
        if kind == "prompt":
            assert (segment.ids, segment.logits_to_keep, segment.parents) == (uncached, 0, None)
            continue
        assert segment.ids == [*uncached, *tree[0]] and segment.logits_to_keep == len(tree[0]) + 1
        chain = tree[1] == list(range(-1, len(tree[1]) - 1))
        assert (segment.parents is None) == chain
        if not chain:
            paths = [segment.path(len(uncached) + row) for row in range(len(tree[0]))]
            assert all(path[: len(uncached)] == list(range(len(uncached))) for path in paths)
            assert [path[-2] - len(uncached) for path in paths] == tree[1]


def test_the_device_is_asked_for_what_is_needed_and_no_more() -> None:
    def asked(device: Device, *windows: Window) -> list[str]:
        step(list(windows), device)
        return device.asked

    greedy, sampled, ruled = (lambda kind=kind: CHOOSERS[kind]() for kind in ("greedy", "sampled", "rules"))
    assert asked(Device(), Window(Slot(), [1], None), Window(Slot(), [1], ruled())) == []
    assert asked(Device(), Window(Slot(), [1], greedy())) == ["argmax"]
    assert asked(Device(), Window(Slot(), [1], greedy(), top_k=2), Window(Slot(), [1], None)) == ["top 2", "argmax"]
    assert asked(Device(True), Window(Slot(), [1], greedy(), top_k=2), Window(Slot(), [2], greedy())) == ["top 2"]
    assert asked(Device(), Window(Slot(), [1], sampled()), Window(Slot(), [1], None)) == ["sample"]


@given(trees(tokens=VOCAB), st.integers(0, 3), st.integers(0, 4))
def test_a_device_that_samples_gets_the_noise_of_each_place(tree: Any, seed: int, earlier: int) -> None:
    """A candidate's place in the output is its depth, whatever its row."""
    sampling, draft = Sampling(temperature=0.5, seed=seed), draft_of(tree)
    for depth in range(len(draft) + 2):
        state = noise_state(seed, earlier + depth)
        _SAMPLED[state] = lambda row, index=earlier + depth: own_token(row, sampling, index)
    chooser, plain = TokenChooser(sampling), TokenChooser(sampling)
    chooser.index = plain.index = earlier
    others = [Window(Slot(), [2, 3], None), Window(Slot(), [1], CHOOSERS["greedy"](), Draft.chain([0], [0.5], [0]))]
    verdicts, _ = step([others[0], Window(Slot(), [4], chooser, draft), others[1]], Device(samples=True))
    assert verdicts[1].tokens == plainly(4, len(verdicts[1].tokens), plain)
    assert verdicts[2].tokens == plainly(1, len(verdicts[2].tokens), CHOOSERS["greedy"]())
    assert UNKNOWN not in verdicts[1].own and -7 not in verdicts[1].own


def test_temperatures_of_a_device_that_samples() -> None:
    seen: list[list[float]] = []

    class Listening(Device):
        def gumbel_argmax(self, logits: Tensor, states: list[int], temperatures: list[float]) -> list[int] | None:
            seen.append(temperatures)
            return None

    two = Draft.chain([0, 1], [0.5, 0.5], [0, 1])
    sampled = TokenChooser(Sampling(temperature=0.3))
    windows = [Window(Slot(), [1], CHOOSERS["greedy"](), two), Window(Slot(), [1], sampled, two)]
    verdicts, _ = step(windows, Listening())
    assert seen == [[1.0] * 3 + [0.3] * 3]
    assert verdicts[1].tokens == plainly(1, len(verdicts[1].tokens), TokenChooser(Sampling(temperature=0.3)))


def test_log_probabilities_of_committed_tokens() -> None:
    said = plainly(1, 3, TokenChooser())
    draft = Draft.chain([said[0], said[1], (said[2] + 1) % VOCAB], [0.5] * 3, [0, 1, 2])
    verdicts, _ = step([Window(Slot(), [1], TokenChooser(), draft, logprobs=2), Window(Slot(), [1], TokenChooser())])
    assert verdicts[0].tokens == said and verdicts[1].logprobs is None
    for last, token, (own, best) in zip([1, *said], said, verdicts[0].logprobs, strict=False):
        expected = TABLE[last].log_softmax(dim=-1)
        assert own == pytest.approx(float(expected[token]))
        assert [token for token, _ in best] == expected.topk(2).indices.tolist()
        assert [value for _, value in best] == pytest.approx(expected.topk(2).values.tolist())
    assert logprobs_of(TABLE[0].bfloat16(), 1, 0)[1] == []


def test_noise_is_what_sampling_says() -> None:
    """The table's own check: without filters the sampled token is the argmax of scaled logits plus noise."""
    sampling = Sampling(temperature=0.7, seed=9)
    noise = torch.tensor(gumbel(9, 2, torch.arange(VOCAB).numpy()))
    assert own_token(TABLE[3], sampling, 2) == int((TABLE[3].double() / 0.7 + noise).argmax())
