"""``python -m pave_lightning`` is the command ``pave``."""

import sys

from pave_lightning.cli import main

sys.exit(main())
