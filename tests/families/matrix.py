"""What a walk through a family comes to, and the page that shows it."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pave_lightning.weights.coverage import reason_lines

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = (
    "| family | model | capture | purify | merge | reload | merged, but not purified |\n|---|---|---|---|---|---|---|"
)


@dataclass
class Row:
    """What was done with a family; every walk checks it before it is told.

    Attributes:
        model: what was walked through, in a word.
        captured: for each kind of layer how many were captured.
        layers: how many layers multiply with a matrix.
        purified: how many of these were purified.
        merged: how many weights were merged.
        apart: names of stored tensors that are not merged -> what is done with them.
        reload: with what the merged model was loaded again.
        left: names of weights that purification does not reach -> the reason.
    """

    model: str
    captured: dict[str, int]
    layers: int
    purified: int
    merged: int
    apart: dict[str, str]
    reload: str
    left: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """The cells of the row, as the page shows them."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.captured.items()))
        apart = Counter(self.apart.values())
        merged = [f"{self.merged} weights", *(f"{count} {what}" for what, count in apart.items())]
        left = "; ".join(re.sub(r"([\w.*]*[._*][\w.*]*)", r"`\1`", line) for line in reason_lines(self.left))
        return [
            self.model,
            kinds,
            f"{self.purified} of {self.layers} layers",
            "; ".join(merged),
            f"{self.reload}: same outputs",
            left or "nothing",
        ]


def line(name: str, row: Row) -> str:
    """One line of the table."""
    return f"| {' | '.join([name, *row.cells()])} |"


def shown() -> dict[str, str]:
    """The lines of the page's table, by the name of the family."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    return {text.split("|")[1].strip(): text for text in table}


def write(lines: list[str]) -> None:
    """Put a table into the page in place of the one that is there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = "\n".join([BEGIN, HEADER, *lines, END])
    PAGE.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
