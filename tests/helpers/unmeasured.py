"""What is drafted must not depend on what else this machine does: costs are given in tests, and no drafter rests."""

from __future__ import annotations

from quasar.engine.worth import Worth
from quasar.models.costs import PassCosts
from quasar.models.runtime import Runtime

measured_costs, learn_worth = Runtime._measure_costs, Worth.learn  # for the tests of these themselves


class FixedCosts(PassCosts):
    """Those of a device bound by memory, whatever passes take."""

    def learn(self, rows: int, seconds: float) -> None:
        pass


def fix() -> None:
    """For the whole process."""
    Runtime._measure_costs = _fixed_costs  # type: ignore[method-assign]
    Worth.learn = _learn_nothing  # type: ignore[method-assign]


def _fixed_costs(runtime: Runtime) -> PassCosts:
    one = float(runtime.decoder.weight_bytes_per_pass)
    return FixedCosts({1: one, 64: 4 * one})


def _learn_nothing(worth: Worth, *_measured: object, **_named: object) -> None:
    pass
