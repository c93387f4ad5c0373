"""Everything about the CUDA backend that only a card can tell, in two calls of under ten minutes each:

    python3 -u scripts/measure_gpu.py             # what is wanted most
    python3 -u scripts/measure_gpu.py --call 2    # the rest

Needs this checkout, torch with CUDA, Triton and transformers; Quasar need not be installed. Figures go to
$OUT/gpu1.json and gpu2.json ($OUT unset: to this folder) as they come, all that is printed to gpu1.log and gpu2.log
beside them. Each step runs in a process group of its own, with a time limit; each scheme and each kernel is tried by
itself: what fails or hangs costs no figure of another. Prints markdown tables; --steps runs some of the steps only.
--rehearse runs all of it without a card: tiny shapes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # uninstalled

ACCEPTANCE = 1.40  # the paper's, for Qwen3-8B
NO_CARD = 2  # exit status: there is nothing to measure

Row = dict[str, object]


@dataclass(frozen=True)
class Plan:
    """Sizes of what is measured."""

    shape: str = "qwen3-8b"
    rows: tuple[int, ...] = (1, 6, 16)
    batch_rows: tuple[int, ...] = (32, 64)
    context: int = 128
    long_context: int = 4000
    repeats: int = 9
    replays: int = 50
    decoded: int = 128
    sequences: tuple[int, ...] = (1, 8, 16, 64)
    served_tokens: int = 64
    ids_tokens: int = 64
    rehearsal: bool = False


CARD = Plan()
REHEARSAL = Plan(
    shape="rehearsal",
    rows=(1, 3),
    batch_rows=(18,),
    context=5,
    long_context=9,
    repeats=1,
    replays=2,
    decoded=4,
    sequences=(1, 2),
    served_tokens=3,
    ids_tokens=2,
    rehearsal=True,
)


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

    @property
    def folder(self) -> Path:
        """Where other files of a step go."""
        return self._path.parent

    @property
    def failures(self) -> int:
        return len(self._tables.get("failures", []))

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """One figure or scheme: what goes wrong within is reported, and the step goes on."""
        clock = time.monotonic()
        try:
            yield
            fail_on_demand(what)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.add("failures", {"what": what, "error": f"{type(error).__name__}: {text}"})
        print(f"({what}: {time.monotonic() - clock:.1f} s)", flush=True)


def fail_on_demand(what: str) -> None:
    """For the rehearsal: QUASAR_MEASURE_FAIL names what is to fail."""
    if os.environ.get("QUASAR_MEASURE_FAIL") == what:
        raise RuntimeError(f"{what} was asked to fail")


# What stands in for a card in the rehearsal.


def backend_of(plan: Plan, dtype: str = "bfloat16") -> Any:
    """The CUDA backend; Triton's interpreter for the rehearsal, where recorded launches stand in for graphs."""
    import torch

    if not plan.rehearsal:
        from quasar.backends import get_backend

        return get_backend("cuda", getattr(torch, dtype))
    from quasar_gpu.backend import CudaBackend

    made = CudaBackend(torch.device("cpu"), getattr(torch, dtype))
    made.graphs = True
    return made


def stand_in() -> None:
    """Makes "cuda" mean Triton's interpreter, and adds the rehearsal's shape."""
    import torch

    from quasar.models import config
    from quasar_gpu import graphs
    from quasar_gpu.kernels import attention

    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    import interpreted_dot

    from tests.gpu.launches import record

    torch.set_num_threads(1)
    interpreted_dot.install()
    graphs.capture = record
    attention._UNROLLED = 1
    small = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_layers": 1}
    sizes = small | {"intermediate_size": 64, "vocab_size": 96}
    config.DUMMY_SHAPES["rehearsal"] = replace(config.DUMMY_SHAPES["qwen3-8b"], max_position_embeddings=200, **sizes)


