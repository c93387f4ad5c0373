"""Everything about the CUDA backend that only a card can tell, in one call of under ten minutes:

    python scripts/measure_gpu.py --json gpu.json

Needs this checkout, torch with CUDA, Triton and transformers; Quasar need not be installed. Each step runs in a process
of its own, with a time limit, and writes its figures as it gets them: a step that fails or hangs costs no figure of
another. Prints markdown tables; --steps runs some of the steps only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # uninstalled

SHAPE = "qwen3-8b"
ROWS = [1, 2, 4, 6, 8, 16]
ACCEPTANCE = 1.40  # the paper's, for Qwen3-8B

NO_CARD = 2  # exit status: there is nothing to measure

Row = dict[str, object]


class Report:
    """Rows by table, written to a file and printed as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._tables, self._latest = path, {}, ""

    def add(self, table: str, row: Row) -> None:
        """Rows of one table have the same columns."""
        if table != self._latest:
            print(f"\n**{table}**\n\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
        self._latest = table
        self._tables.setdefault(table, []).append(row)
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        self._path.write_text(json.dumps(self._tables, indent=1) + "\n", encoding="utf-8")


# The steps. Each imports what it needs: torch takes seconds to import, and the parent needs none of it.


def device(report: Report) -> None:
    """What is measured on."""
    import torch
    import transformers
    import triton

    from quasar.backends import get_backend
    from quasar.evaluation.speed import BandwidthProbe

    card = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "nvidia-smi does not answer"
    for name, value in {
        "card": f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}",
        "driver, max clocks, power limit": driver,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }.items():
        report.add("device", {"what": name, "value": value})
    copies = [BandwidthProbe(get_backend("cuda"))() for _ in range(5)]
    report.add("device", {"what": "copy, bytes read + written", "value": f"{max(copies) / 1e9:.0f} GB/s"})
    data = torch.ones(1 << 28, device="cuda")
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        data.sum()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    report.add("device", {"what": "read, a sum", "value": f"{data.nbytes / min(seconds) / 1e9:.0f} GB/s"})


def operators(report: Report) -> None:
    """Every operator against the reference backend, and windows against longer ones."""
    import torch

    from quasar.backends import get_backend
    from quasar.models.model import dummy_config
    from scripts.gpu.operators import operator_errors

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for result in operator_errors(get_backend("cuda", dtype), dummy_config(SHAPE), context=1500):
            row = {"operator": result.operator, "dtype": str(dtype)[6:], "error": f"{result.error:.1e}"}
            report.add(f"operators, {SHAPE}", row | {"same for 1 to 16 rows": result.invariant})


def ids(report: Report) -> None:
    """Ids of the shipped models, and memory after them."""
    from quasar import load
    from scripts.gpu import ids as said

    for name in said.MODELS:
        same = said.same_ids_as_reference(name, "cuda", tokens=64)
        report.add("float32 ids equal the reference backend's", {"model": name, "same": same})
        for precision in ("full", "w8a8"):
            for way, same in said.ways_of_running(load(name, device="cuda", precision=precision), tokens=96):
                row = {"model": name, "precision": precision, "way": way, "same": same}
                report.add("ids equal those of plain decoding, bfloat16", row)
        for dtype in ("float32", "bfloat16"):
            share = said.top1_agreement(name, "cuda", dtype, tokens=600)
            row = {"model": name, "dtype": dtype, "top-1": f"{share:.2%}"}
            report.add("W8A8 against the reference backend's W8A8", row)
    during, left = said.bytes_left("tiny-qwen3", "cuda", tokens=32)
    report.add("memory", {"model": "tiny-qwen3", "MB in use": during / 1e6, "MB after dropping it": left / 1e6})


def step(report: Report) -> None:
    """Passes of Qwen3-8B's shape, with what they gain by graphs, and transformers'."""
    import torch

    from quasar import load
    from quasar.evaluation import peers, speed

    steps = {}
    for precision in ("full", "w8a8"):
        clock = time.perf_counter()
        model = load(f"dummy:{SHAPE}", device="cuda", precision=precision)
        report.add("loading", {"precision": precision, "s": round(time.perf_counter() - clock, 1)})
        steps[precision] = speed.decoder_step(model.decoder, 128, max(ROWS))
    backend, config = model.decoder.backend, model.config
    backend.graphs = False
    steps["w8a8, no graphs"] = speed.decoder_step(model.decoder, 128, max(ROWS))
    backend.graphs = True
    time_table(report, steps, ROWS, config.vocab_size, backend)
    backend.dependent_launch = False
    steps = {"w8a8, no dependent launch": speed.decoder_step(model.decoder, 128, max(ROWS))}
    time_table(report, steps, [1, 6, 16], config.vocab_size, backend)
    backend.dependent_launch = torch.cuda.get_device_capability() >= (9, 0)
    steps = {"w8a8, 4000 tokens of context": speed.decoder_step(model.decoder, 4000, max(ROWS))}
    time_table(report, steps, [1, 6, 16], config.vocab_size, backend)
    steps = peers.peer_steps("transformers", config, None, 128, max(ROWS), backend.device)
    time_table(report, steps, [1, 6, 16], config.vocab_size, backend)


def time_table(report: Report, steps: dict[str, Any], rows: list[int], vocab: int, backend: Any) -> None:
    """A row for each scheme and M."""
    from quasar.evaluation import speed

    for cost in sorted(speed.time_steps(steps, rows, 9, vocab, backend), key=lambda cost: cost.rows):
        row = {"scheme": cost.scheme, "M": cost.rows, "ms": round(cost.milliseconds, 3), "spread": f"{cost.spread:.0%}"}
        row |= {"MB": round(cost.weight_bytes / 1e6), "GB/s": round(cost.gigabytes_per_second)}
        row |= {"of copy bandwidth": f"{cost.of_floor:.0%}", "copy GB/s": round(cost.bandwidth / 1e9)}
        report.add(f"bench step, {SHAPE}", row | {"vs full": "" if cost.vs_full is None else f"{cost.vs_full:.2f}x"})


