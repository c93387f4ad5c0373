"""Peers must do the same work as we do, or timing them beside us means nothing."""

import pytest
import torch

from quasar.errors import QuasarError
from quasar.evaluation import peers
from quasar.evaluation.speed import decoder_step
from quasar.models.model import ASSETS
from tests.conftest import FAMILIES, TINY

CPU = torch.device("cpu")


def missing(peer: str) -> bool:
    try:
        peers.require(peer, CPU)
    except QuasarError:
        return True
    return False


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "peer",
    [pytest.param(p, marks=pytest.mark.skipif(missing(p), reason=f"{p} is not installed here")) for p in peers.PEERS],
)
def test_a_peer_computes_the_same_logits(shipped, family, peer):
    model = shipped(family)
    ours = decoder_step(model.decoder, 30, 600)
    theirs = peers.peer_steps(peer, model.config, ASSETS / TINY[family], 30, 600, CPU)
    assert theirs
    for step in theirs.values():
        for ids in (torch.arange(100, 106), torch.tensor([7]), torch.arange(100, 700), torch.arange(100, 106)):
            expected, got = ours.run(ids), step.run(ids).float()
            assert got.shape == expected.shape
            # bfloat16 and int8 are within 0.5 % here; OpenVINO with AMX, all of it in bfloat16, within 3.2 %
            assert (got - expected).norm() <= 0.05 * expected.norm()
            for engine in (ours, step):
                engine.rewind(len(ids))


def test_a_peer_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(QuasarError, match=r"--peer llama\.cpp is not installed; pip install llama-cpp-python gguf"):
        peers.require("llama.cpp", CPU)
    with pytest.raises(QuasarError, match="pip install openvino nncf"):
        peers.require("openvino", CPU)


def test_cpu_engines_are_not_compared_with_another_device(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    with pytest.raises(QuasarError, match="add --device cpu"):
        peers.require("openvino", torch.device("meta"))
