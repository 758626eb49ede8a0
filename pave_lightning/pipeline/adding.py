"""Adding one expert to a merged model, without the experts that are in it already."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pave_lightning.config import LONGEST_NAME, NAME_PATTERN, name_problem
from pave_lightning.errors import PaveError, Problems, shortened
from pave_lightning.experts.adapters import load_adapter_alone
from pave_lightning.experts.fitting import save_expert
from pave_lightning.experts.loading import expert_problem
from pave_lightning.experts.vocabulary import differing_tokens, expert_notes, row_problems, token_rows
from pave_lightning.merging import Evidence, Need, SequentialMethod, known_methods, make_method, method_named, selected
from pave_lightning.merging.folders import (
    EXPERT_HEAD_FILE,
    HEAD_FILE,
    MergeContext,
    load_gradients,
    load_kept,
    merged_facts,
    write_merged,
)
from pave_lightning.reporting.model_card import ExpertSource, as_code, model_card
from pave_lightning.system.files import making_folder
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.tokenizers import load_tokenizer
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, locate_model, model_digest
from pave_lightning.weights.adapter_base import other_base
from pave_lightning.weights.adapter_models import adapter_problems
from pave_lightning.weights.adapters import ADAPTER_CONFIG
from pave_lightning.weights.configuration import config_differences
from pave_lightning.weights.locate import named_adapter

log = logging.getLogger("pave_lightning")

ALREADY_MERGED = "(merged)"
ADDED = """
## Added later

{added}, one after the other, as they were fine-tuned; the last one to {merged}.

## Scores

None were taken. With a task's head the model is an ordinary checkpoint, which a recipe scores as an expert: save it,
name its folder as the task's `expert: {{from: scored/{task}}}`, leave the recipe's merge section empty, and run
`pave fit`, `pave evaluate` and `pave report` with it.

```python
model.save_pretrained("scored/{task}")
AutoTokenizer.from_pretrained("FOLDER").save_pretrained("scored/{task}")  # from transformers
```

