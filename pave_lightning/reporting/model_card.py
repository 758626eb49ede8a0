"""The model card of a merged model: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ruamel.yaml import YAML

from pave_lightning.errors import visible
from pave_lightning.reporting.intervals import Interval
from pave_lightning.reporting.markdown import escaped, table
from pave_lightning.reporting.scores import Model, ScoreTable
from pave_lightning.reporting.untouched import untouched_lines
from pave_lightning.reporting.verdicts import half_width

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", flags=re.ASCII)

STATIC = "**Static**: one set of weights that serves all tasks."
PER_TASK = (
    "**Per-task**: the weights of this folder are shared by all tasks, and `modulators/` keeps something extra for each"
    " of them. Loaded alone, the shared weights are no finished model."
)
USE = """\
```python
from pave_lightning import load_merged

model = load_merged("FOLDER", task="TASK")  # a sequence-classification model with the head of that task
```

HEADS"""
EXPERTS_HEADS = "`heads/` holds the head of each task's own expert; heads are not merged."
FITTED_HEADS = (
    "`heads/` holds a head for each task whose last layer was fitted to this model, and its expert's head beside it"
    " (`expert-head.safetensors`, or `load_merged(..., expert_head=True)`)."
)
# Fit of a head -> what it was fitted to, and whether labels were seen.
FITTED_TO = {
    "logits": "the expert's logits, without labels",
    "probabilities": "the expert's probabilities, without labels",
    "orthogonal": "the expert's features, by an orthogonal turn, without labels",
    "labels": "the labels of training rows, which the other fits do not see",
}
STATIC_USE = (
    USE
    + """ The backbone alone loads with `transformers.AutoModel.from_pretrained("FOLDER")`. What transformers
then reports as newly initialised, such as a pooler that the base does not have, is random and no part of this model."""
)
PER_TASK_USE = USE + """ Loading needs the base model too."""


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert came from.

    Args:
        task: Name of its task.
        source: Folder or hub id.
        digest: Hash of its weights.
    """

    task: str
    source: str
    digest: str


