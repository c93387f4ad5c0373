"""Quantises a model to W4A16, groups of 32 with zero points, by msModelSlim (run in its environment). Its command line
has no such scheme, its older interface does.

    python msmodelslim_w4a16.py MODEL OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from transformers import AutoModelForCausalLM


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    config = QuantConfig(
        w_bit=4,
        a_bit=16,
        disable_names=["lm_head"],
        dev_type="cpu",
        w_sym=False,
        mm_tensor=False,
        is_lowbit=True,
        open_outlier=False,
        group_size=32,
    )
    calibrator = Calibrator(model, config, calib_data=[], disable_level="L0")
    calibrator.run()
    calibrator.save(str(out), save_type=["ascendV1"])
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, out)


if __name__ == "__main__":
    main()
