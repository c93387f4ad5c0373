"""The proof that speculation changes nothing, and the edges of the loop."""

import itertools
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quasar import Engine, GenerationSettings, QuasarError, generate
from quasar.drafting.survival import SurvivalTable
from quasar.loading import PRECISIONS
from quasar.speculation.choice import TokenChooser
from quasar.speculation.draft import Draft, Drafter
from quasar.speculation.verifier import Verifier
from tests.conftest import FAMILIES

NEW = 24
PROMPTS = 40  # for each of 2 families x 2 precisions x 9 windows: 1440 generations against 160 plain ones


@cache
def prompts(vocab: int) -> list[list[int]]:
    """Repetitive ones, where drafts come true, and random ones, where they do not."""
    rng = random.Random(0)
    made = []
    for i in range(PROMPTS):
        piece = [rng.randrange(vocab) for _ in range(rng.randint(1, 12))]
        made.append(piece * rng.randint(2, 4) if i % 2 else piece)
    return made


@cache
def plain_ids(shipped, family: str, precision: str) -> list[list[int]]:
    model = shipped(family, precision)
    return [
        generate(model, ids, max_new_tokens=NEW, draft="none").result().token_ids
        for ids in prompts(model.config.vocab_size)
    ]


@pytest.mark.parametrize("gamma", [None, *range(1, 9)])
@pytest.mark.parametrize("precision", ["full", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_speculation_equals_plain_decoding(shipped, family, precision, gamma):
    model, accepted = shipped(family, precision), 0
    expected = plain_ids(shipped, family, precision)
    for ids, plain in zip(prompts(model.config.vocab_size), expected, strict=True):
        result = generate(model, ids, max_new_tokens=NEW, draft="ngram", gamma=gamma).result()
        assert result.token_ids == plain
        accepted += result.stats.accepted
    assert accepted > 0  # or the comparison would have compared plain decoding with itself


class Scripted(Drafter):
    """Drafts whatever a test wants: `script` maps the committed tokens and a length to candidates."""

    def __init__(self, script):
        self.script = script
        self.committed = []
        self.survival = SurvivalTable(lambda *key: 0.5)

    def extend(self, tokens):
        self.committed += tokens

    def propose(self, most, pending=(), least=0.0):
        tokens = self.script(self.committed, most)[:most]
        return Draft.chain(tokens, *self.survival.chain("script", 0, len(tokens)))

    def observe(self, draft, verified, own, top=None):
        self.survival.learn(draft.outcomes(verified, own))


def scripted(script):
    """For settings.draft."""
    return lambda target: Scripted(script)


PROMPT = [5, 9, 30, 5, 9]


def oracle_script(prompt, ids, flip):
    """Drafts the true continuation, but wrong at output positions in `flip`."""

    def script(committed, gamma):
        done = len(committed) - len(prompt)
        return [token + 1 if done + i in flip else token for i, token in enumerate(ids[done : done + gamma])]

    return script


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), gamma=st.integers(1, 8), family=st.sampled_from(FAMILIES), temperature=st.sampled_from([0.0, 0.9])
)
def test_any_pattern_of_accepting_and_rejecting(shipped, data, gamma, family, temperature):
    """Full windows, empty drafts, and every rejection in between leave the same text, greedy and sampled."""
    model = shipped(family, "w8a8")
    settings_ = GenerationSettings(max_new_tokens=20, draft="none", temperature=temperature, seed=5, ignore_eos=True)
    plain = generate(model, PROMPT, settings_).result().token_ids
    flips = data.draw(st.sets(st.integers(0, 20)))
    drafter = scripted(oracle_script(PROMPT, plain, flips))
    result = generate(model, PROMPT, replace(settings_, draft=drafter, gamma=gamma)).result()
    assert result.token_ids == plain
    assert result.stats.accepted + result.stats.passes + 1 == len(plain)