def model_card(
    *,
    name: str,
    title: str | None = None,
    base_model: str,
    method: str,
    form: Literal["static", "per-task"],
    vectors: str,
    heads: Mapping[str, Any] | None = None,
    tasks: Sequence[str],
    options: Mapping[str, Any] | None = None,
    scale: float | None = None,
    scale_origin: str = "",
    purification: Mapping[str, Any] | None = None,
    transforms: Sequence[Mapping[str, Any]] = (),
    untouched: Sequence[Sequence[str]] = (),
    left_out: Mapping[str, Sequence[str]] | None = None,
    experts: Sequence[ExpertSource] = (),
    scores: ScoreTable | None = None,
    differences: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> str:
    """Describe a merged model.

    Args:
        name: Name of the model, as in the tables.
        title: What the card is headed with; the name where nothing is said.
        base_model: Hub id or folder of the base. Only a hub id is put into the front matter.
        method: The merge method.
        form: static, or per-task when something extra is kept for each task.
        vectors: Which task vectors were merged: plain, purified, or the name of a stack of transforms.
        heads: How heads were fitted to the model; it has its experts' heads where nothing is said.
        tasks: Names of the tasks.
        options: The method's options.
        scale: What the merged task vector was multiplied with, if the method has a scale.
        scale_origin: How the scale was found, such as "best of 7 on the validation split".
        purification: Options of the purification, for purified vectors.
        transforms: Name and options of each transform of the stack, in order, for other vectors.
        untouched: Task, layer and reason of each layer that purification left as it is, where vectors were purified.
        left_out: Lines on what was not merged or purified whatever the task, by heading.
        experts: Where the experts came from.
        scores: Scores of base, experts and this model (others are left out), once they are known.
        differences: Sentences that compare this model with others, with their intervals.
        versions: Versions of the software by name.

    Returns:
        The text of README.md.
    """
    front: dict[str, Any] = {"library_name": "transformers"}
    if HUB_ID.fullmatch(base_model):
        front |= {"base_model": base_model, "base_model_relation": "merge"}
    front["tags"] = ["merge", "pave-lightning"]

    facts = [
        ("base", as_code(base_model)),
        ("method", as_code(method)),
        ("task vectors", escaped(vectors)),
        ("heads", f"fitted to {FITTED_TO[heads['fit']]}, {heads['rows']} rows a task" if heads else "the experts' own"),
        ("kind", form),
        ("tasks", ", ".join(escaped(task) for task in tasks)),
    ]
    if scale is not None:
        facts.append(("scale", f"{scale:.4g}" + (f" ({escaped(scale_origin)})" if scale_origin else "")))

    parts = [
        f"---\n{_yaml(front)}---",
        f"# {escaped(title or name)}",
        "Separately fine-tuned experts, merged with pave-lightning.",
        table(["", ""], facts),
    ]
    if options:
        parts += ["## Options of the method", _yaml_block(options)]
    if transforms:
        parts += ["## Transforms of the task vectors", _yaml_block({"transforms": transforms})]
    if purification and vectors == "purified":
        parts += ["## Purification", _yaml_block(purification)]
    if untouched and vectors != "plain":
        lines = [f"- {escaped(line)}" for line in untouched_lines(untouched)]
        what = "Purification left these layers as they were:" if transforms else "These layers were left as they are:"
        parts += [what, "\n".join(lines)]
    if left_out:
        parts += ["## Left out"]
        for heading, reasons in left_out.items():
            listed = "\n".join(f"- {escaped(reason)}" for reason in reasons)
            parts += [f"{escaped(heading.capitalize())}:", listed]
    use = STATIC_USE if form == "static" else PER_TASK_USE
    use = use.replace("HEADS", FITTED_HEADS if heads else EXPERTS_HEADS)
    parts += ["## Use", STATIC if form == "static" else PER_TASK, use]
    if scores is not None and scores.tasks():
        parts += [
            "## Scores",
            _scores(scores, Model(name, vectors, form)),
            *(["\n".join(f"- {escaped(sentence)}" for sentence in differences)] if differences else []),
            _reading(form, scores, bool(differences)),
        ]
    if experts:
        rows = [(escaped(expert.task), as_code(expert.source), as_code(expert.digest)) for expert in experts]
        parts += ["## Experts", table(["task", "source", "digest of the weights"], rows)]
    if versions:
        software = [(escaped(package), escaped(version)) for package, version in versions.items()]
        parts += ["## Versions", table(["software", "version"], software)]
    return "\n\n".join(parts) + "\n"


def _scores(scores: ScoreTable, merged: Model) -> str:
    models = [model for model in scores.models() if model.section == "reference" or model == merged]
    header = [
        "model",
        *(f"{task} ({metric})" for task, metric in scores.primary_metrics.items()),
        "average",
        "normalised",
    ]
    rows = [
        (
            escaped(model.name),
            *(_number(scores.value(model, task), scores.interval(model, task)) for task in scores.tasks()),
            _number(scores.average(model), scores.average_interval(model)),
            _number(scores.normalised_average(model), scores.normalised_average_interval(model)),
        )
        for model in models
    ]
    return table([escaped(cell) for cell in header], rows)


def _reading(form: str, scores: ScoreTable, compared: bool) -> str:
    text = "*normalised*: a score divided by that of the task's expert, averaged over the tasks."
    if any(scores.average_interval(model).is_known for model in scores.models()):
        text += " ±: half the width of the 95 % interval over test rows."
    if compared:
        text += " Differences are of normalised averages, in brackets their 95 % interval over test rows."
    for note in filter(None, (scores.left_out_note(), scores.not_learned_note())):
        text += f" {escaped(note)}"
    if form == "per-task":
        text += " This model keeps something extra for each task; compare it with static models with care."
    return text


def _yaml(content: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(_plain(content), stream)
    return stream.getvalue()


def _yaml_block(content: Mapping[str, Any]) -> str:
    text = _yaml(content)
    fence = _longer_than_any_run(text, least=3)
    return f"{fence}yaml\n{text}{fence}"


def _plain(value: Any) -> Any:
    """The same content in types that YAML knows; other objects become their text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(content) for name, content in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(content) for content in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def as_code(text: str) -> str:
    """Text as code, in one line and in one table cell."""
    text = visible(" ".join(text.split())).replace("|", "\\|")
    fence = _longer_than_any_run(text, least=1)
    blank = " " if "`" in text else ""
    return f"{fence}{blank}{text}{blank}{fence}" if text else ""


def _longer_than_any_run(text: str, least: int) -> str:
    return "`" * max([least] + [len(run) + 1 for run in re.findall("`+", text)])


def _number(value: float, interval: Interval) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} {half_width(interval)}".rstrip()
