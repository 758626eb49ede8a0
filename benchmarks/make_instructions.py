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
THINGS = words("apples books cards coins eggs flowers keys lemons marbles pens shells stamps stones tickets toys")
TOPICS = words("animal plant food artifact person location body act communication cognition state substance")


def in_words(number: int) -> str:
    """A number from 0 to 99 in English words.

    Example:
        >>> in_words(17), in_words(24)
        ('seventeen', 'twenty-four')
    """
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def arithmetic(drawn: random.Random) -> Iterator[tuple[str, str]]:
    """Sums and differences of numbers from two to twelve, in words."""
    more = (
        "{name} has {first} {things} and gets {second} more. How many {things} has {name} now?",
        "{name} finds {first} {things} in {city} and {second} at home. How many {things} does {name} find?",
    )
    less = (
        "{name} has {first} {things} and gives {second} away. How many {things} has {name} left?",
        "{name} buys {first} {things} in {city} and loses {second}. How many {things} are left?",
    )
    while True:
        told = {"name": drawn.choice(NAMES), "things": drawn.choice(THINGS), "city": drawn.choice(CITIES)}
        low, high = sorted((drawn.randint(2, 12), drawn.randint(2, 12)))
        adds = drawn.random() < 0.5
        numbers = (drawn.sample((low, high), 2)) if adds else (high, low)
        first, second = map(in_words, numbers)
        question = drawn.choice(more if adds else less).format(first=first, second=second, **told)
        yield question, in_words(low + high if adds else high - low)


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
