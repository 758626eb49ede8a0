"""Adding one expert to a merged model, without the experts that are in it already."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pave_lightning.errors import PaveError, Problems
from pave_lightning.experts.loading import load_tokenizer
from pave_lightning.merging import Evidence, Need, SequentialMethod, make_method, method_named, methods
from pave_lightning.merging.folders import MergeContext, load_gradients, load_kept, merged_facts, write_merged
from pave_lightning.recipe import NAME_PATTERN
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, locate_model, model_digest
from pave_lightning.weights.adapters import ADAPTER_CONFIG
from pave_lightning.weights.task_vectors import config_differences

ALREADY_MERGED = "(merged)"


def add_expert(
    merged: str | Path, task: str, expert: str, output: str | Path, fisher: str | Path | None = None
) -> Path:
    """Merge one more expert into a model that a sequential rule has merged (see `SequentialMethod`).

    Args:
        merged: folder of the merged model, as `write_merged` left it; it stays as it is.
        task: name of the new expert's task.
        expert: folder or hub id of the new expert, a sequence-classification checkpoint of the same base.
        output: folder of the result; it must not exist.
        fisher: for rules that need it, the new expert's Fisher information: a file of `TaskGradients`, or the folder
            ``gradients/fisher-TASK`` that a recipe left.

    Returns:
        The folder of the result, with the heads of all tasks.

    Raises:
        PaveError: the folder is no merged model, or of a rule that cannot take in experts later; the task is in it
            already; the expert or its Fisher information does not fit the base; ``output`` exists.
    """
    merged, output = Path(merged), Path(output)
    facts = merged_facts(merged)
    heads = merged / "heads"
    _check_request(merged, facts, task, output)
    _check_fisher(str(facts["method"]), fisher)
    folder = locate_model(expert, role=f"expert of '{task}'")
    evidence = Evidence() if fisher is None else Evidence(fisher={task: load_gradients(Path(fisher), folder)})
    if (folder / ADAPTER_CONFIG).is_file():
        raise PaveError(f"{folder} is an adapter; merge it into its base first (peft: merge_and_unload)")
    base_folder = locate_model(str(facts["base"]), role="base")
    architecture = Architecture.of_folder(folder)
    base, new = Checkpoint(base_folder, architecture.prefix), Checkpoint(folder, architecture.prefix)
    problems = Problems(f"the expert {folder} cannot be added to {merged}:")
    problems.extend(config_differences(task, Architecture.of_folder(base_folder), architecture))
    problems.extend(_unfit(merged, facts, base, new, architecture))
    problems.raise_if_any()
    source = ExpertTaskVectors(base, {ALREADY_MERGED: Checkpoint(merged, architecture.prefix), task: new}, architecture)
    method = make_method(str(facts["method"]), facts.get("options", {}))
    if not isinstance(method, SequentialMethod):
        raise PaveError(_not_sequential(merged, facts))
    method.start_from(facts["sequential"], load_kept(merged, method.keeps, architecture.prefix))
    kept = {key: value for key, value in facts.items() if key not in ("method", "form", "base", "sequential")}
    kept["added"] = [*facts.get("added", []), task]  # as it was fine-tuned, also where the others were purified
    context = MergeContext(str(facts["base"]), base, {task: new}, architecture, kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        write_merged(unfinished, method, source, facts.get("scale"), context, evidence=evidence)
        for head in sorted(place for place in heads.iterdir() if place.is_dir()):
            shutil.copytree(head, unfinished / "heads" / head.name)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _unfit(
    merged: Path, facts: dict[str, Any], base: Checkpoint, expert: Checkpoint, architecture: Architecture
) -> Iterator[str]:
    """What keeps an expert from being added, besides its configuration and its shapes."""
    if facts.get("base_digest") not in (None, model_digest(base.folder)):
        yield f"the base {base.folder} is no longer what it was when {merged} was made; merge all experts again"
    if expert.has_backbone_of(base):
        yield "its backbone is the base's, so there is nothing to merge; was it fine-tuned?"
    yield from architecture.head_problems("it", expert.head)
    if load_tokenizer(expert.folder).get_vocab() != load_tokenizer(merged).get_vocab():
        yield "its vocabulary is another one; experts of one base must share its tokenizer"


def _check_request(merged: Path, facts: dict[str, Any], task: str, output: Path) -> None:
    if not re.match(NAME_PATTERN, task):
        raise PaveError(f"'{task}' cannot name a task: expected {NAME_PATTERN}")
    if facts.get("scale") == 0:
        raise PaveError(
            f"{merged} was merged with scale 0, so it holds nothing of its experts; merge all of them again"
        )
    if "sequential" not in facts or not issubclass(method_named(str(facts["method"])), SequentialMethod):
        raise PaveError(_not_sequential(merged, facts))
    if (merged / "heads" / task).exists():
        raise PaveError(f"{merged} has a task '{task}' already; give the new one another name")
    if output.exists():
        raise PaveError(f"{output} exists already; name another folder with --output")


def _check_fisher(method: str, fisher: str | Path | None) -> None:
    needed = Need.FISHER in method_named(method).needs
    if fisher is not None and not needed:
        raise PaveError(f"merge method '{method}' uses no Fisher information; leave --fisher away")
    if fisher is None and needed:
        raise PaveError(
            f"merge method '{method}' needs the Fisher information of the new expert: name its file with --fisher. "
            "`pave merge RECIPE` leaves it in gradients/fisher-TASK, for every expert of a recipe that has a merge "
            "step of this method"
        )


def _not_sequential(merged: Path, facts: dict[str, Any]) -> str:
    able = sorted(name for name, kind in methods().items() if issubclass(kind, SequentialMethod))
    if facts["method"] in able:
        return f"{merged} was merged before '{facts['method']}' could take in experts later; merge all experts again"
    return (
        f"{merged} was merged by '{facts['method']}', which cannot take in experts later; rules that can: "
        f"{', '.join(able)}"
    )
