"""`python -m quasar` is `quasar`."""

import sys

from quasar.cli import main

sys.exit(main())
