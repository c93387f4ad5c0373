"""Peak memory of loading, quantising and generating, each precision in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from quasar.errors import QuasarError

PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Footprint:
    """MiB: the process's peak after each stage, and the weights with the embedding among them."""

    precision: str
    imports: float
    load: float
    quantise: float | None
    generate: float
    weights: float


def measure(model: str, precision: str, lm_head: str, device: str, tokens: int) -> Footprint:
    """Runs the stages in a new process. Raises QuasarError with what it said where it failed."""
    code = "from quasar.evaluation.footprint import _measure_here; _measure_here()"
    arguments = [model, precision, lm_head, device, str(tokens)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise QuasarError(last.removeprefix("quasar.errors.QuasarError: "))
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _peak_mib() -> float:
    """Largest resident memory of this process so far. Not ru_maxrss: a child inherits that from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _measure_here() -> None:
    """Prints the Footprint of this process, as JSON."""
    from quasar.generation import generate
    from quasar.loading import load, quantize

    name, precision, lm_head, device, tokens = sys.argv[1:]
    imports = _peak_mib()
    model = load(name, device=device, precision="auto" if precision == "auto" else "full")
    loaded, quantised = _peak_mib(), None
    if precision not in ("auto", "full"):
        quantize(model, precision=precision, lm_head=lm_head)
        quantised = _peak_mib()
    prompt = [i % model.config.vocab_size for i in range(PROMPT_TOKENS)]
    generate(model, prompt, max_new_tokens=int(tokens), ignore_eos=True).result()
    weights = model.decoder.weight_bytes_per_pass + model.decoder.embedding.nbytes
    print(json.dumps(asdict(Footprint(precision, imports, loaded, quantised, _peak_mib(), weights / 2**20))))
