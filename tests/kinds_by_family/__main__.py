"""Walk through all families and write the page's table anew; through some, named in full, to look."""

import sys
import tempfile
from pathlib import Path

from kinds_by_family.bases import FAMILIES
from kinds_by_family.matrix import line, walk, write

if __name__ == "__main__":
    wanted = sys.argv[1:]
    lines = []
    for family in wanted or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(family, walk(family, Path(folder))))
            print(lines[-1], flush=True)  # noqa: T201
    if not wanted:
        write(lines)
