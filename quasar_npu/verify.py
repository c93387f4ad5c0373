"""`python -m quasar_npu.verify [--model M] [--report FILE]`: does this NPU do what Quasar takes for granted?

Nobody who wrote this had an NPU. So the first owner of one gets a report to paste into an issue: each operator against
its formula, captured passes against plain ones, ids with and without drafts, and tokens per second. One line each, a
failure does not end the run, and it takes under five minutes. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from quasar.backends import get_backend
from quasar.backends.base import ActivationQuant, AttentionSpec, Backend, Batch, Quantized, Segment
from quasar.backends.capture import CapturedPasses
from quasar.backends.reference import ReferenceBackend
from quasar.errors import QuasarError
from quasar.generation import generate
from quasar.loading import load
from quasar.models.model import Model
from quasar_npu import check

SECONDS = 270  # after which no further measurement is begun
PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n"
TINY = ("tiny-openpangu", "tiny-qwen3")
DYNAMIC = ActivationQuant()

Line = tuple[bool | None, str]  # whether it is right (None: a figure), what was looked at


class Report:
    """Lines on stdout and in a file, as they come."""

    def __init__(self, path: Path) -> None:
        """Raises QuasarError where the file cannot be written."""
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise QuasarError(f"--report {path}: cannot be written ({error})") from None
        self.failed = 0
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def say(self, right: bool | None, text: str) -> None:
        word = {True: "ok", False: "FAILED", None: ""}[right]
        self.failed += right is False
        for out in (sys.stdout, self._file):
            print(f"{word:8}{text}", file=out, flush=True)

    def section(self, title: str, lines: Callable[[], Iterator[Line]]) -> None:
        """Runs and says a section; what it raises is a line of its own."""
        for out in (sys.stdout, self._file):
            print(f"\n{title} ({self.seconds:.0f} s)", file=out, flush=True)
        try:
            for right, text in lines():
                self.say(right, text)
        except Exception as error:  # the next section may still tell something
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.say(False, f"{type(error).__name__}: {first}")

    def close(self) -> None:
        self._file.close()


def environment(model: str | None) -> Iterator[Line]:
    """Versions, chip, memory."""
    yield None, f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}"
    for level, text in check.findings(model):
        yield (None if level == "WARN" else level == "ok"), text
    variables = ("TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "ASCEND_RT_VISIBLE_DEVICES")
    yield None, ", ".join(f"{name}={os.environ.get(name, '')}" for name in variables)


# --- operators ----------------------------------------------------------------------------------------------


def operators(npu: Backend) -> Iterator[Line]:
    """Each step of a layer against the reference backend in float32, fed with what the device was fed."""
    exact, dtype = ReferenceBackend("cpu"), npu.dtype
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # half a unit in the last place of a rounded value

    def random(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def compare(name: str, got: object, expected: object, bound: float) -> Line:
        got, expected = _dense(got), _dense(expected)
        error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        return error <= bound, f"{name}: largest error {error:.1e} of the largest value, allowed {bound:.1e}"

    x, other, weight = random(6, 512), random(6, 512, seed=1), random(512, seed=2)
    for rows in (1, 6):
        y = npu.add_rms_norm(x[:rows].npu(), other[:rows].npu(), weight.npu(), 1e-6, None)
        e = exact.add_rms_norm(x[:rows].float(), other[:rows].float(), weight.float(), 1e-6, None)
        yield compare(f"norm of a sum, {rows} rows", y[0], e[0], 4 * unit)
        yield compare(f"the sum, {rows} rows", y[1], e[1], unit)
    gate_up = random(6, 1024, seed=3)
    yield compare("swiglu", npu.swiglu(gate_up.npu(), None), exact.swiglu(gate_up.float(), None), 4 * unit)
    matrix, bias = random(384, 512, seed=4), random(384, seed=5)
    y = npu.linear(x.npu(), npu.full_weight(matrix), bias.npu())
    yield compare("product", y, exact.linear(x.float(), matrix.float(), bias.float()), 4 * unit)

    step = 1.0 / 127
    if dtype == torch.bfloat16:
        yield compare("int8 per row", npu.quantize(x.npu(), DYNAMIC), x.float(), step)
        y = npu.add_rms_norm(x.npu(), other.npu(), weight.npu(), 1e-6, DYNAMIC)[0]
        e = exact.add_rms_norm(x.float(), other.float(), weight.float(), 1e-6, None)[0]
        yield compare("norm to int8", y, e, step + 4 * unit)
        yield compare("swiglu to int8", npu.swiglu(gate_up.npu(), DYNAMIC), exact.swiglu(gate_up.float(), None), step)
        quantised = exact.quantize(x.float(), DYNAMIC)
        values = torch.randint(-127, 128, (384, 512), generator=torch.Generator().manual_seed(6)).to(torch.int8)
        scale = torch.rand(384, generator=torch.Generator().manual_seed(7)) * 1e-2
        on_device = Quantized(quantised.values.npu(), quantised.scale.npu())
        for name, addend in (("int8 product", None), ("int8 product with bias", bias.float())):
            y = npu.int8_linear(on_device, npu.int8_weight(values, scale), None if addend is None else addend.npu())
            yield compare(name, y, exact.int8_linear(quantised, (values, scale), addend), 2 * unit)
    static = ActivationQuant(torch.tensor([0.03]))
    y = npu.quantize(x.npu(), ActivationQuant(static.static_scale.npu()))
    yield compare("int8 by a fixed scale", y, x.float().clamp(-128 * 0.03, 127 * 0.03), step + 2 * unit)
    if npu.int4_offsets:
        for group in (32, 128):
            values = torch.randint(-8, 8, (384, 512), generator=torch.Generator().manual_seed(9)).to(torch.int8)
            scale = (random(384, 512 // group, seed=10).float().abs() * 1e-2 + 1e-2).bfloat16()
            zero = (random(384, 512 // group, seed=11).float() * scale.float() * 4).bfloat16()
            grouped = values.unflatten(1, (-1, group)).float() * scale.float()[..., None]
            for kind, offset in (("symmetric", None), ("with zero points", zero)):
                dense = (grouped if offset is None else grouped + offset.float()[..., None]).flatten(1)
                y = npu.int4_linear(x.npu(), npu.int4_weight(values, scale, offset), bias.float().npu())
                e = exact.linear(x.float(), dense, bias.float())
                yield compare(f"int4 product, groups of {group}, {kind}", y, e, 8 * unit)
    yield from attention(npu, exact, compare, unit)


def attention(npu: Backend, exact: Backend, compare: Callable[..., Line], unit: float) -> Iterator[Line]:
    """Rotation, cache and attention: prompts, windows, single rows and trees, and several sequences at once."""
    for head_dim in (128, 64):
        spec = AttentionSpec(8, 2, head_dim, None, None, 1e-6)
        cases: dict[str, list[tuple[int, int, list[int] | None]]] = {  # committed, rows, parents
            "a prompt": [(0, 40, None)],
            "a window": [(300, 6, None)],
            "one row": [(300, 1, None)],
            "a tree": [(300, 5, [-1, 0, 0, 1, 2])],
            "three sequences": [(300, 6, None), (7, 2, None), (0, 1, None)],
        }
        for name, sequences in cases.items():
            outputs = []
            for backend in (npu, exact):
                g = torch.Generator().manual_seed(8)
                segments = []
                for committed, rows, parents in sequences:
                    slot = backend.new_slot(1, 2, 384, head_dim)
                    if committed:
                        _through(backend, spec, Batch([Segment(slot, [0] * committed)]), g)
                        slot.commit(committed)
                    segments.append(Segment(slot, [0] * rows, parents))
                outputs.append(_through(backend, spec, Batch(segments), g))
            yield compare(f"attention of {name}, heads of {head_dim}", *outputs, 24 * unit)


def _through(backend: Backend, spec: AttentionSpec, batch: Batch, g: torch.Generator) -> Tensor:
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    qkv = torch.randn(batch.rows, width, generator=g).to(torch.bfloat16)
    angle = torch.tensor(batch.positions)[:, None] * torch.logspace(0, -4, spec.head_dim // 2)[None]
    cos, sin = angle.cos().to(backend.device), angle.sin().to(backend.device)
    q = backend.append_rotated(qkv.to(backend.device, backend.dtype), spec, cos, sin, batch, 0)
    return backend.attention(q, spec, batch, 0)


def _dense(x: object) -> Tensor:
    if isinstance(x, Quantized):
        return x.values.cpu().float() * x.scale.cpu().float()[:, None]
    assert isinstance(x, Tensor)
    return x.cpu().float()


# --- passes and ids -----------------------------------------------------------------------------------------


def captured_passes(models: dict[str, Model]) -> Iterator[Line]:
    """A pass replayed from a graph against the same pass launched operator by operator."""
    for name, model in models.items():
        decoder, backend = model.decoder, model.decoder.backend
        c, passes = decoder.config, CapturedPasses(backend, decoder)
        slots = [backend.new_slot(c.num_layers, c.num_kv_heads, 256, c.head_dim) for _ in range(3)]
        for batch_of in (1, 3):
            equal, error = True, 0.0
            for round_ in range(4):
                ids = [[(7 * round_ + 3 * i + s) % 100 for i in range(4)] for s in range(batch_of)]
                batch = Batch([Segment(slot, row, logits_to_keep=4) for slot, row in zip(slots, ids, strict=False)])
                plain = decoder(torch.tensor(batch.ids, device=backend.device), batch).cpu()
                replayed = passes.run(batch).cpu()
                equal = equal and torch.equal(plain, replayed)
                error = max(error, float((plain - replayed).abs().max() / plain.abs().max()))
            captured = not backend.graphs or len(passes._passes) > 0
            close = error <= 0.05
            note = "bit for bit" if equal else f"within {error:.1e} of the largest logit"
            say = f"{name}, {batch_of} sequences: replayed graphs say what plain passes say, {note}"
            yield captured and close, say if captured else f"{name}, {batch_of} sequences: nothing was captured"
            for slot in slots:
                slot.commit(2)


def ids(models: dict[str, Model], tokens: int) -> Iterator[Line]:
    """Greedy text with and without drafts, and against the CPU."""
    for name, model in models.items():
        options = {"max_new_tokens": tokens, "ignore_eos": True}
        plain = generate(model, PROMPT, draft="none", **options).result().token_ids
        drafted = generate(model, PROMPT, draft="ngram", gamma=5, **options).result()
        same = _common(plain, drafted.token_ids)
        accepted = drafted.stats.accepted
        yield same >= tokens // 2, f"{name}: {same} of {tokens} ids equal with n-gram drafts, {accepted} accepted"
    for name in TINY:
        cpu = load(name, device="cpu", precision="full")
        expected = generate(cpu, PROMPT, draft="none", max_new_tokens=tokens, ignore_eos=True).result().token_ids
        model = models[f"{name} full"]
        got = generate(model, PROMPT, draft="none", max_new_tokens=tokens, ignore_eos=True).result().token_ids
        same = _common(expected, got)
        yield same >= 4, f"{name}: {same} of {tokens} ids as on CPU in float32 (a near tie may part them)"


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- speed --------------------------------------------------------------------------------------------------


def fused_operators(npu: Backend) -> Iterator[Line]:
    """Microseconds of the fused operators and of the two that they replace, captured, for a row and for sixteen."""
    if npu.dtype != torch.bfloat16 or not npu.graphs:
        yield None, "not on this chip"
        return
    x, weight = torch.randn(16, 4096).bfloat16().npu(), torch.ones(4096, dtype=torch.bfloat16).npu()
    gate_up = torch.randn(16, 25600).bfloat16().npu()
    for rows in (1, 16):
        for name in ("fuses_norm_and_quant", "fuses_swiglu_and_quant"):
            times = []
            for fused in (True, False):
                setattr(npu, name, fused)

                def run() -> None:
                    if name == "fuses_norm_and_quant":  # noqa: B023 - called in this round
                        npu.add_rms_norm(x[:rows], x[:rows], weight, 1e-6, DYNAMIC)  # noqa: B023
                    else:
                        npu.swiglu(gate_up[:rows], DYNAMIC)  # noqa: B023

                times.append(_captured_microseconds(npu, run))
            setattr(npu, name, True)
            what = name.removeprefix("fuses_").removesuffix("_and_quant")
            yield None, f"{what} to int8, {rows} rows: fused {times[0]:.1f} us, two operators {times[1]:.1f} us"


def _captured_microseconds(npu: Backend, run: Callable[[], None]) -> float:
    from quasar_npu.graphs import captured

    def twenty() -> None:
        for _ in range(20):
            run()

    twenty()
    with torch.inference_mode():
        graph, _ = captured(twenty)
    graph.replay()
    npu.synchronize()
    clock = time.perf_counter()
    for _ in range(10):
        graph.replay()
    npu.synchronize()
    return (time.perf_counter() - clock) / 200 * 1e6


def speed(name: str, tokens: int, report: Report, trust_remote_code: bool) -> Iterator[Line]:
    """Tokens per second of one sequence."""
    best = 0.0
    for precision, title, options in (
        ("full", "bf16", {"draft": "none"}),
        ("full", "bf16 with n-grams", {"draft": "ngram", "gamma": 5}),
        ("w8a8", "W8A8", {"draft": "none"}),
        ("w8a8", "W8A8 with n-grams", {"draft": "ngram", "gamma": 5}),
        ("w8a8", "Quasar", {}),
    ):
        if report.seconds > SECONDS:
            yield None, f"{title}: left out after {SECONDS} s"
            continue
        model = _loaded(name, precision, trust_remote_code)
        prompt = list(range(1, 65)) if model.tokenizer is None else model.encode(PROMPT)
        settings = {"max_new_tokens": tokens, "ignore_eos": True, **options}
        generate(model, prompt, **settings).result()  # captures
        stats = generate(model, prompt, **settings).result().stats
        best = max(best, stats.tokens_per_second)
        yield (
            None,
            f"{name}, {title}: {stats.tokens_per_second:.1f} tokens/s, {stats.acceptance_length:.2f} tokens per pass",
        )


_kept: dict[tuple[str, str], Model] = {}


def _loaded(name: str, precision: str, trust_remote_code: bool = False) -> Model:
    if (name, precision) not in _kept:
        if name not in TINY:
            _kept.clear()  # two of a size may not fit
        options = {"trust_remote_code": trust_remote_code} if name not in TINY else {}
        _kept[name, precision] = load(name, device="npu", precision=precision, **options)
    return _kept[name, precision]


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m quasar_npu.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="tiny-openpangu", help="whose speed is measured (default: %(default)s)")
    parser.add_argument("--report", type=Path, default=Path("quasar-ascend-report.txt"), help="default: %(default)s")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's tokenizer be Python code")
    args = parser.parse_args(argv)
    try:
        report = Report(args.report)
    except QuasarError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    emulated = os.environ.get("QUASAR_ASCEND_EMULATED") == "1"
    tokens = 16 if emulated else 128
    report.say(None, "Quasar on Ascend: paste this into an issue")
    if emulated:
        report.say(None, "EMULATED: no figure here says anything about an NPU")
    report.section("Environment", lambda: environment(args.model))
    if report.failed:
        report.close()
        return 1
    npu = get_backend("npu")
    report.section("Operators against their formulas", lambda: operators(npu))
    precisions = ("full",) if npu.dtype == torch.float16 else ("full", "w8a8")
    models: dict[str, Model] = {}

    def loading() -> Iterator[Line]:
        for name in TINY:
            for precision in precisions:
                models[f"{name} {precision}"] = _loaded(name, precision)
                yield True, f"{name} in {precision}"

    report.section("Shipped models load", loading)
    report.section("Captured passes", lambda: captured_passes(models))
    report.section("Token ids", lambda: ids(models, tokens))
    report.section("Fused operators or two", lambda: fused_operators(npu))
    report.section("Speed", lambda: speed(args.model, tokens, report, args.trust_remote_code))
    report.say(None, f"\n{'all is right' if not report.failed else f'{report.failed} FAILED'}, {report.seconds:.0f} s")
    report.close()
    print(f"\nthe report is in {args.report}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