def test_every_draft_right_commits_whole_windows(shipped):
    model = shipped("qwen3", "w8a8")
    plain = generate(model, PROMPT, max_new_tokens=25, draft="none", ignore_eos=True).result()
    assert (plain.stats.passes, plain.stats.acceptance_length) == (24, 1.0)
    drafter = scripted(oracle_script(PROMPT, plain.token_ids, ()))
    stats = generate(model, PROMPT, max_new_tokens=25, draft=drafter, gamma=5, ignore_eos=True).result().stats
    assert (stats.passes, stats.drafted, stats.accepted, stats.acceptance_length) == (4, 20, 20, 6.0)


def test_drafts_that_always_fail_cost_almost_no_rows(shipped, monkeypatch):
    """Never slower than plain decoding: the window closes, after which a pass is a plain step. A row costs a tenth."""
    monkeypatch.setattr(Engine, "_seconds", lambda self, rows: 1 + 0.1 * (rows - 1))
    model = shipped("qwen3", "w8a8")
    plain = generate(model, PROMPT, max_new_tokens=150, draft="none", ignore_eos=True).result().token_ids
    drafter = scripted(oracle_script(PROMPT, plain, range(1000)))
    rows = []
    step = Verifier.step

    def counting(self, windows):
        rows.extend(len(w.uncached_tokens) + len(w.draft) for w in windows)
        return step(self, windows)

    monkeypatch.setattr(Verifier, "step", counting)
    result = generate(model, PROMPT, max_new_tokens=150, draft=drafter, ignore_eos=True).result()
    assert result.token_ids == plain
    assert sum(rows[1:]) < 1.5 * 149  # the first are the prompt's
    assert set(rows[-100:]) == {1}


@pytest.mark.parametrize("at", range(1, 6))
def test_a_stop_id_inside_an_accepted_window(shipped, at):
    """As the first to fifth of five drafted tokens, all of them right."""
    model = shipped("qwen3", "w8a8")
    plain = generate(model, PROMPT, max_new_tokens=12, draft="none", ignore_eos=True).result().token_ids
    stop = next(t for t in range(model.config.vocab_size) if t not in plain)
    changed = [*plain[:at], stop, *plain[at + 1 :]]

    def say(self, token):  # the changed text, whatever the model would
        self.index += 1
        return changed[self.index - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenChooser, "takes_argmax", False)
        patch.setattr(TokenChooser, "choose", say)
        drafter = scripted(oracle_script(PROMPT, changed, ()))
        stopping = replace(model, stop_ids=frozenset({stop}))
        for draft, gamma in (("none", None), (drafter, 5)):
            result = generate(stopping, PROMPT, max_new_tokens=12, draft=draft, gamma=gamma).result()
            assert result.token_ids == changed[: at + 1]
            assert result.finish_reason == "stop"
            assert result.stats.tokens == at + 1
        ignoring = generate(stopping, PROMPT, max_new_tokens=12, draft=drafter, gamma=5, ignore_eos=True).result()
        assert ignoring.token_ids == changed


def test_a_stop_string_inside_an_accepted_window(shipped):
    model = shipped("qwen3", "w8a8")
    whole = generate(model, "def main():\n", max_new_tokens=40, draft="none", ignore_eos=True).result()
    drafter = scripted(oracle_script(model.encode("def main():\n"), whole.token_ids, ()))
    stop = whole.text[17:20]
    results = [
        generate(model, "def main():\n", max_new_tokens=40, draft=draft, gamma=gamma, stop=(stop,), ignore_eos=True)
        for draft, gamma in (("none", None), (drafter, 5))
    ]
    pieces = ["".join(result) for result in results]
    assert pieces[0] == pieces[1] == results[0].result().text == results[1].result().text
    assert pieces[0] == whole.text[: whole.text.find(stop)]
    assert results[0].result().token_ids == results[1].result().token_ids
    assert results[1].result().finish_reason == "stop"


