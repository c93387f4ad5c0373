"""Runs the commands behind the tables of a document and puts their output in: what stands between
`<!-- run: COMMAND -->` and `<!-- end -->` is replaced.

    python scripts/update_docs.py docs/drafting.md [words of the commands to run; default: all]
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

_BLOCK = re.compile(r"<!-- run: (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def output(command: str) -> str:
    """Standard output; `quasar` and `python` are those of this interpreter. A command that fails ends the script."""
    words = shlex.split(command)
    words = [sys.executable, "-m", "quasar.cli", *words[1:]] if words[0] == "quasar" else [sys.executable, *words[1:]]
    print(f"$ {command}", file=sys.stderr)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main(path: Path, wanted: list[str]) -> None:
    def replaced(block: re.Match[str]) -> str:
        command = block[1]
        if wanted and not any(word in command for word in wanted):
            return block[0]
        return f"<!-- run: {command} -->\n{output(command)}\n<!-- end -->"

    path.write_text(_BLOCK.sub(replaced, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
