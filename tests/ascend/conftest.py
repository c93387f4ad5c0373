"""Switch the emulated NPU on for this folder, or skip the folder with one plain reason."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_npu import Counts, counting, install, soc_as, unavailable

WHY_NOT = unavailable()
if WHY_NOT and os.environ.get("CI") == "true" and "QUASAR_ASCEND_TESTS" in os.environ:
    raise RuntimeError(f"tests/ascend cannot run, and this is CI: {WHY_NOT}")
if WHY_NOT is None:
    install()  # at import: test modules import torch_npu at their top


class _Unavailable(pytest.Module):
    """A test file that is not even imported, because its imports would fail."""

    def collect(self) -> list:
        pytest.skip(f"no emulated Ascend device: {WHY_NOT}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Replace every test module of this folder when the device cannot be had."""
    return _Unavailable.from_parent(parent, path=module_path) if WHY_NOT else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it in one line even where pytest is asked to be quiet about skips."""
    if WHY_NOT:
        terminalreporter.write_line(f"tests/ascend skipped: {WHY_NOT}")


@pytest.fixture
def counted() -> Iterator[Counts]:
    """Counts of the whole test; ``host_waits`` lacks explicit synchronisations until the test is over."""
    with counting() as counts:
        yield counts


@pytest.fixture
def inference_card() -> Iterator[None]:
    """Apply the operator limits of an Atlas inference card."""
    with soc_as("Ascend310P3"):
        yield
