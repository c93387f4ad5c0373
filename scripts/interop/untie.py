"""Writes a copy of a checkpoint whose lm_head is a tensor of its own: msModelSlim does not take tied embeddings.

python untie.py MODEL OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(fields))
    for path in out.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
