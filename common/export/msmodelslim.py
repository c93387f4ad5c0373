"""`quasar quantize --engine msmodelslim`: Huawei's own tool does the work, in the Ascend format."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from quasar.checkpoints import read_json
from quasar.errors import QuasarError
from quasar.export.model_card import model_card
from quasar.export.settings import ExportSettings
from quasar.export.workspace import refuse_existing
from quasar.loading import load, require_agreement
from quasar.models.config import read_config
from quasar.models.model import ASSETS, LoadOptions, find_checkpoint
from quasar.quantization.calibration import read_texts
from quasar.quantization.fidelity import Fidelity, FidelityProbe

# The tool's names of its adapters; one serves every dense Qwen3.
_MODEL_TYPES = {"Qwen3ForCausalLM": "Qwen3-14B"}
# Its smoothing (m4) and calibration set for dense Qwen3, on every layer but lm_head.
_CONFIG = {
    "apiversion": "modelslim_v0",
    "metadata": {
        "config_id": "quasar",
        "score": 90,
        "verified_model_types": ["Qwen3-14B"],
        "label": {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False},
    },
    "spec": {
        "anti_cfg": {"anti_method": "m4"},
        "calib_cfg": {"w_bit": 8, "a_bit": 8, "mm_tensor": False, "disable_names": ["lm_head"]},
        "calib_params": {"disable_level": "L0"},
        "calib_dataset": "mix_calib.jsonl",
        "calib_save_params": {"part_file_size": 4},
    },
}


def quantize_with_msmodelslim(
    model: str, output: Path, scheme: str, options: LoadOptions, force: bool = False, command: str = ""
) -> Fidelity:
    """Has the installed msmodelslim quantise `model` into the new folder `output`, and measures the result.

    scheme "w8a8" makes W8A8_DYNAMIC, "w8a8-static" W8A8. Raises QuasarError where the tool is not installed, does not
    know the architecture, or fails.
    """
    refuse_existing(output)
    tool = shutil.which("msmodelslim")
    if tool is None:
        raise QuasarError(
            "--engine msmodelslim: no msmodelslim on the PATH; pip install msmodelslim in an environment of its own "
            "and put its bin folder on the PATH"
        )
    folder = find_checkpoint(model, options.trust_remote_code)
    if folder.is_file():
        raise QuasarError(f"--engine msmodelslim: {model} is a GGUF file; the tool reads folders, use --engine quasar")
    config = read_config(folder)
    if config.architecture not in _MODEL_TYPES:
        raise QuasarError(f"--engine msmodelslim: the tool does not know {config.architecture}; use --engine quasar")
    if config.tie_word_embeddings:
        raise QuasarError("--engine msmodelslim: the tool fails on tied embeddings; use --engine quasar")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise QuasarError(f"--output {output}: cannot be made ({error.strerror})") from None
    try:
        made = scratch / "made"
        _run(tool, _MODEL_TYPES[config.architecture], _stage(folder, scratch / "model"), made, scheme, options)
        for path in made.glob("*best_practice.yaml"):
            path.unlink()
        full = load(str(folder), device=options.device, dtype=options.dtype, precision="full")
        sequences = [full.encode(text) for text in read_texts(ASSETS / "heldout.jsonl")]
        probe = FidelityProbe(full.decoder, sequences)
        del full
        fidelity = probe.compare(load(str(made), device=options.device, dtype=options.dtype).decoder)
        require_agreement(model, fidelity, force=force)
        settings = ExportSettings("ascend", scheme)
        smoothing = f"msmodelslim, anti_method {_CONFIG['spec']['anti_cfg']['anti_method']}"
        calibrated = f"msmodelslim's {_CONFIG['spec']['calib_dataset']}"
        card = model_card(model, folder, settings, fidelity, command, smoothing, calibrated)
        (made / "README.md").write_text(card, encoding="utf-8")
        made.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return fidelity


def tool_config(calib_cfg: dict[str, bool]) -> str:
    """The tool's configuration file, with more fields for its calib_cfg: is_dynamic, pdmix."""
    spec = _CONFIG["spec"]
    return json.dumps(_CONFIG | {"spec": spec | {"calib_cfg": spec["calib_cfg"] | calib_cfg}})  # JSON is YAML


def _stage(folder: Path, staged: Path) -> Path:
    """A copy of the checkpoint as the tool wants it: real files that others may not write, older names in its JSON."""
    staged.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            target = staged / path.name
            try:
                target.hardlink_to(path.resolve())
                if target.stat().st_mode & 0o022:
                    raise PermissionError
            except OSError:
                target.unlink(missing_ok=True)
                shutil.copyfile(path, target)
                target.chmod(0o644)
    for name, changes in (
        ("config.json", lambda f: {"torch_dtype": f.get("torch_dtype") or f.get("dtype")}),
        # transformers 5 writes a class that the tool's transformers does not have.
        ("tokenizer_config.json", lambda f: {"tokenizer_class": _known_class(f.get("tokenizer_class"))}),
    ):
        fields = read_json(staged / name)
        (staged / name).unlink()  # it may be a link to the user's own
        (staged / name).write_text(json.dumps(fields | changes(fields)), encoding="utf-8")
    staged.chmod(0o755)
    return staged


def _known_class(name: str | None) -> str | None:
    return "PreTrainedTokenizerFast" if name in ("TokenizersBackend", None) else name


def _run(tool: str, model_type: str, model: Path, made: Path, scheme: str, options: LoadOptions) -> None:
    path = made.parent / "config.yaml"
    path.write_text(tool_config({"is_dynamic": True} if scheme == "w8a8" else {}), encoding="utf-8")
    path.chmod(0o644)
    device = "npu" if options.device.startswith("npu") else "cpu"
    command = [tool, "quant", "--model_type", model_type, "--model_path", str(model.resolve())]
    command += ["--save_path", str(made.resolve()), "--device", device, "--config_path", str(path.resolve())]
    command += ["--trust_remote_code", str(options.trust_remote_code)]
    # It asks before it goes on with an untested transformers.
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, check=False)
    if done.returncode or not (made / "quant_model_description.json").exists():
        lines = [line.strip() for line in done.stderr.splitlines() + done.stdout.splitlines() if "Error" in line]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise QuasarError(f"--engine msmodelslim: the tool failed ({reason[:300]})")
