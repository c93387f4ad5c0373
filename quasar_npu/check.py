"""`python -m quasar_npu.check [MODEL]`: is everything there that an NPU run needs? A line each; exit 1 if not.

Called by scripts/run_ascend.sh after it has sourced CANN's environment.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from quasar.errors import QuasarError
from quasar.models.model import find_checkpoint
from quasar_npu.device import import_torch_npu, is_inference_card

_OLDEST_CANN = (8, 1)  # of the published experiments
_OPERATORS = (
    "npu_add_rms_norm_dynamic_quant",
    "npu_quant_matmul",
    "npu_dequant_swiglu_quant",
    "npu_fused_infer_attention_score",
)
_ROOM = 1.2  # memory beside the weights: KV cache, activations, graphs

Finding = tuple[bool, str]  # all right, what to print


def findings(model: str | None) -> Iterator[Finding]:
    """From the package up to the model: later ones are left out where an earlier one makes them meaningless."""
    try:
        import_torch_npu()
    except QuasarError as error:
        yield False, str(error)
        return
    ours, theirs = importlib.metadata.version("torch_npu"), torch.__version__.partition("+")[0]
    same = ours.partition(".post")[0].partition("+")[0] == theirs
    yield same, f"torch {theirs}, torch-npu {ours}" + ("" if same else f": pip install torch-npu=={theirs}")
    import torch_npu

    missing = [name for name in _OPERATORS if not hasattr(torch_npu, name)]
    if missing:
        yield False, f"torch-npu {ours} has no {', '.join(missing)}: pip install torch-npu 2.5.1 or later"
    yield _cann()
    if not torch.npu.is_available():
        yield False, "no NPU is visible: see npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
        return
    # Of the visible ones, the NPU with the most free memory; run_ascend.sh takes it from the line.
    index = max(range(torch.npu.device_count()), key=lambda index: torch.npu.mem_get_info(index)[0])
    soc, (free, total) = torch.npu.get_device_name(index), torch.npu.mem_get_info(index)
    kind = "inference card: static W8A8, float16" if is_inference_card(soc) else "A2 or A3: dynamic W8A8, bfloat16"
    yield True, f"NPU {index}: {soc} ({kind}), {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if model is not None:
        yield _memory(model, index, free)


def cann_version() -> str | None:
    """As CANN's toolkit writes it beside itself, "8.1.RC1"; None where it is not to be found."""
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    if not home:
        return None
    for file in sorted(Path(home).glob("*/ascend_toolkit_install.info")) + sorted(Path(home).glob("version.*")):
        found = re.search(r"^[Vv]ersion=(\S+)", file.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip("[]")
    return None


def _cann() -> Finding:
    if os.environ.get("QUASAR_ASCEND_EMULATED") == "1":
        return True, "CANN: emulated (no figure from here says anything about speed)"
    version = cann_version()
    if version is None:
        return False, "CANN: no version file under ASCEND_TOOLKIT_HOME: install the CANN toolkit and source set_env.sh"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    enough = numbers >= _OLDEST_CANN
    return enough, f"CANN {version}" + ("" if enough else f": install {'.'.join(map(str, _OLDEST_CANN))} or later")


def _memory(model: str, index: int, free: int) -> Finding:
    try:
        folder = find_checkpoint(model)
    except QuasarError as error:
        return False, str(error)
    need = _ROOM * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    line = f"{model} takes about {need / 1e9:.1f} GB in the precision it is stored in"
    enough = need <= free
    return enough, line + ("" if enough else f", NPU {index} has {free / 1e9:.1f} GB free: stop other processes on it")


def run(argv: list[str]) -> int:
    """Arguments: the model, if there is one."""
    good = True
    for right, line in findings(argv[0] if argv else None):
        print(f"{'ok' if right else 'MISSING':8}{line}")
        good = good and right
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
