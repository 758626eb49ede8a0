"""Makes the suite of instructions: prompts and responses by rule, and from its definitions.

    python benchmarks/make_instructions.py pave_lightning/tasks/instructions

Every row is drawn once, with a fixed seed, and no prompt stands in two splits of a task.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SIZES = {"train": 2000, "validation": 200, "test": 400}
SEED = 0


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
NAMES = words(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kira Liam Mia Noah Olga Paul Quinn Rosa Sam Tina Uma Victor "
    "Wendy Xavier Yara Zoe Amir Bella Carlos Dina Erik Fatima Goran Hana Ivan Julia Kofi Lena Marco Nadia"
)
CITIES = words(
    "Oslo Lima Cairo Paris Tokyo Delhi Quito Rome Berlin Madrid Dublin Vienna Prague Athens Lisbon Warsaw Nairobi "
    "Accra Seoul Hanoi Manila Sydney Boston Denver Austin Toronto Havana Bogota Zagreb Riga"
)
WORDS = words(
    "apple bread chair dance eagle flame grape house island jacket kite lemon music night ocean piano queen river "
    "stone table umbrella violin window yellow zebra anchor bridge candle desert engine forest garden hammer insect "
    "jungle kettle ladder market needle orange pencil rabbit silver tiger valley wagon butter copper dragon elbow"
)
TOPICS = words("animal plant food artifact person location body act communication cognition state substance")


def in_words(number: int) -> str:
    """A number from 0 to 199 in English words.

    Example:
        >>> in_words(117), in_words(40)
        ('one hundred seventeen', 'forty')
    """
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" {in_words(rest)}" if rest else "")
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def arithmetic(drawn: random.Random) -> Iterator[tuple[str, str]]:
    """Sums and differences of numbers below one hundred, in words."""
    while True:
        low, high = sorted((drawn.randrange(100), drawn.randrange(100)))  # so that no sum stands in two orders
        if drawn.random() < 0.5:
            yield f"What is {in_words(high)} plus {in_words(low)}?", in_words(high + low)
        else:
            yield f"What is {in_words(high)} minus {in_words(low)}?", in_words(high - low)


def record(drawn: random.Random) -> Iterator[tuple[str, str]]:
    """A sentence about a person, and what it says as JSON."""
    forms = (
        "{name} is {age} years old and lives in {city}.",
        "{name} from {city} is {age}.",
        "At the age of {age}, {name} moved to {city}.",
        "In {city} lives {name}, aged {age}.",
    )
    while True:
        told = {"name": drawn.choice(NAMES), "age": drawn.randrange(18, 90), "city": drawn.choice(CITIES)}
        yield f"Write as JSON: {drawn.choice(forms).format(**told)}", json.dumps(told)


def order(drawn: random.Random) -> Iterator[tuple[str, str]]:
    """Words to be put into alphabetical order."""
    seen = set[str]()
    while True:
        asked = drawn.sample(WORDS, drawn.randint(3, 4))
        if ", ".join(sorted(asked)) in seen:  # or else the same words would stand in two splits, in two orders
            continue
        seen.add(", ".join(sorted(asked)))
        yield f"Sort by the alphabet: {', '.join(asked)}", ", ".join(sorted(asked))


def definition(drawn: random.Random) -> Iterator[tuple[str, str]]:
    """A dictionary definition, and which kind of thing it is of; from the pocket suite's task ``topic``."""
    pocket = Path(__file__).parents[1] / "pave_lightning" / "tasks" / "pocket" / "topic"
    rows = [row for split in SIZES for row in pq.read_table(pocket / f"{split}.parquet").to_pylist()]
    drawn.shuffle(rows)
    for row in rows:
        yield f"Which kind of thing is this: {row['text']}?", TOPICS[row["label"]]


MAKERS = {"arithmetic": arithmetic, "definition": definition, "order": order, "record": record}


def main(folder: Path) -> None:
    """Write ``TASK/SPLIT.parquet`` below a folder."""
    for name, make in MAKERS.items():
        rows, made = dict[str, str](), make(random.Random(SEED))
        while len(rows) < sum(SIZES.values()):
            prompt, response = next(made)
            rows.setdefault(prompt, response)
        prompts, start = list(rows), 0
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, size in SIZES.items():
            part = prompts[start : start + size]
            table = pa.table({"prompt": part, "response": [rows[prompt] for prompt in part]})
            pq.write_table(table, folder / name / f"{split}.parquet", compression="zstd")
            start += size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
