"""The suite of instructions: right responses, no row in two splits, its licence beside it."""

import json
import re

import pyarrow.parquet as pq
import pytest

from pave_lightning.system.files import local_path
from pave_lightning.tasks.data import SPLITS, check_task
from pave_lightning.tasks.suites import INSTRUCTIONS_FOLDER, suite_task, suite_task_names
from pave_lightning.tasks.task import Task

NAMES = [name for name in suite_task_names() if name.startswith("instructions/")]
SIZES = {"train": 2000, "validation": 200, "test": 400}
SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number(words):
    """The number that words spell, read from the left."""
    found = 0
    for word in re.split("[ -]", words):
        found += SMALL.index(word) if word in SMALL else 10 * TENS.index(word)
    return found


def rows_of(name):
    task = Task.model_validate(suite_task(name))
    return {split: pq.read_table(local_path(getattr(task.data, split))).to_pylist() for split in SPLITS}


def all_rows(name):
    return [row for rows in rows_of(f"instructions/{name}").values() for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_the_data_is_without_fault_and_no_prompt_stands_twice(name, tmp_path):
    assert check_task(Task.model_validate(suite_task(name)), seed=0, cache_dir=tmp_path) == []
    rows = rows_of(name)
    assert {split: len(own) for split, own in rows.items()} == SIZES
    prompts = [row["prompt"] for own in rows.values() for row in own]
    assert len(set(prompts)) == len(prompts)


def test_sums_are_right():
    for row in all_rows("arithmetic"):
        one, other = (number(word) for word in re.findall(r"[a-z-]+", row["prompt"]) if word in SMALL)
        gets = any(word in row["prompt"] for word in (" gets ", " finds "))
        assert number(row["response"]) == (one + other if gets else one - other)


def test_words_are_sorted_and_sets_of_them_stand_once():
    seen = set()
    for row in all_rows("order"):
        words = row["prompt"].removeprefix("Sort by the alphabet: ").split(", ")
        assert row["response"] == ", ".join(sorted(words))
        assert frozenset(words) not in seen
        seen.add(frozenset(words))


def test_records_say_what_the_sentence_does():
    for row in all_rows("record"):
        found = json.loads(row["response"])
        assert list(found) == ["name", "age", "city"]
        assert all(re.search(rf"\b{value}\b", row["prompt"]) for value in found.values())


def test_definitions_are_of_twelve_kinds():
    assert len({row["response"] for row in all_rows("definition")}) == 12
    assert "Copyright 2006 by Princeton University" in (INSTRUCTIONS_FOLDER / "LICENSE-wordnet").read_text()
    assert all(name.split("/")[1] in (INSTRUCTIONS_FOLDER / "README.md").read_text() for name in NAMES)
