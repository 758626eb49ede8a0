"""Walk through all families and write the page's table anew."""

import tempfile
from pathlib import Path

from families.matrix import line, write
from families.registry import FAMILIES

if __name__ == "__main__":
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(family.name, family.walk(Path(folder))))
        print(lines[-1])  # noqa: T201
    write(lines)
