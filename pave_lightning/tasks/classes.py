"""Classes by name: how recipes write them, how configurations name them, and whether the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from pave_lightning.tasks.heads import Misfit
from pave_lightning.tasks.options import MOST_CLASSES

# Names of classes in the order of their indices.
ClassNames = Annotated[list[str], Field(min_length=2)]


def class_list(raw: Any) -> Any:
    """The options of a task with its classes as a list of texts, where they are their number, or no texts."""
    if not isinstance(raw, dict):
        return raw
    if raw.get("classes") is None:
        return {key: value for key, value in raw.items() if key != "classes"}
    classes = raw["classes"]
    if isinstance(classes, int) and not isinstance(classes, bool) and classes <= MOST_CLASSES:
        classes = [str(index) for index in range(classes)]
    if isinstance(classes, list):
        return {**raw, "classes": [_class_name(name) for name in classes]}
    return raw


def _class_name(name: Any) -> Any:
    """A class that is called true or 1, which YAML takes for something else than a text."""
    if isinstance(name, bool):
        return "true" if name else "false"
    return str(name) if isinstance(name, int | float) else name


def class_contradictions(kind: str, classes: Sequence[str], metrics: Sequence[str]) -> Iterator[str]:
    """What does not go together in the classes and metrics of a task of some kind."""
    if not classes:
        yield f"a {kind} task needs 'classes': their number, or their names in index order"
    if "f1" in metrics and len(classes) > 2:
        yield "'f1' is for two classes; for more use 'macro_f1'"
    if len(set(classes)) != len(classes):
        yield "the names in 'classes' must differ"


def classifier_config(classes: Sequence[str]) -> dict[str, Any]:
    """The part of a model's configuration that describes a head with these classes."""
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def head_misfits(asked: Mapping[str, Any], config: Any) -> Iterator[Misfit]:
    """What a configuration says of its head that is not what is asked: its kind of problem, its number of outputs.

    Args:
        asked: the part of a configuration that describes the head.
        config: an expert's configuration, as transformers reads it.
    """
    kind = asked.get("problem_type")
    if kind is not None and config.problem_type not in (None, kind):
        yield Misfit(f"config.json has the problem_type {config.problem_type}, and the task is {kind}", "problem_type")
    outputs = len(named_classes(config))
    if outputs != asked["num_labels"]:
        yield Misfit(f"its head has {outputs} outputs, but the task needs {asked['num_labels']}")


def class_misfits(
    classes: Sequence[str], asked: Mapping[str, Any], config: Any, written: Mapping[str, Any]
) -> Iterator[Misfit]:
    """As `head_misfits`, and what it says of its classes: other ones, or the same in another order.

    Args:
        classes: the task's classes, in index order.
        asked: the part of a configuration that describes the head.
        config: an expert's configuration, as transformers reads it.
        written: the configuration as its file has it.
    """
    from pave_lightning.tasks.labels import match_names

    yield from head_misfits(asked, config)
    names = named_classes(config)
    if not _tells(names):
        return
    noted = _noted_indices(written)
    wrong = [name for name, index in noted.items() if match_names([name], names)[0] not in (None, index)]
    if wrong:
        yield Misfit(
            f"config.json contradicts itself: label2id gives {wrong[0]!r} the index {noted[wrong[0]]}, id2label "
            f"{match_names(wrong[:1], names)[0]}",
            "label2id",
        )
    if len(names) != len(classes):
        return
    matched = match_names(names, classes)
    if _tells(classes) and sorted(index for index in matched if index is not None) != list(range(len(classes))):
        yield Misfit(f"its head has the classes {names} (id2label), and the task {list(classes)}", "id2label")
    if any(place not in (None, index) for index, place in enumerate(matched)):
        # Not to be accepted: to take the outputs as they are would exchange classes.
        yield Misfit(
            f"its head has the classes in the order {names}, the task in the order {list(classes)}; write the task's "
            "classes in the head's order"
        )


def named_classes(config: Any) -> list[str]:
    """The names of a head's outputs, in index order."""
    named = config.id2label or {}
    return [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]


def _tells(names: Sequence[str]) -> bool:
    """Whether names say anything: not where they only number the classes, in order."""
    numbered = [{str(index), f"label_{index}", f"label{index}"} for index in range(len(names))]
    return not all(name.strip().casefold() in plain for name, plain in zip(names, numbered, strict=True))


def _noted_indices(written: Mapping[str, Any]) -> dict[str, int]:
    """``label2id`` as the file has it; transformers leaves names that it makes up itself."""
    found = written.get("label2id")
    whole = isinstance(found, dict) and all(isinstance(index, int) for index in found.values())
    return {str(name): index for name, index in found.items()} if isinstance(found, dict) and whole else {}
