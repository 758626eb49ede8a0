"""Tasks that are known by name: three shipped suites, and those of GLUE and CLIP on the hub or in a folder."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pave_lightning.errors import nearest
from pave_lightning.tasks.clip_suite import CLIP_TASKS

POCKET_FOLDER = Path(__file__).parents[1] / "tasks" / "pocket"

# Named by package, not by path, so that a resolved recipe means the same wherever the package is installed.
_POCKET_DATA = "package:pave_lightning/tasks/pocket"

TOPICS = [
    *("animal", "plant", "food", "artifact", "person", "location"),
    *("body", "act", "communication", "cognition", "state", "substance"),
]

_POCKET: dict[str, dict[str, Any]] = {
    "movie": {"text": ["text"], "classes": ["negative", "positive"], "metrics": ["accuracy"]},
    "tweet": {"text": ["text"], "classes": ["negative", "positive"], "metrics": ["accuracy"]},
    "editorial": {"text": ["text"], "kind": "regression", "value_range": [-4.0, 4.0]},
    "acceptability": {"text": ["text"], "classes": ["disturbed", "acceptable"], "metrics": ["matthews", "accuracy"]},
    "topic": {"text": ["text"], "classes": TOPICS, "metrics": ["accuracy", "macro_f1"]},
    "isa": {
        "text": ["text_a", "text_b"],
        "classes": ["a_is_a_b", "b_is_a_a", "neither"],
        "metrics": ["accuracy"],
    },
    "sense": {"text": ["text_a", "text_b"], "classes": ["wrong", "fitting"], "metrics": ["accuracy", "f1"]},
    "similarity": {"text": ["text_a", "text_b"], "kind": "regression", "value_range": [0.0, 5.0]},
}

INSTRUCTIONS_FOLDER = POCKET_FOLDER.with_name("instructions")
_INSTRUCTIONS_DATA = "package:pave_lightning/tasks/instructions"
# What a language model is asked, and the most tokens of what it is to answer.
_INSTRUCTIONS = {"arithmetic": 16, "definition": 8, "order": 24, "record": 40}

IMAGES_FOLDER = POCKET_FOLDER.with_name("pocket_images")
_IMAGES_DATA = "package:pave_lightning/tasks/pocket_images"
# Tasks on images of 32 x 32 pixels, and their classes.
_IMAGES: dict[str, list[str]] = {
    "digit": list("0123456789"),
    "letter": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "style": ["regular", "bold", "italic", "bold_italic"],
    "script": [
        *("latin", "greek", "cyrillic", "hebrew", "arabic", "devanagari"),
        *("bengali", "tamil", "thai", "georgian", "armenian", "ethiopic"),
    ],
    "emoji": ["smiley", "person", "nature", "food", "place", "activity", "object", "symbol"],
    "animal": [
        *("bee", "butterfly", "camel", "crab", "duck", "eagle", "flamingo", "fox", "hamster", "horse", "kangaroo"),
        *("koala", "ladybug", "lion", "lizard", "octopus", "owl", "peacock", "scorpion", "shark", "snail", "squid"),
        *("swan", "wolf"),
    ],
    "flag": [
        *("ar", "au", "br", "ca", "ch", "cn", "cu", "dk", "et", "fr", "gb", "gr"),
        *("in", "it", "jm", "jp", "ke", "kr", "np", "se", "tr", "ua", "us", "za"),
    ],
}

# CLIP's sets have a test split with labels, and a tenth of the training split validates.
_CLIP_SPLITS = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}

# The test split of GLUE has no labels, so the validation split is reported and a tenth of the training split validates.
_GLUE_SPLITS = {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}
_GLUE: dict[str, dict[str, Any]] = {
    "cola": {"text": ["sentence"], "classes": ["unacceptable", "acceptable"], "metrics": ["matthews", "accuracy"]},
    "sst2": {"text": ["sentence"], "classes": ["negative", "positive"], "metrics": ["accuracy"]},
    "mrpc": {
        "text": ["sentence1", "sentence2"],
        "classes": ["not_equivalent", "equivalent"],
        "metrics": ["accuracy", "f1"],
    },
    "stsb": {"text": ["sentence1", "sentence2"], "kind": "regression", "value_range": [0.0, 5.0]},
    "qqp": {
        "text": ["question1", "question2"],
        "classes": ["not_duplicate", "duplicate"],
        "metrics": ["accuracy", "f1"],
    },
    "mnli": {
        "text": ["premise", "hypothesis"],
        "classes": ["entailment", "neutral", "contradiction"],
        "metrics": ["accuracy"],
    },
    "qnli": {"text": ["question", "sentence"], "classes": ["entailment", "not_entailment"], "metrics": ["accuracy"]},
    "rte": {"text": ["sentence1", "sentence2"], "classes": ["entailment", "not_entailment"], "metrics": ["accuracy"]},
}


def suite_task_names() -> list[str]:
    """Every task that a recipe can use by name."""
    suites: dict[str, Iterable[str]] = {
        "pocket": _POCKET,
        "images": _IMAGES,
        "instructions": _INSTRUCTIONS,
        "glue": _GLUE,
        "clip": CLIP_TASKS,
    }
    return [f"{suite}/{name}" for suite, tasks in suites.items() for name in tasks]


def known_data(known: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The data of a known task with a recipe's changes; a folder of one's own stands in place of the hub.

    Args:
        known: ``data`` of `suite_task`.
        own: the keys that a recipe gives itself.
    """
    from_hub = ("hub", "revision") if own.get("folder") is not None and own.get("hub") is None else ()
    return {**{key: value for key, value in known.items() if key not in from_hub}, **own}


def suite_task(name: str) -> dict[str, Any]:
    """The task of a suite, as a recipe would spell it out.

    Args:
        name: suite and task, such as ``pocket/movie`` or ``glue/sst2``.

    Raises:
        ValueError: no suite has a task of that name; the message names the nearest one.
    """
    suite, _, task = name.partition("/")
    if suite == "pocket" and task in _POCKET:
        splits = {split: f"{_POCKET_DATA}/{task}/{split}.parquet" for split in ("train", "validation", "test")}
        return {"name": task, "data": splits, **_POCKET[task]}
    if suite == "instructions" and task in _INSTRUCTIONS:
        splits = {split: f"{_INSTRUCTIONS_DATA}/{task}/{split}.parquet" for split in ("train", "validation", "test")}
        return {"name": task, "data": splits, "kind": "causal_lm", "max_new_tokens": _INSTRUCTIONS[task]}
    if suite == "images" and task in _IMAGES:
        splits = {split: f"{_IMAGES_DATA}/{task}/{split}.parquet" for split in ("train", "validation", "test")}
        return {"name": task, "data": splits, "kind": "image_classification", "classes": _IMAGES[task]}
    if suite == "glue" and task in _GLUE:
        splits = dict(_GLUE_SPLITS)
        if task == "mnli":
            splits["test"] = "validation_matched"
        return {"name": task, "data": {"hub": "nyu-mll/glue", "config": task, **splits}, **_GLUE[task]}
    if suite == "clip" and task in CLIP_TASKS:
        known = copy.deepcopy(CLIP_TASKS[task])
        return {**known, "name": task, "kind": "zero_shot_image", "data": {**_CLIP_SPLITS, **known["data"]}}
    raise ValueError(f"unknown task '{name}': {nearest(name, suite_task_names())}")