@pytest.mark.parametrize("room", range(1, 9))
def test_the_context_limit_inside_a_window(shipped, room):
    """A prompt that leaves `room` positions gives exactly that many tokens, all drafts right."""
    model = shipped("qwen3", "w8a8")
    ids = (PROMPT * 500)[: model.config.max_position_embeddings - room]
    plain = generate(model, ids, max_new_tokens=100, draft="none", ignore_eos=True).result()
    assert (len(plain.token_ids), plain.finish_reason) == (room, "length")
    drafter = scripted(oracle_script(ids, plain.token_ids, ()))
    result = generate(model, ids, max_new_tokens=100, draft=drafter, gamma=5, ignore_eos=True).result()
    assert result.token_ids == plain.token_ids


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_max_new_tokens_inside_a_window(shipped, count):
    model = shipped("openpangu", "w8a8")
    plain = generate(model, PROMPT, max_new_tokens=count, draft="none", ignore_eos=True).result().token_ids
    assert len(plain) == count
    drafter = scripted(lambda committed, gamma: [1] * gamma)
    assert (
        generate(model, PROMPT, max_new_tokens=count, draft=drafter, gamma=5, ignore_eos=True).result().token_ids
        == plain
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_depends_on_the_seed_alone(shipped, family, precision):
    model = shipped(family, precision)
    options = {"max_new_tokens": 40, "temperature": 1.0, "top_k": 40, "top_p": 0.95, "ignore_eos": True}
    texts = {
        (seed, draft): generate(model, PROMPT, seed=seed, draft=draft, **options).result().token_ids
        for seed, draft in itertools.product((1, 2, 3), ("none", "ngram"))
    }
    for seed in (1, 2, 3):
        assert texts[seed, "none"] == texts[seed, "ngram"]
    assert texts[1, "none"] != texts[2, "none"] != texts[3, "none"]


def test_first_sampled_token_follows_the_model(shipped):
    """End to end: frequencies of the first token against the softmax of the model's own logits."""
    model = shipped("qwen3")
    logits = model.runtime.decoder.read(PROMPT, logits_to_keep=1)[0].double()
    top = logits.topk(5).indices
    probs = (logits[top]).softmax(0)
    counts = torch.zeros(5)
    for seed in range(400):
        token = generate(model, PROMPT, max_new_tokens=1, temperature=1.0, top_k=5, seed=seed).result().token_ids[0]
        counts[top.tolist().index(token)] += 1
    statistic = ((counts - 400 * probs) ** 2 / (400 * probs)).sum()
    assert statistic < 18.47  # 99.9 % point of chi-square, 4 degrees of freedom


def test_pieces_are_the_text(shipped):
    generation = generate(shipped("qwen3", "w8a8"), "import os\n", max_new_tokens=30)
    pieces = list(generation)
    result = generation.result()
    assert len(pieces) > 1
    assert "".join(pieces) == result.text
    assert result.prompt_tokens == len(shipped("qwen3").encode("import os\n"))
    assert result.stats.weight_bytes_per_pass > 1e6
    assert result.stats.seconds_decode > 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([0] * 5000, "the prompt has 5000 tokens"),
        ([3, -1], "token id -1 is outside"),
        ([10**6], "token id 1000000 is outside"),
    ],
)
def test_prompts_that_cannot_be_continued(shipped, prompt, message):
    with pytest.raises(QuasarError, match=message):
        generate(shipped("qwen3"), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"gamma": 0}, "gamma is 0"),
        ({"gamma": 33}, "gamma is 33"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p is 2.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_settings_out_of_range(shipped, options, message):
    with pytest.raises(QuasarError, match=message):
        generate(shipped("qwen3"), PROMPT, **options)


def test_unknown_drafter(shipped):
    with pytest.raises(QuasarError, match="--draft magic is unknown; use one of none, ngram"):
        generate(shipped("qwen3"), PROMPT, draft="magic").result()
