"""Checks a Quasar export with the compressed-tensors package's own classes (run where it is installed).

python check_config.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy


def main() -> None:
    written = json.loads((Path(sys.argv[1]) / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    group = config.config_groups["group_0"]
    if written["format"] == "pack-quantized":
        assert group.weights.strategy == QuantizationStrategy.GROUP and group.input_activations is None
    else:
        assert group.weights.strategy == QuantizationStrategy.CHANNEL
        assert group.input_activations.dynamic == (group.input_activations.strategy == QuantizationStrategy.TOKEN)
    # What the class would write holds all that was written, with the same values: nothing was misnamed and dropped.
    again = json.loads(config.model_dump_json())
    again["config_groups"]["group_0"] = json.loads(group.model_dump_json())
    missing = _differences(written, again)
    assert not missing, missing
    print(f"{sys.argv[1]}: compressed-tensors reads its configuration and would write the same")


def _differences(written: dict, again: dict, at: str = "") -> list[str]:
    found = []
    for name, value in written.items():
        other = again.get(name, "absent")
        if isinstance(value, dict) and isinstance(other, dict):
            found += _differences(value, other, f"{at}{name}.")
        elif value != other:
            found.append(f"{at}{name}: {value!r} became {other!r}")
    return found


if __name__ == "__main__":
    main()
