"""How the checkout becomes packages: `quasar` out of common/, installed or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_folder_with_code_is_installed() -> None:
    names = {"common": "quasar", "quasar_gpu": "quasar_gpu", "quasar_npu": "quasar_npu"}
    folders = {
        ".".join([name, *path.parent.relative_to(ROOT / top).parts])
        for top, name in names.items()
        for path in (ROOT / top).rglob("*.py")
    }
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.split("packages = [")[1].split("]")[0].replace('"', "").replace(",", " ").split()
    assert sorted(folders) == sorted(listed)


def test_a_bare_checkout_imports_quasar_and_common() -> None:
    code = "import quasar, common, quasar_gpu; assert common.load is quasar.load"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    assert subprocess.run(command, cwd="/", check=False).returncode == 0
