"""What a pass spends its time on, and what memory a process takes; the figures themselves are not tested."""

from __future__ import annotations

import pytest

from quasar import load
from quasar.backends.cpu import kernels
from quasar.errors import QuasarError
from quasar.evaluation import footprint, peers
from quasar.evaluation.profile import profile_pass


@pytest.mark.skipif(not kernels.available(), reason="the C kernels were not built")
def test_a_profile_accounts_for_the_whole_pass() -> None:
    times = profile_pass(load("tiny-qwen3", device="cpu", precision="full").decoder, context=5, rows=3, repeats=3)
    names = [t.kernel for t in times]
    assert names[0] == "embed"
    assert {"float_linear", "attention", "swiglu"} <= set(names)
    assert names[-2:] == ["outside", "pass"]
    assert times[-1].share == 1
    assert 0.5 < sum(t.share for t in times[:-1]) < 2  # medians of parts need not add up


def test_other_backends_have_no_profile() -> None:
    decoder = load("tiny-qwen3", device="reference", precision="full").decoder
    with pytest.raises(QuasarError, match="--profile: the reference backend records no passes"):
        profile_pass(decoder, 5, 3, 3)


def test_memory_grows_from_stage_to_stage() -> None:
    found = footprint.measure("tiny-qwen3", "auto", "full", "cpu", 2)
    assert 0 < found.imports <= found.load <= found.generate
    assert found.quantise is None
    assert 0 < found.weights < found.generate


def test_memory_of_what_is_no_model_is_one_line() -> None:
    with pytest.raises(QuasarError, match="no-such-model") as error:
        footprint.measure("no-such-model", "auto", "full", "cpu", 2)
    assert "\n" not in str(error.value)


def test_peers_say_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    assert peers.not_installed()["openvino"] == "pip install openvino nncf"
