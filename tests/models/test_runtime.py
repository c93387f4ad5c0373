"""What a pass costs is measured once per runtime, by passes that leave nothing behind."""

from __future__ import annotations

import itertools

from quasar.models.costs import SIZES
from quasar.models.runtime import Runtime
from tests.helpers.unmeasured import measured_costs


def test_measured_costs_grow_with_the_rows(shipped) -> None:
    runtime = Runtime(shipped("qwen3").decoder)
    costs = measured_costs(runtime)
    seconds = [costs(rows) for rows in SIZES]
    assert seconds[0] > 0
    assert all(fewer < more for fewer, more in itertools.pairwise(seconds))


def test_the_first_look_measures_and_the_second_does_not(shipped, monkeypatch) -> None:
    runtime = Runtime(shipped("qwen3").decoder)
    assert not runtime.costs_known
    first = runtime.costs
    monkeypatch.setattr(Runtime, "_measure_costs", None)
    assert runtime.costs_known and runtime.costs is first
