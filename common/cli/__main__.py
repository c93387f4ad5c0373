"""`python -m common.cli` is `quasar`."""

import sys

from common.cli import main

sys.exit(main())
