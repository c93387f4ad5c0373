"""`python -m quasar_npu.check [MODEL]`: is everything there that an NPU run needs? A line each; exit 1 if not.

"ok" is there, "MISSING" has to be installed or freed, "WARN" may do harm and need not. Called by scripts/run_ascend.sh
once CANN's environment is there.
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
from quasar_npu.device import chip_kind, import_torch_npu, is_inference_card

_OLDEST_CANN = (8, 1)  # of the published experiments
_OLDEST_TORCH_NPU = (2, 5, 1)
_OPERATORS = (
    "npu_quant_matmul",
    "npu_dynamic_quant",
    "npu_dequant_swiglu_quant",
    "npu_fused_infer_attention_score",
)
_FUSED_NORM = "npu_add_rms_norm_dynamic_quant"  # from torch_npu 2.6.0.post3 on, which CANN 8.3 brought
_ROOM = 1.2  # memory beside the weights: KV cache, activations, graphs

Finding = tuple[str, str]  # "ok", "WARN" or "MISSING"; what to print


def findings(model: str | None) -> Iterator[Finding]:
    """From the package up to the model: later ones are left out where an earlier one makes them meaningless."""
    try:
        import_torch_npu()
    except QuasarError as error:
        yield "MISSING", str(error)
        return
    yield from _versions()
    yield _cann()
    if not torch.npu.is_available():
        yield "MISSING", "no NPU is visible: see npu-smi info and ASCEND_RT_VISIBLE_DEVICES; in a container: --device"
        return
    memory = {}
    for index in range(torch.npu.device_count()):
        try:
            memory[index] = torch.npu.mem_get_info(index)
        except RuntimeError as error:  # another user's, or one that has failed
            yield "WARN", f"NPU {index} cannot be opened ({_first_line(error)}); the others can be used"
    if not memory:
        yield "MISSING", "no NPU can be opened: npu-smi info shows who uses them"
        return
    # Of the visible ones, the NPU with the most free memory; run_ascend.sh takes it from the line.
    index = max(memory, key=lambda index: memory[index][0])
    soc, (free, total) = torch.npu.get_device_name(index), memory[index]
    if chip_kind(soc) is None:
        yield "MISSING", f"NPU {index}: {soc} is a chip that Quasar does not know (Atlas A2, A3 and 310P are)"
        return
    kind = "inference card: static W8A8, float16" if is_inference_card(soc) else "A2 or A3: dynamic W8A8, bfloat16"
    yield "ok", f"NPU {index}: {soc} ({kind}), {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    yield _kernels(index)
    if model is not None:
        yield _memory(model, index, free)


def _versions() -> Iterator[Finding]:
    import torch_npu

    ours, theirs = importlib.metadata.version("torch_npu"), torch.__version__
    # torch-npu 2.7.1.post2, 2.7.1.dev20250724 and 2.7.1+git are all for torch 2.7.1.
    same = release(ours) == release(theirs)
    line = f"torch {theirs.partition('+')[0]}, torch-npu {ours}"
    if not same:
        yield "MISSING", f"{line}: pip install torch-npu=={'.'.join(map(str, release(theirs)))}"
    elif release(ours) < _OLDEST_TORCH_NPU:
        yield "MISSING", f"{line}: torch and torch-npu 2.5.1 are the oldest that have the operators"
    else:
        yield "ok", line
    missing = [name for name in _OPERATORS if not hasattr(torch_npu, name)]
    if missing:
        yield "MISSING", f"torch-npu {ours} has no {', '.join(missing)}: install 2.10 with CANN 9.1"
    elif not hasattr(torch_npu, _FUSED_NORM):
        yield "WARN", f"torch-npu {ours} has no {_FUSED_NORM}: two operators instead of one, slower; CANN 8.3 brings it"


def release(version: str) -> tuple[int, ...]:
    """The release that a version belongs to: (2, 7, 1) for 2.7.1, 2.7.1.post2, 2.7.1.dev20250724 and 2.7.1+cpu."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


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
        return "ok", "CANN: emulated (no figure from here says anything about speed)"
    version = cann_version()
    if version is None:
        return "WARN", "CANN: no version file under ASCEND_TOOLKIT_HOME; torch-npu loads, so it is there in some form"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST_CANN:
        return "MISSING", f"CANN {version}: install {'.'.join(map(str, _OLDEST_CANN))} or later; 9.1 is best tested"
    return "ok", f"CANN {version}"


def _kernels(index: int) -> Finding:
    """One addition: without CANN's package of kernels torch-npu loads, and every operator fails."""
    try:
        right = (torch.ones(2, device=f"npu:{index}") + 1).tolist() == [2, 2]
    except RuntimeError as error:
        return "MISSING", f"NPU {index} cannot add ({_first_line(error)}): install CANN's kernels (ops) package"
    return ("ok", f"NPU {index} adds") if right else ("MISSING", f"NPU {index} adds wrongly: its driver does not fit")


def _memory(model: str, index: int, free: int) -> Finding:
    try:
        folder = find_checkpoint(model)
    except QuasarError as error:
        return "MISSING", str(error)
    need = _ROOM * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    line = f"{model} takes about {need / 1e9:.1f} GB in the precision it is stored in"
    if need <= free:
        return "ok", line
    return "MISSING", f"{line}, NPU {index} has {free / 1e9:.1f} GB free: stop other processes on it"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def run(argv: list[str]) -> int:
    """Arguments: the model, if there is one."""
    good = True
    for level, line in findings(argv[0] if argv else None):
        print(f"{level:8}{line}", flush=True)
        good = good and level != "MISSING"
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