def load_model(plan: Plan, scheme: str, name: str | None = None, **options: Any) -> Any:
    """Random weights of the plan's shape (`gpu.models`), or a shipped model, on the card."""
    from quasar import load
    from quasar.models import model as models

    if name is None:
        from scripts.gpu.models import random_model

        return random_model(plan.shape, scheme, backend_of(plan))
    if not plan.rehearsal:
        return load(name, device="cuda", precision=scheme, **options)
    opened = models.get_backend
    models.get_backend = lambda device, dtype=None, *_: backend_of(
        plan, str(dtype or "bfloat16").removeprefix("torch.")
    )
    try:
        return load(name, device="cuda", precision=scheme, **options)
    finally:
        models.get_backend = opened


def config_of(plan: Plan) -> Any:
    from quasar.models.model import dummy_config

    return dummy_config(plan.shape)


# The steps. Each imports what it needs: torch takes seconds to import, and the parent needs none of it.


def device(report: Report, plan: Plan) -> None:
    """What is measured on."""
    import torch
    import transformers
    import triton

    from quasar.evaluation.speed import BandwidthProbe

    if not plan.rehearsal:
        card = torch.cuda.get_device_properties(0)
        name = f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}"
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        try:
            command = ["nvidia-smi", query, "--format=csv,noheader"]
            driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "nvidia-smi does not answer"
    else:
        name = driver = "none"
    for what, value in {
        "card": name,
        "driver, max clocks, power limit": driver,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }.items():
        report.add("device", {"what": what, "value": value})
    with report.trying("bandwidth"):
        copies = [BandwidthProbe(backend_of(plan))() for _ in range(1 if plan.rehearsal else 5)]
        report.add("device", {"what": "copy, bytes read + written", "value": f"{max(copies) / 1e9:.0f} GB/s"})


