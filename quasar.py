"""`import quasar` without installing: the package in common/, which pyproject.toml installs as `quasar`."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).parent / "common"
_spec = spec_from_file_location("quasar", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
sys.modules["quasar"] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["quasar"])

if __name__ == "__main__":  # python -m quasar
    from quasar.cli import main

    sys.exit(main())