A task whose expert has other tokens than the base has a tokenizer of its own, in `FOLDER/heads/TASK`; take that one.
"""


def add_expert(
    merged: str | Path,
    task: str,
    expert: str,
    output: str | Path,
    fisher: str | Path | None = None,
    *,
    accept: Sequence[str] = (),
) -> Path:
    """Merge one more expert into a model that a sequential method has merged (see `SequentialMethod`).

    The result is written whole or not at all. It is no stage of a recipe, so `pave evaluate` does not know it; with a
    task's head it is an ordinary checkpoint, which a recipe that merges nothing scores as that task's expert:

    Example::

        folder = add_expert("runs/mine/merged/opcm-plain", "news", "experts/news", "merged/opcm-news")
        for task in ("movie", "tweet", "news"):  # then expert: {from: scored/TASK} and merge: []
            load_merged(folder, task).save_pretrained(f"scored/{task}")
            AutoTokenizer.from_pretrained(folder).save_pretrained(f"scored/{task}")

    Args:
        merged: folder of the merged model, as `write_merged` left it; it stays as it is.
        task: name of the new expert's task.
        expert: folder or hub id of the new expert, a sequence-classification checkpoint of the same base, or a peft
            adapter with its head, which is merged into the base first; its outputs have no names then.
        output: folder of the result; it must not exist.
        fisher: for methods that need it, the new expert's Fisher information: a file of `TaskGradients`, or the folder
            ``gradients/fisher-TASK`` that a recipe left.
        accept: what may differ although it is refused otherwise, as a recipe's key ``expert.accept``.

    Returns:
        The folder of the result, with the heads of all tasks and a README.md.

    Raises:
        PaveError: the folder is no merged model, or of a method that cannot take in experts later; the task is in it
            already; the expert or its Fisher information does not fit the base; ``output`` exists.
    """
    merged, output = Path(merged), Path(output)
    facts = merged_facts(merged)
    heads = merged / "heads"
    _check_request(merged, facts, task, output)
    _check_fisher(str(facts["method"]), fisher)
    role = f"expert of '{task}'"
    named = named_adapter(locate_model(expert, role=role), role=role)
    base = locate_model(str(facts["base"]), role="base")
    if (named / ADAPTER_CONFIG).is_file() and not adapter_problems(named) and "base" not in accept:
        other = other_base(named, str(facts["base"]), base)
        if other is not None:
            raise PaveError(f"{other}; its update belongs to other weights (--accept base if this is meant)")
    with _whole_expert(named, base, task, fisher) as folder:
        evidence = Evidence() if fisher is None else Evidence(fisher={task: load_gradients(Path(fisher), folder)})
        architecture = Architecture.of_folder(folder)
        base_weights, new = map(architecture.checkpoint, (base, folder))
        problems = Problems(f"the expert {named} cannot be added to {merged}:")
        problems.extend(config_differences(task, base, folder, accept))
        problems.extend(_unfit(merged, facts, base_weights, new, architecture))
        problems.raise_if_any()
        for note in expert_notes(task, named, base_weights, architecture):
            log.info("%s", note)
        before = Checkpoint(merged, architecture.prefix)
        counts = {ALREADY_MERGED: sum(head.is_dir() for head in heads.iterdir())}
        vectors = ExpertTaskVectors(base_weights, {ALREADY_MERGED: before, task: new}, architecture, counts)
        source = selected(vectors, **facts.get("parameters", {}))
        method = make_method(str(facts["method"]), facts.get("options", {}))
        if not isinstance(method, SequentialMethod):
            raise PaveError(_not_sequential(merged, facts))
        method.start_from(facts["sequential"], load_kept(merged, method.keeps, architecture.prefix))
        # Heads that were fitted to the model do not fit what it becomes.
        dropped = ("method", "form", "base", "sequential", "heads", "dtype", "rounding")
        kept = {key: value for key, value in facts.items() if key not in dropped}
        kept["added"] = [*facts.get("added", []), task]  # as it was fine-tuned, also where the others were purified
        context = MergeContext(str(facts["base"]), base_weights, {task: new}, architecture, kept)
        with making_folder(output) as place:
            asked = facts.get("dtype", "base")
            write_merged(place, method, source, facts.get("scale"), context, evidence=evidence, dtype=asked)
            for head in sorted(found for found in heads.iterdir() if found.is_dir()):
                shutil.copytree(head, place / "heads" / head.name)
                if (own := place / "heads" / head.name / EXPERT_HEAD_FILE).exists():
                    own.replace(own.with_name(HEAD_FILE))
            if "heads" in facts:
                log.info("the heads are those of the experts again: those fitted to %s do not fit the result", merged)
            (place / "README.md").write_text(_card(merged, place, output, task, named))
    return output


@contextmanager
def _whole_expert(expert: Path, base: Path, task: str, fisher: str | Path | None) -> Iterator[Path]:
    """The folder of the expert; of an adapter that of the model it gives with the base, for as long as it is needed."""
    if not (expert / ADAPTER_CONFIG).is_file():
        yield expert
        return
    if fisher is not None:
        raise PaveError(
            f"{expert} is an adapter, but Fisher information is that of a whole model; name the folder that it was "
            "taken of (experts/TASK in the run folder of its recipe)"
        )
    with tempfile.TemporaryDirectory(prefix="pave-expert-") as name:
        save_expert(load_adapter_alone(base, expert, task), base, Path(name), tokenizer_of=expert)
        yield Path(name)


def _card(merged: Path, place: Path, output: Path, task: str, expert: Path) -> str:
    facts = merged_facts(place)
    card = model_card(
        name=output.name,
        base_model=str(facts["base"]),
        method=str(facts["method"]),
        form="static",
        vectors=facts.get("vectors", "plain"),
        transforms=facts.get("transforms", ()),
        tasks=sorted(head.name for head in (place / "heads").iterdir()),
        options=facts.get("options"),
        scale=facts.get("scale"),
        experts=[ExpertSource(task, str(expert), model_digest(expert))],
    )
    return card + ADDED.format(merged=as_code(str(merged)), added=", ".join(facts["added"]), task=task)


def _unfit(
    merged: Path, facts: dict[str, Any], base: Checkpoint, expert: Checkpoint, architecture: Architecture
) -> Iterator[str]:
    """What keeps an expert from being added, besides its configuration and its shapes."""
    if facts.get("base_digest") not in (None, model_digest(base.folder)):
        yield f"the base {base.folder} is no longer what it was when {merged} was made; merge all experts again"
    if expert.has_backbone_of(base):
        yield "its backbone is the base's, so there is nothing to merge; was it fine-tuned?"
    incomplete = expert_problem(expert.folder)
    if incomplete is not None:
        yield f"it {incomplete}"
    if architecture.main_input != TOKENS:
        return
    own, rows = load_tokenizer(expert.folder, base.folder), token_rows(expert.folder, architecture)
    yield from row_problems("the expert", rows, architecture.vocabulary, own)
    yield from differing_tokens("the expert", own.get_vocab(), load_tokenizer(base.folder).get_vocab())


def _check_request(merged: Path, facts: dict[str, Any], task: str, output: Path) -> None:
    if problem := name_problem(task):
        raise PaveError(problem)
    if not re.fullmatch(NAME_PATTERN.rstrip("$"), task) or len(task) > LONGEST_NAME:
        raise PaveError(
            f"'{shortened(task)}' cannot name a task: expected letters, digits, '.', '_' and '-', first a letter or a "
            f"digit, at most {LONGEST_NAME} characters"
        )
    if facts.get("scale") == 0:
        raise PaveError(
            f"{merged} was merged with scale 0, so it holds nothing of its experts; merge all of them again"
        )
    if facts.get("vocabulary") == "union":
        raise PaveError(
            f"{merged} has tokens of its experts beside the base's (vocabulary: union), to which those of one more "
            "cannot be added later; merge all experts again"
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
            "`pave merge RECIPE` leaves it in gradients/fisher-TASK of its run folder, for every expert of a recipe "
            "that has a merge step of this method; it merges two tasks or more, so give it the new one and any other"
        )


def _not_sequential(merged: Path, facts: dict[str, Any]) -> str:
    able = sorted(name for name, kind in known_methods().items() if issubclass(kind, SequentialMethod))
    if facts["method"] in able:
        return f"{merged} was merged before '{facts['method']}' could take in experts later; merge all experts again"
    return (
        f"{merged} was merged by '{facts['method']}', which cannot take in experts later; methods that can: "
        f"{', '.join(able)}"
    )
