"""``python -m pave_lightning`` is the command ``pave``."""

import sys
from pathlib import Path

# Python looks for imports in the current folder first; what lies there by chance, or by intent, is not to be run.
if not sys.flags.safe_path and sys.path[0] == str(Path.cwd()) != str(Path(__file__).resolve().parents[1]):
    del sys.path[0]

from pave_lightning.cli import program

program()
