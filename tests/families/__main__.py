"""Walk through all families and write the page's table anew; through some, named by the start of a name, to look."""

import sys
import tempfile
import traceback
from pathlib import Path

from families.matrix import line, write
from families.registry import FAMILIES

if __name__ == "__main__":
    wanted = tuple(sys.argv[1:])
    chosen = [family for family in FAMILIES if not wanted or family.name.startswith(wanted)]
    lines, failed = [], []
    for family in chosen:
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines.append(line(family.name, family.walk(Path(folder))))
                print(lines[-1])  # noqa: T201
            except Exception:
                failed.append(family.name)
                print(f"{family.name}:\n{traceback.format_exc()}")  # noqa: T201
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")
    if not wanted:
        write(lines)