def correctness(report: Report, plan: Plan) -> None:
    """At the real shape: captured passes against plain ones, rows against windows, trees against chains."""
    import torch

    from quasar.backends.base import Batch, Segment
    from quasar.models.runtime import Runtime
    from quasar_gpu.kernels.launch import Launching, launching, launching_as

    def told(what: str, same: bool) -> None:
        report.add(f"bit for bit, {plan.shape}", {"precision": precision, "what": what, "same": bool(same)})

    for precision in ("w8a8", "full"):
        with report.trying(f"correctness {precision}"):
            model = load_model(plan, precision)
            decoder, backend = model.decoder, model.decoder.backend
            runtime = Runtime(decoder)
            slot = runtime.new_slot(plan.context + 70)
            ids = [7 * i % decoder.config.vocab_size for i in range(plan.context + 64)]
            runtime.prefill(slot, ids[: plan.context])
            draft = ids[plan.context :]

            def plain(*segments: Segment, decoder: Any = decoder, backend: Any = backend) -> torch.Tensor:
                batch = Batch(segments)
                return decoder(torch.tensor(batch.ids, device=backend.device), batch).clone()

            def part(rows: int, slot: Any = slot, draft: list[int] = draft) -> Segment:
                return Segment(slot, draft[:rows], logits_to_keep=rows)

            for rows in plan.rows:
                right = plain(part(rows))
                same = True
                for _ in range(plan.replays):
                    same = same and torch.equal(runtime.run(Batch([part(rows)])), right)
                told(f"{plan.replays} captured passes of {rows} rows, and a plain one", same)
                found = backend.argmax(runtime.run(Batch([part(rows)])))
                told(f"their best tokens, {rows} rows", torch.equal(found.cpu(), right.argmax(dim=-1).cpu()))
            many = plain(part(plan.batch_rows[-1]))
            for rows in plan.rows:
                told(f"{rows} rows, and {plan.batch_rows[-1]}", torch.equal(plain(part(rows)), many[:rows]))
            tree = plain(Segment(slot, draft[:3], [-1, 0, 0], 3))
            chain = plain(Segment(slot, [draft[0], draft[2]], None, 2))
            told("a tree's row, and a chain's", torch.equal(tree[[0, 2]], chain))
            if launching(backend.device).dependent:
                with launching_as(backend.device, Launching(dependent=False)):
                    told("without dependent launch", torch.equal(plain(part(plan.rows[-1])), right))
            cut = runtime.new_slot(plan.context)
            runtime.prefill(cut, ids[: plan.context // 2])
            runtime.prefill(cut, ids[plan.context // 2 : plan.context])
            equal = torch.equal(cut.k[:, :, : plan.context], slot.k[:, :, : plan.context])
            told("keys of a prompt in one piece, and in two", equal)
            del model, decoder, runtime, slot, cut
            free(plan)


def free(plan: Plan) -> None:
    """Before the next model is loaded."""
    if not plan.rehearsal:
        import torch

        torch.cuda.empty_cache()


def timed(report: Report, plan: Plan, scheme: str, run: Callable[[int], object], nbytes: int, rows: list[int]) -> None:
    """A row for each number of rows: medians, beside the copy bandwidth measured in between."""
    from quasar.evaluation.speed import BandwidthProbe

    backend = backend_of(plan)
    probe = BandwidthProbe(backend)
    for m in rows:
        with report.trying(f"{scheme}, M = {m}"):
            for _ in range(3):
                run(m)
            spent, bandwidth = [], 0.0
            for _ in range(plan.repeats):
                bandwidth = max(bandwidth, probe())
                backend.synchronize()
                clock = time.perf_counter()
                run(m)
                backend.synchronize()
                spent.append(time.perf_counter() - clock)
            median = statistics.median(spent)
            row: Row = {"scheme": scheme, "M": m, "ms": round(1e3 * median, 3)}
            row |= {"spread": f"{(max(spent) - min(spent)) / median:.0%}", "MB": round(nbytes / 1e6)}
            row |= {"GB/s": round(nbytes / median / 1e9), "copy GB/s": round(bandwidth / 1e9)}
            report.add(f"bench step, {plan.shape}", row | {"of copy bandwidth": f"{nbytes / median / bandwidth:.0%}"})


def steps_of(report: Report, plan: Plan, precision: str, *, switches: bool) -> None:
    """Passes of one precision; with `switches` also without graphs, dependent launch, late trigger and prefetch."""
    from quasar.evaluation.speed import decoder_step
    from quasar_gpu.kernels.launch import Launching, launching, launching_as

    clock = time.perf_counter()
    model = load_model(plan, precision)
    report.add("loading", {"precision": precision, "s": round(time.perf_counter() - clock, 1)})
    decoder, backend = model.decoder, model.decoder.backend
    most = max(*plan.rows, *plan.batch_rows)

    def measure(scheme: str, context: int, rows: list[int]) -> None:
        with report.trying(scheme):
            step = decoder_step(decoder, context, most)
            ids = context_rows(decoder.config.vocab_size, most)
            timed(report, plan, scheme, lambda m: step.run(ids[:m]), step.weight_bytes, rows)

    measure(precision, plan.context, [*plan.rows, *plan.batch_rows])
    if not switches:
        return
    usual = launching(backend.device)
    others = {
        "early trigger": replace(usual, late=False),
        "no prefetch": replace(usual, prefetch_kb=0),
        "32 KB prefetched": replace(usual, prefetch_kb=32),
        "128 KB prefetched": replace(usual, prefetch_kb=128),
        "no dependent launch": Launching(dependent=False),
    }
    for name, how in others.items():
        with launching_as(backend.device, how):
            measure(f"{precision}, {name}", plan.context, [plan.rows[1]])
    backend.graphs = False
    measure(f"{precision}, no graphs", plan.context, [plan.rows[1]])
    backend.graphs = True
    measure(f"{precision}, {plan.long_context} tokens of context", plan.long_context, list(plan.rows))


def context_rows(vocab: int, rows: int) -> Any:
    import torch

    return torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))


def step_w8a8(report: Report, plan: Plan) -> None:
    """Passes in W8A8, with what each switch brings."""
    steps_of(report, plan, "w8a8", switches=True)


def step_full(report: Report, plan: Plan) -> None:
    """Passes in bfloat16."""
    steps_of(report, plan, "full", switches=False)


def step_others(report: Report, plan: Plan) -> None:
    """Passes with int4 weights, with zero points and without; W8A8 without wide inputs, and with an int8 lm_head."""
    from scripts.gpu.models import SCHEMES

    for scheme in ("w4a16", *(scheme for scheme in SCHEMES if "," in scheme)):
        with report.trying(f"step {scheme}"):
            steps_of(report, plan, scheme, switches=False)
        free(plan)


def profile(report: Report, plan: Plan) -> None:
    """One replay of W8A8 at six rows: every kernel's start and end, and the gaps between them."""
    import torch

    from quasar.evaluation.speed import decoder_step

    model = load_model(plan, "w8a8")
    step = decoder_step(model.decoder, plan.context, 16)
    ids = context_rows(model.config.vocab_size, plan.rows[1])
    for _ in range(4):
        step.run(ids)
    model.decoder.backend.synchronize()
    with report.trying("trace"):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not plan.rehearsal:
            activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as trace:
            step.run(ids)
            model.decoder.backend.synchronize()
        trace.export_chrome_trace(str(report.folder / "replay.json"))
        kernels = kernels_of(
            json.loads((report.folder / "replay.json").read_text()), "cpu_op" if plan.rehearsal else "kernel"
        )
        (report.folder / "replay_kernels.json").write_text(json.dumps(kernels))
        for row in gap_table(kernels):
            report.add("kernels of one replay, M = 6", row)


def kernels_of(trace: dict[str, Any], category: str) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of a chrome trace, in order."""
    events = [e for e in trace["traceEvents"] if e.get("cat") == category and "dur" in e]
    return sorted(((e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events), key=lambda e: e[1])


def gap_table(kernels: list[tuple[str, float, float]]) -> list[Row]:
    """For each kernel by name: how often, its mean time, and its mean gap to the end of those before it (negative: it
    started while they ran); at last the whole."""
    found: dict[str, list[tuple[float, float]]] = {}
    latest: float | None = None
    for name, start, end in kernels:
        found.setdefault(name, []).append((end - start, 0.0 if latest is None else start - latest))
        latest = end if latest is None else max(latest, end)
    rows: list[Row] = [
        {
            "kernel": name[:60],
            "times": len(times),
            "us": round(statistics.mean(t for t, _ in times), 2),
            "gap before, us": round(statistics.mean(g for _, g in times), 2),
            "together, us": round(sum(t + g for t, g in times), 1),
        }
        for name, times in found.items()
    ]
    if kernels:
        idle = sum(max(gap, 0.0) for times in found.values() for _, gap in times)
        whole = (latest or 0.0) - kernels[0][1]
        rows.append(
            {
                "kernel": "all",
                "times": len(kernels),
                "us": "",
                "gap before, us": round(idle, 1),
                "together, us": round(whole, 1),
            }
        )
    return rows


def decode(report: Report, plan: Plan) -> None:
    """Tokens per second at the paper's acceptance length."""
    from quasar.evaluation import decode as ends

    models = {p: load_model(plan, p) for p in ("full", "w8a8")}
    for speed in ends.compare_runs(
        ends.replayed(models, ACCEPTANCE, plan.context, plan.decoded), 1 if plan.rehearsal else 3, stated=True
    ):
        row = {"scheme": speed.scheme, "tokens/s": round(speed.tokens_per_second, 1), "spread": f"{speed.spread:.0%}"}
        row |= {"acceptance (replayed)": round(speed.acceptance_length, 2), "vs plain": f"{speed.speed:.2f}x"}
        report.add(f"bench decode, {plan.shape}", row)


def serving(report: Report, plan: Plan) -> None:
    """Tokens per second of many sequences together, and beside it vLLM's if it is here."""
    from quasar import Engine

    for precision in ("w8a8", "full"):
        with report.trying(f"serving {precision}"):
            model = load_model(plan, precision)
            vocab = model.config.vocab_size
            for count in plan.sequences:
                with report.trying(f"serving {precision}, {count} sequences"):
                    prompts = [[(11 * i + 7 * j) % vocab for j in range(plan.context)] for i in range(count)]
                    settings = {"max_new_tokens": plan.served_tokens, "ignore_eos": True, "draft": "none"}
                    with Engine(model, max_sequences=count) as engine:
                        engine.generate(prompts, **settings)  # captures
                        clock = time.perf_counter()
                        results = engine.generate(prompts, **settings)
                        spent = time.perf_counter() - clock
                    tokens = sum(len(result.token_ids) for result in results)
                    row = {"engine": f"Quasar {precision}", "sequences": count, "tokens/s": round(tokens / spent, 1)}
                    report.add(f"serving, {plan.shape}, {plan.context} tokens of prompt", row)
            del model
            free(plan)


def peers(report: Report, plan: Plan) -> None:
    """transformers' passes, and vLLM's serving, if they are on this machine."""
    from quasar.evaluation import peers as others

    config, backend = config_of(plan), backend_of(plan)
    with report.trying("transformers"):
        steps = others.peer_steps("transformers", config, None, plan.context, max(plan.rows), backend.device)
        ids = context_rows(config.vocab_size, max(plan.rows))
        for name, step in steps.items():

            def run(m: int, step: Any = step) -> None:
                step.run(ids[:m])
                step.rewind(m)

            timed(report, plan, name, run, 2 * config.matrix_parameters, list(plan.rows))
    with report.trying("vllm"):
        vllm_serving(report, plan)


def vllm_serving(report: Report, plan: Plan) -> None:
    """vLLM with random weights of the same shape."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        report.add("vllm", {"what": "not on this machine"})
        return
    config = config_of(plan)
    folder = report.folder / "vllm-config"
    folder.mkdir(exist_ok=True)
    sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "head_dim": config.head_dim}
    sizes |= {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    sizes |= {"intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size}
    about = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(about | sizes | {"max_position_embeddings": 4096}))
    engine = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=1024)
    for count in plan.sequences:
        prompts = [{"prompt_token_ids": [(11 * i + 7 * j) % 1000 for j in range(plan.context)]} for i in range(count)]
        settings = SamplingParams(temperature=0, max_tokens=plan.served_tokens, ignore_eos=True, detokenize=False)
        engine.generate(prompts, settings)
        clock = time.perf_counter()
        engine.generate(prompts, settings)
        rate = count * plan.served_tokens / (time.perf_counter() - clock)
        row = {"engine": "vLLM bf16", "sequences": count, "tokens/s": round(rate, 1)}
        report.add(f"serving, {plan.shape}, {plan.context} tokens of prompt", row)


def operators(report: Report, plan: Plan) -> None:
    """Every operator against the reference backend, and windows against longer ones."""
    from scripts.gpu.operators import operator_errors

    for dtype in ("bfloat16", "float32") if plan.rehearsal else ("bfloat16", "float32", "float16"):
        with report.trying(f"operators {dtype}"):
            context = 5 if plan.rehearsal else 1500
            for result in operator_errors(backend_of(plan, dtype), config_of(plan), context):
                row = {"operator": result.operator, "dtype": dtype, "error": f"{result.error:.1e}"}
                report.add(f"operators, {plan.shape}", row | {"same for fewer rows": result.invariant})


def ids(report: Report, plan: Plan) -> None:
    """Ids of the shipped models, and memory after them."""
    from scripts.gpu import ids as said

    def load(name: str, precision: str, dtype: str = "auto") -> Any:
        return load_model(plan, precision, name, dtype=dtype)

    for name in said.MODELS[: 1 if plan.rehearsal else None]:
        with report.trying(f"ids {name} float32"):
            same = said.same_ids_as_reference(name, load, plan.ids_tokens)
            report.add("float32 ids equal the reference backend's", {"model": name, "same": same})
        for precision in ("w8a8",) if plan.rehearsal else ("full", "w8a8"):
            with report.trying(f"ids {name} {precision}"):
                for way, same in said.ways_of_running(load(name, precision), plan.ids_tokens):
                    row = {"model": name, "precision": precision, "way": way, "same": same}
                    report.add("ids equal those of plain decoding, bfloat16", row)
        with report.trying(f"top-1 {name}"):
            share = said.top1_agreement(name, load, 6 if plan.rehearsal else 600)
            report.add("W8A8 against the reference backend's W8A8", {"model": name, "top-1": f"{share:.2%}"})
    if not plan.rehearsal:
        with report.trying("memory"):
            during, left = said.bytes_left("tiny-qwen3", "cuda", tokens=32)
            row = {"model": "tiny-qwen3", "MB in use": during / 1e6, "MB after dropping it": left / 1e6}
            report.add("memory", row)
        import torch

        if torch.cuda.device_count() > 1:
            with report.trying("cuda:1"):
                from quasar import load as load_on

                same = said.said(load_on("tiny-qwen3", device="cuda:1"), 32) == said.said(
                    load("tiny-qwen3", "auto"), 32
                )
                report.add("a second card", {"same ids": same})


def kernels(report: Report, plan: Plan) -> None:
    """Each kernel alone, with and without dependent launch."""
    import torch

    from quasar_gpu.kernels.launch import Launching, launching, launching_as
    from scripts.gpu.kernels import KernelBench, graph_seconds, table_row

    where = torch.device("cpu") if plan.rehearsal else torch.device("cuda", 0)
    timer = run_once if plan.rehearsal else graph_seconds
    bench = KernelBench(config_of(plan), torch.bfloat16, where, timer)
    usual, few = launching(where), plan.rows[1]
    others = [rows for rows in (*plan.rows, *plan.batch_rows) if rows != few]
    ways = [(usual, [few])] + [(Launching(dependent=False), [few])] * usual.dependent + [(usual, others)]
    for how, rows in ways:
        title = f"kernels, {plan.shape}, dependent launch {'on' if how.dependent else 'off'}"
        with launching_as(where, how):
            for name, times in bench.everything(rows, [plan.context, plan.long_context]):
                with report.trying(f"kernels {name}"):
                    for time_ in times:
                        report.add(title, table_row(time_))


def sweep(report: Report, plan: Plan) -> None:
    """Every cut of the matmuls at six rows."""
    import torch

    from scripts.gpu.kernels import KernelBench, graph_seconds, table_row

    where = torch.device("cpu") if plan.rehearsal else torch.device("cuda", 0)
    bench = KernelBench(config_of(plan), torch.bfloat16, where, run_once if plan.rehearsal else graph_seconds)
    for name in ("down", "gate_up", "qkv", "lm_head"):  # o is cut as down is
        for cut, times in bench.sweep(name, plan.rows[1]):
            with report.trying(f"sweep {name} {cut}"):
                for time_ in times:
                    report.add("sweep", {"cut": cut} | table_row(time_))


def run_once(run: Callable[[int], None], launches: int) -> float:
    """The rehearsal's timer."""
    run(launches - 1)
    return 1e-6


def tests(report: Report, plan: Plan) -> None:
    """tests/gpu on this card, kernels compiled; prints as it goes."""
    chosen = ["tests/gpu/test_kernels_rows.py", "-k", "embed"] if plan.rehearsal else ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *chosen]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout is not None
    last = "nothing was printed"
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    report.add("pytest tests/gpu", {"exit status": done.wait(), "last line": last})


Step = tuple[Callable[[Report, Plan], None], int]

# By what is wanted most; seconds at most. Each call's add up to less than ten minutes.
CALLS: dict[int, dict[str, Step]] = {
    1: {
        "device": (device, 80),
        "correctness": (correctness, 120),
        "step w8a8": (step_w8a8, 110),
        "step full": (step_full, 50),
        "decode": (decode, 70),
        "profile": (profile, 50),
        "step others": (step_others, 95),
    },
    2: {
        "serving": (serving, 130),
        "ids": (ids, 130),
        "kernels": (kernels, 80),
        "operators": (operators, 60),
        "peers": (peers, 60),
        "sweep": (sweep, 60),
        "tests": (tests, 50),
    },
}
SECONDS = 575  # of a call, of the 600 that it may take
ALL_STEPS = {name: step for call in CALLS.values() for name, step in call.items()}


def run_step(name: str, path: Path, rehearse: bool) -> None:
    """In this process."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import quasar  # noqa: F401  uninstalled
    from quasar.errors import QuasarError

    if rehearse:
        stand_in()
    plan = REHEARSAL if rehearse else CARD
    try:
        backend_of(plan)
    except QuasarError as error:
        print(f"measure_gpu: {error}", file=sys.stderr)
        raise SystemExit(NO_CARD) from None
    report = Report(path)
    try:
        fail_on_demand(name)
        ALL_STEPS[name][0](report, plan)
    except Exception:
        traceback.print_exc(file=sys.stdout)
        raise SystemExit(1) from None
    if report.failures:
        raise SystemExit(3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=CALLS, default=1, help="which half (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: $OUT/gpu1.json, gpu2.json for call 2)")
    parser.add_argument("--steps", metavar="S,S", help="(default: all of the call)")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for all (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a card, in Triton's interpreter, tiny shapes")
    parser.add_argument("--alone", choices=ALL_STEPS, help=argparse.SUPPRESS)  # what each step's own process is told
    args = parser.parse_args()
    path = args.json or Path(os.environ.get("OUT", ".")) / f"gpu{args.call}.json"
    if args.alone is not None:
        run_step(args.alone, path, args.rehearse)
        return
    names = list(CALLS[args.call]) if args.steps is None else args.steps.split(",")
    if unknown := [name for name in names if name not in ALL_STEPS]:
        parser.error(f"--steps {unknown[0]}: is none of {', '.join(ALL_STEPS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    end, figures = time.monotonic() + args.seconds, {}
    for name in names:
        clock, left = time.monotonic(), min(ALL_STEPS[name][1], end - time.monotonic())
        part = path.with_name(f"{path.name}.{name.replace(' ', '_')}")
        say(path, f"\n## {name}\n")
        outcome = "not started: no time was left" if left < 5 else run_alone(name, part, left, args.rehearse)
        if outcome == outcome_of(NO_CARD) and not figures:  # later steps may fail in their own ways
            path.with_suffix(".log").unlink()
            sys.exit(NO_CARD)
        figures[name] = {"outcome": outcome, "seconds": round(time.monotonic() - clock, 1)}
        if part.exists():
            try:
                figures[name]["tables"] = json.loads(part.read_text(encoding="utf-8"))
            except ValueError:  # cut off as it was written
                figures[name]["unread"] = part.read_text(encoding="utf-8", errors="replace")
            part.unlink()
        say(path, f"\n{name}: {outcome}, {figures[name]['seconds']} s\n")
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def say(path: Path, text: str) -> None:
    """Prints, and writes to the log beside the figures."""
    print(text, end="", flush=True)
    with path.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(text)


def run_alone(name: str, part: Path, seconds: float, rehearse: bool) -> str:
    """In a process group of its own, which ends with it; how that ended."""
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--alone", name, "--json", str(part.resolve())]
    command += ["--rehearse"] * rehearse
    log = part.with_name(part.name.split(".")[0] + ".log")
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # its own group alone, a child's too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = log.read_bytes()[begin:].decode(errors="replace")
    print(said, end="", file=sys.stderr if status == NO_CARD else sys.stdout, flush=True)
    return "ran out of time" if status is None else outcome_of(status)


def outcome_of(status: int) -> str:
    """What is reported of a step that ended with this exit status."""
    words = {0: "done", 3: "done, with failures"}
    return words.get(status, f"failed with status {status}")


if __name__ == "__main__":
    main()