def decode(report: Report) -> None:
    """Tokens per second at the paper's acceptance length."""
    from quasar import load
    from quasar.evaluation import decode as ends

    models = {p: load(f"dummy:{SHAPE}", device="cuda", precision=p) for p in ("full", "w8a8")}
    for speed in ends.compare_runs(ends.replayed(models, ACCEPTANCE, 128, 128), 3, stated=True):
        row = {"scheme": speed.scheme, "tokens/s": round(speed.tokens_per_second, 1), "spread": f"{speed.spread:.0%}"}
        row |= {"acceptance (replayed)": round(speed.acceptance_length, 2), "vs plain": f"{speed.speed:.2f}x"}
        report.add(f"bench decode, {SHAPE}", row)


def int4(report: Report) -> None:
    """Passes with int4 weights beside full precision's."""
    from quasar import load
    from quasar.evaluation import speed

    models = {p: load(f"dummy:{SHAPE}", device="cuda", precision=p) for p in ("full", "w4a16", "w4a4")}
    steps = {p: speed.decoder_step(model.decoder, 128, 16) for p, model in models.items()}
    time_table(report, steps, [1, 6, 16], models["full"].config.vocab_size, models["full"].decoder.backend)


def kernels(report: Report) -> None:
    """Each kernel alone, with and without dependent launch."""
    import torch

    from quasar.models.model import dummy_config
    from quasar_gpu.kernels.launch import use_dependent_launch
    from scripts.gpu.kernels import KernelBench, graph_seconds, table_row

    bench = KernelBench(dummy_config(SHAPE), torch.bfloat16, torch.device("cuda", 0), graph_seconds)
    has = torch.cuda.get_device_capability() >= (9, 0)
    for dependent in (True, False) if has else (False,):
        use_dependent_launch(dependent)
        title = f"kernels, {SHAPE}, dependent launch {'on' if dependent else 'off'}"
        for name in bench.matrices:
            for time_ in (*bench.int8_linear(name, [1, 6, 16]), *bench.float_linear(name, [1, 6, 16])):
                report.add(title, table_row(time_))
        for m in (1, 6, 16):
            times = [*bench.row_kernels(m), *bench.attention_kernels(m, 128), *bench.attention_kernels(m, 8000)]
            for time_ in times:
                report.add(title, table_row(time_))


def sweep(report: Report) -> None:
    """Every cut of the matmuls at six rows."""
    import torch

    from quasar.models.model import dummy_config
    from quasar_gpu.kernels.launch import use_dependent_launch
    from scripts.gpu.kernels import KernelBench, graph_seconds, table_row

    bench = KernelBench(dummy_config(SHAPE), torch.bfloat16, torch.device("cuda", 0), graph_seconds)
    use_dependent_launch(torch.cuda.get_device_capability() >= (9, 0))
    for name in bench.matrices:
        for cut, time_ in bench.sweep(name, 6):
            report.add("sweep", {"cut": cut} | table_row(time_))


def tests(report: Report) -> None:
    """tests/gpu on this card, kernels compiled."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing was printed").splitlines()
    report.add("pytest tests/gpu", {"exit status": done.returncode, "last line": lines[-1]})


# By what is wanted most; seconds at most.
STEPS: dict[str, tuple[Callable[[Report], None], int]] = {
    "device": (device, 45),
    "operators": (operators, 100),
    "ids": (ids, 120),
    "step": (step, 150),
    "decode": (decode, 90),
    "int4": (int4, 80),
    "kernels": (kernels, 110),
    "sweep": (sweep, 120),
    "tests": (tests, 120),
}


def run_step(name: str, path: Path) -> None:
    """In this process."""
    from quasar.backends import get_backend
    from quasar.errors import QuasarError

    try:
        get_backend("cuda")
    except QuasarError as error:
        print(f"measure_gpu: {error}", file=sys.stderr)
        raise SystemExit(NO_CARD) from None
    try:
        STEPS[name][0](Report(path))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        raise SystemExit(1) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="S,S", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=580, metavar="S", help="for all (default: %(default)s)")
    parser.add_argument("--alone", choices=STEPS, help=argparse.SUPPRESS)  # what each step's own process is told
    args = parser.parse_args()
    if args.alone is not None:
        run_step(args.alone, args.json)
        return
    if unknown := [name for name in args.steps.split(",") if name not in STEPS]:
        parser.error(f"--steps {unknown[0]}: is none of {', '.join(STEPS)}")
    end, figures = time.monotonic() + args.seconds, {}
    for name in args.steps.split(","):
        clock, left = time.monotonic(), min(STEPS[name][1], end - time.monotonic())
        part = args.json.with_name(f"{args.json.name}.{name}")
        print(f"\n## {name}", flush=True)
        outcome = "not started: no time was left" if left < 5 else run_alone(name, part, left)
        if outcome == outcome_of(NO_CARD):
            sys.exit(NO_CARD)
        figures[name] = {"outcome": outcome, "seconds": round(time.monotonic() - clock, 1)}
        if part.exists():
            figures[name]["tables"] = json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        print(f"\n{name}: {outcome}, {figures[name]['seconds']} s", flush=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def run_alone(name: str, part: Path, seconds: float) -> str:
    """In a process of its own; how that ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", name, "--json", str(part.resolve())]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return "ran out of time"
    return outcome_of(status)


def outcome_of(status: int) -> str:
    """What is reported of a step that ended with this exit status."""
    return "done" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    main()
