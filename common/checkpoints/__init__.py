"""Checkpoint formats, one file each: what is on disk -> the tensors of each layer, and back.

Reading never needs the packages of those who wrote: a folder is config.json, JSON beside it, and safetensors; a GGUF
file is all in one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from quasar.checkpoints.ascend import AscendFolder, AscendWriter, find_description
from quasar.checkpoints.compressed_tensors import CompressedTensorsFolder, CompressedTensorsWriter
from quasar.checkpoints.folder import SafetensorsFolder, read_json
from quasar.checkpoints.gguf import GGUFSource, open_gguf
from quasar.errors import QuasarError

__all__ = ["WRITERS", "GGUFSource", "SafetensorsFolder", "open_checkpoint"]

WRITERS = {writer.format: writer for writer in (CompressedTensorsWriter, AscendWriter)}


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> SafetensorsFolder | GGUFSource:
    """The reader for what the folder holds, or a GGUF file, whose blocks are dequantised to dtype. Raises QuasarError
    on formats that Quasar does not read."""
    if folder.is_file():
        return GGUFSource(open_gguf(folder), dtype)
    description = find_description(folder)
    if description is not None:
        return AscendFolder(folder, description)
    path = folder / "config.json"
    fields = read_json(path)
    # llm-compressor once wrote the second name.
    quantization = fields.get("quantization_config", fields.get("compression_config"))
    if quantization is None:
        return SafetensorsFolder(folder)
    if not isinstance(quantization, dict):
        raise QuasarError(f"{path}: quantization_config is {quantization!r}; it should be an object")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise QuasarError(
            f"{path}: quant_method {method!r} is not supported; Quasar reads compressed-tensors (W8A8), msModelSlim's "
            "quant_model_description.json, and unquantised checkpoints"
        )
    return CompressedTensorsFolder(folder, quantization)
