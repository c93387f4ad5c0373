"""Writes a configuration for msmodelslim: python msmodelslim_config.py dynamic|static|mix OUT.yaml"""

from __future__ import annotations

import sys
from pathlib import Path

from quasar.export.msmodelslim import tool_config

if __name__ == "__main__":
    kind, out = sys.argv[1:]
    Path(out).write_text(tool_config({"dynamic": {"is_dynamic": True}, "mix": {"pdmix": True}}.get(kind, {})))
