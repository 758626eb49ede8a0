"""The typed recipe: everything a run does, in one YAML file whose every key is documented here."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from pave_lightning.errors import listed, nearest
from pave_lightning.recipe.limits import MOST_CLASSES, MOST_COMBINATIONS, MOST_POINTS
from pave_lightning.recipe.suites import suite_task

MetricName = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
Vectors = Literal["plain", "purified"]

CLASSIFICATION_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION_METRICS = ("pearson", "spearman")
Span = Annotated[tuple[float, float], Field(strict=False)]  # strict would refuse a list, which is all that YAML has

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LONGEST_NAME = 100  # folders add to it, and most file systems end at 255
MOST_TOLD = 20


def name_problem(name: str) -> str | None:
    """Why a task, merge step or recipe cannot have a name although its letters are right; None if it can."""
    if name == "manifest.json" or ".unfinished-" in name or ".replaced-" in name:
        return f"'{name}' cannot be a name: run folders use it for files of their own"
    if name.endswith((".", ".lock", ".tmp")):
        return f"'{name}' cannot be a name: it must not end with '{name[name.rindex('.') :]}'"
    return None


def _usable_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


def _path(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be a path of printable characters")
    return text


Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME), AfterValidator(_usable_name)]
FolderPath = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """A part of a recipe: frozen, strictly typed (true is no number), unknown keys refused, every field described."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


AnySection = TypeVar("AnySection", bound=Section)


class Examples(Section):
    """How many rows of each split are used: a seeded sample, or every row where nothing is said."""

    train: int | None = Field(default=None, ge=1)
    """Rows of the training split that the expert is fine-tuned on."""
    validation: int | None = Field(default=None, ge=2)
    """Rows of the validation split (best checkpoint, scale search)."""
    test: int | None = Field(default=None, ge=2)
    """Rows of the test split (the reported scores)."""


class Data(Section):
    """Where a task's rows come from: local csv, jsonl or parquet files, or a dataset on the Hugging Face hub."""

    hub: str | None = None
    """Name of a hub dataset, such as nyu-mll/glue. Without it, train, validation and test are paths of local files."""
    config: str | None = None
    """Configuration of the hub dataset, such as sst2."""
    revision: str | None = None
    """Commit, tag or branch of the hub dataset."""
    train: str = "train"
    """Path of a local file, or a split of the hub dataset; slices such as train[:90%] are understood for the hub."""
    validation: str = "validation"
    """Path or split of the rows that choose the best checkpoint and the scales."""
    test: str = "test"
    """Path or split of the rows that are reported."""
    quoting: Literal["auto", "standard", "none"] = "auto"
    """What quotation marks mean in .csv and .tsv files. standard: they enclose fields, and stand doubled inside of
    them; none: they are plain characters; auto: standard for .csv; for .tsv none, unless each of them opens or closes
    a whole field on one line."""
    delimiter: str | None = None
    """The character between the columns of .csv and .tsv files; by default a comma (.csv) or a tab (.tsv)."""

    @model_validator(mode="after")
    def _agree(self) -> Data:
        wrong: list[str] = []
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            wrong.append(
                f"'delimiter' must be one character, and no quotation mark or line break, found {self.delimiter!r}; "
                'a tab is written "\\t", in double quotes'
            )
        files = [name for name in (self.train, self.validation, self.test) if name.lower().endswith((".csv", ".tsv"))]
        given = [f"'{key}'" for key in ("quoting", "delimiter") if getattr(self, key) != Data.model_fields[key].default]
        if given and (self.hub is not None or not files):
            wrong.append(
                f"{' and '.join(given)} only {'concerns' if len(given) == 1 else 'concern'} .csv and .tsv files"
            )
        return _unless_wrong(self, wrong)


class Lora(Section):
    """Fine-tune low-rank adapters (peft) instead of all weights; at the end they are merged into the weights."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the adapters."""
    alpha: float = Field(default=16.0, gt=0)
    """Scaling: the update is alpha / r times B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names (or name endings) of the linear layers that get an adapter."""


class EarlyStopping(Section):
    """Stop fine-tuning when the primary metric no longer rises."""

    patience: int = Field(default=2, ge=1)
    """Validation passes without a rise before training stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """The least rise that counts."""


class Training(Section):
    """How an expert is fine-tuned: AdamW with linear warm-up and linear decay."""

    learning_rate: float = Field(default=3e-5, gt=0)
    """Peak learning rate of the backbone. Experts trained gently merge far better than those trained hard."""
    head_learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate of the head, which starts from random weights and is never merged."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay; biases and norm weights are not decayed."""
    warmup_share: float = Field(default=0.06, ge=0, le=1)
    """Share of all steps in which the learning rate rises."""
    batch_size: int = Field(default=32, ge=1)
    """Examples a step and device."""
    max_length: int = Field(default=128, ge=4)
    """Longest sequence in tokens; longer texts are cut."""
    freeze: list[str] = []
    """Submodules of the backbone that are not trained, such as embeddings."""
    early_stopping: EarlyStopping | None = None
    """Stop early on the primary metric; without it all epochs run."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""


class Expert(Section):
    """An expert that exists already."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    from_: str = Field(alias="from")
    """Folder or hub id of a fine-tuned sequence-classification checkpoint (or of a peft adapter of the base)."""
    accept: list[str] = []
    """What may differ although it is refused otherwise; the message names it. Keys of config.json, such as rope_theta:
    merged models use the base's value, the expert is scored with its own. Or architectures, problem_type, id2label,
    label2id, unused_weights; for adapters base (trained on another base) and task_type."""


class Task(Section):
    """One task: its data, columns, head, metrics and expert."""

    name: Name
    """Name of the task in tables, folders and MLflow."""
    data: Data
    """Where the rows come from."""
    text: list[str] = Field(min_length=1, max_length=2)
    """The column that holds the text, or the two columns of a text pair."""
    label: str = "label"
    """The column that holds the label: class indices or names, or numbers for regression."""
    kind: Literal["text_classification", "regression"] = "text_classification"
    """What is predicted; it decides the head and the loss (cross-entropy, or mean squared error)."""
    classes: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes in the order of their indices (classification). Labels that are texts are compared with the
    names first, ignoring case where no two names differ by it alone, and are indices where all of them are; labels that
    are numbers are indices, unless the names look like numbers."""
    value_range: Span | None = None
    """Lowest and highest possible label (regression); labels outside are refused."""
    metrics: list[MetricName] = Field(min_length=1)
    """What is measured; the first is the primary one unless another is named."""
    primary_metric: MetricName
    """The metric that chooses the best checkpoint and stands in the tables."""
    examples: Examples = Examples()
    """How many rows of each split are used."""
    training: Training = Training()
    """How this task's expert is fine-tuned; keys that are not given come from the recipe's training section."""
    trainer: dict[str, Any] = {}
    """Options of lightning.Trainer for this task; keys that are not given come from the recipe's trainer section."""
    expert: Expert | None = None
    """An existing checkpoint instead of training."""

    @model_validator(mode="before")
    @classmethod
    def _fill_short_forms(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if isinstance(raw.get("text"), str):
            raw["text"] = [raw["text"]]
        count = raw.get("classes")
        if isinstance(count, int) and not isinstance(count, bool) and count <= MOST_CLASSES:
            raw["classes"] = [str(index) for index in range(count)]
        if isinstance(raw.get("classes"), list):
            raw["classes"] = [_class_name(name) for name in raw["classes"]]
        if isinstance(raw.get("metrics"), str):
            raw["metrics"] = [raw["metrics"]]
        if raw.get("metrics") is None:
            raw["metrics"] = ["pearson", "spearman"] if raw.get("kind") == "regression" else ["accuracy"]
        if raw.get("primary_metric") is None and isinstance(raw["metrics"], list) and raw["metrics"]:
            raw["primary_metric"] = raw["metrics"][0]
        return raw

    @model_validator(mode="after")
    def _agree(self) -> Task:
        classification = self.kind == "text_classification"
        wrong: list[str] = []
        if classification and self.classes is None:
            wrong.append("a classification task needs 'classes': their number, or their names in index order")
        if classification and self.value_range is not None:
            wrong.append("'value_range' belongs to regression tasks")
        if not classification and self.classes is not None:
            wrong.append("'classes' belongs to classification tasks")
        fitting = CLASSIFICATION_METRICS if classification else REGRESSION_METRICS
        wrong += [
            f"metric '{metric}' does not fit a {self.kind} task; fitting are {', '.join(fitting)}"
            for metric in dict.fromkeys([*self.metrics, self.primary_metric])
            if metric not in fitting
        ]
        if "f1" in self.metrics and len(self.classes or ()) > 2:
            wrong.append("'f1' is for two classes; for more use 'macro_f1'")
        if self.primary_metric not in self.metrics:
            wrong.append(
                f"the primary metric '{self.primary_metric}' is not among the metrics {', '.join(self.metrics)}"
            )
        if self.label in self.text:
            wrong.append(
                f"'text' and 'label' both name the column '{self.label}', so the answer would be read with the text"
            )
        if len(set(self.text)) != len(self.text):
            wrong.append(f"'text' names the column '{self.text[0]}' twice")
        if len(set(self.metrics)) != len(self.metrics):
            wrong.append("the names in 'metrics' must differ")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            wrong.append("the names in 'classes' must differ")
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            wrong.append("'value_range' must be [lowest, highest]")
        return _unless_wrong(self, wrong)

    @property
    def outputs(self) -> int:
        """Number of logits of the head: one a class, or one for regression."""
        return len(self.classes) if self.classes is not None else 1


class Capture(Section):
    """The final validation pass in which the second moments of the experts' layer inputs are measured."""

    examples: int = Field(default=512, ge=1)
    """Examples of the task's training split that are shown to the trained expert."""
    batch_size: int = Field(default=32, ge=1)
    """Examples a forward pass."""
    source: Literal["train", "random_tokens"] = "train"
    """train: rows of the task's training split; random_tokens: no data at all, sequences of tokens drawn uniformly from
    the vocabulary, as long as the base reads (max_length)."""
    rows: int | None = Field(default=8192, ge=1)
    """Most rows (tokens) that a layer counts, as a seeded uniform sample of every batch's rows; null counts all."""
    moments: Literal["smallest", "input", "output"] = "smallest"
    """smallest: where a layer narrows (d_in > d_out) the cross moment W C, which is all that purification needs and
    cheaper; input: the second moment C of the input for every layer (needed by target delta); output: the second moment
    of the output where a layer narrows, which is all that the metric root needs."""
    convolutions: bool = False
    """Also capture convolutions that are matrix products of non-overlapping patches (patch embeddings, 1 x 1)."""
    gradient_examples: int = Field(default=128, ge=1)
    """Examples of the training split whose gradients are taken, one by one, for merge methods that need gradients."""
    norms: bool = False
    """Also capture the mean squares of what the scales of norms multiply, which some merge methods need."""
    precision: str = "32-true"
    """Precision of the pass (a lightning.Trainer precision). Lower ones blur the weakest directions."""


def _ratio_form(value: Any) -> str:
    return "auto" if isinstance(value, str) else "number"


# Ratios that rho: auto tries; 1 leaves the experts as they are.
AUTO_RATIOS = (0.875, 0.9375, 0.97, 0.984, 0.992, 1.0)
Rho = Annotated[
    Annotated[float, Field(gt=0, le=1), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_ratio_form),
]


class Purify(Section):
    """PAVE: keep of every fine-tuned weight the output directions that its own task excites (arXiv 2510.14697)."""

    rho: Rho = 0.97
    """Preserved rank ratio: the share of all tasks' components that are kept; or auto: the ratio, out of 0.875, 0.9375,
    0.97, 0.984, 0.992 and 1, whose merged model scores best on the validation split. 1 is no purification, so on that
    data auto is never below plain."""
    scope: Literal["layer", "model", "global"] = "layer"
    """What shares one budget of ranks. layer: the tasks of one layer (the paper); model: as layer, then one ratio for
    each task, all the ranks that it keeps over all full ranks (the published scripts); global: all layers and tasks."""
    metric: Literal["covariance", "root", "identity"] = "covariance"
    """What ranks the directions: W C (the paper), W C^(1/2) (the output error), or W alone."""
    statistics: Literal["own", "other_task", "random", "task_vector"] = "own"
    """Whose second moments. own: the task's (the paper); other_task: those of the next task in the recipe's order, and
    random: those of Gaussian noise, the same for every seed of the recipe (both for ablation); task_vector: no data,
    the second moment of the task vector's rows, scaled to a mean of 1 on the diagonal."""
    target: Literal["expert", "delta", "delta_by_expert"] = "expert"
    """What is projected. expert: the fine-tuned weight W_t (the paper); delta: the task vector, on the directions that
    the task vector itself excites (of low rank after LoRA, so that rho must be low to change anything);
    delta_by_expert: the task vector, without the directions that the expert excites least."""
    allocation: Literal["spectral", "even"] = "spectral"
    """spectral: the weakest normalised components of all tasks go first; even: every task keeps the share rho."""
    stopping_share: float = Field(default=1.5, gt=0)
    """With spectral allocation no task loses more than this multiple of the even share."""
    nearest_budget: bool = False
    """Where stopping_share puts rho out of reach: take the nearest budget within reach instead of refusing."""
    damping: float = Field(default=0.1, ge=0)
    """Added to the diagonal of the second moment (epsilon in the paper)."""
    tasks: list[str] | None = Field(default=None, min_length=1)
    """Tasks to purify; all of them where nothing is said."""
    exact: bool = False
    """Full singular value decompositions instead of the fast eigenvalue path; for comparison."""

    def __hash__(self) -> int:
        """Of what it says, because the list of tasks has no hash of its own."""
        return hash(self.model_dump_json())

    @property
    def reads_statistics(self) -> bool:
        """Whether captured statistics are needed at all."""
        return self.metric != "identity" and self.statistics in ("own", "other_task")

    @property
    def needs_inputs(self) -> str:
        """The choice, as key and value, that needs the second moments of all inputs; empty where none does."""
        if self.statistics == "other_task":
            return "statistics: other_task"
        return "target: delta" if self.target == "delta" else ""

    @property
    def summary(self) -> str:
        """What differs from other purifications, in a few words."""
        ratio = self.rho if isinstance(self.rho, str) else f"{self.rho:g}"
        words = [f"rho {ratio}", self.metric, f"{self.allocation} allocation", f"scope {self.scope}"]
        words += [] if self.statistics == "own" else [f"statistics {self.statistics}"]
        words += [] if self.target == "expert" else [f"target {self.target}"]
        return ", ".join(words)


class Compute(Section):
    """How purification uses the machine; the results do not depend on it beyond rounding."""

    workers: int | None = Field(default=None, ge=1)
    """Threads that work at once, each on one task of a layer; one for each processor core where nothing is said."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: eigenvectors of the weakest directions alone; cuda: full eigenvalue decompositions on the graphics card."""


def _search_form(value: Any) -> str:
    return "auto" if isinstance(value, str) else "range"


SearchRange = Annotated[
    Annotated[Span, Tag("range")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_search_form),
]
# Scales of a range where a recipe does not say how many.
DEFAULT_POINTS = 7


class ScaleSearch(Section):
    """Choose the scale on the validation split: the one with the best average of normalised scores."""

    search: SearchRange
    """Lowest and highest scale that is tried; or auto: start at the method's default scale, go up and down by factors
    of two until the score has fallen on both sides, and refine around the best."""
    points: int | None = Field(default=None, ge=2, le=MOST_POINTS)
    """Evenly spaced scales of a range, both ends included; 7 where nothing is said. Not for auto."""
    examples: int | None = Field(default=None, ge=2)
    """Validation rows a task that the search looks at; all that the task uses where nothing is said."""

    @model_validator(mode="before")
    @classmethod
    def _fill_short_form(cls, raw: Any) -> Any:
        if raw == "search":
            return {"search": "auto"}
        if isinstance(raw, dict) and raw.get("points") is None and isinstance(raw.get("search"), (list, tuple)):
            return {**raw, "points": DEFAULT_POINTS}
        return raw

    @field_validator("search")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | Literal["auto"]) -> tuple[float, float] | Literal["auto"]:
        if value != "auto" and value[0] >= value[1]:
            raise ValueError("must be [lowest, highest]")
        return value

    @model_validator(mode="after")
    def _points_of_a_range(self) -> ScaleSearch:
        of_auto = self.search == "auto" and self.points is not None
        return _unless_wrong(self, ["'points' belongs to a range [lowest, highest], not to auto"] if of_auto else [])


def _scale_form(value: Any) -> str:
    return "search" if isinstance(value, (dict, ScaleSearch)) or value == "search" else "number"


Scale = Annotated[
    Annotated[float, Tag("number")] | Annotated[ScaleSearch, Tag("search")],
    Discriminator(_scale_form),
]


class MergeStep(Section):
    """One merge method, run on plain task vectors, on purified ones, or on both."""

    method: str
    """The merge method; `pave methods` lists them."""
    name: Annotated[
        str, Field(pattern=rf"^$|{NAME_PATTERN}", max_length=LONGEST_NAME), AfterValidator(_usable_name)
    ] = ""
    """Name of the result in tables and folders; the method's name where nothing is said."""
    scale: Scale | None = None
    """What the merged task vector is multiplied with: a number, search (chosen on the validation split, starting at the
    method's default), or {search: [lowest, highest]}. The method's default where nothing is said; only for methods that
    have a scale."""
    vectors: list[Vectors] = Field(default=["plain", "purified"], min_length=1)
    """Which task vectors the method is run on."""
    purify: Purify = Purify()
    """Purification for this step; keys that are not given come from the recipe's purify section."""
    options: dict[str, Any] = {}
    """The method's own options; `pave methods NAME` lists them."""
    anchor: str | None = None
    """Name of the merge step whose result this one starts from, run on the same task vectors; only for methods that
    calibrate a merged model."""
    tune: dict[str, list[Any]] = {}
    """Options that are chosen on the validation split, each with the values that it may take. Every combination is
    tried, with its own best scale where the scale is searched; among equals the first one wins."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_method(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"method": raw}
        if isinstance(raw, dict) and raw.get("name") in (None, "") and isinstance(raw.get("method"), str):
            raw = {**raw, "name": raw["method"]}
        return raw

    @model_validator(mode="after")
    def _tune_agrees(self) -> MergeStep:
        wrong = [f"tune.{key}: takes no value" for key, values in self.tune.items() if not values]
        wrong += [f"tune.{key}: takes the same value twice" for key, values in self.tune.items() if _repeats(values)]
        wrong += [f"tune.{key}: has a value in options as well" for key in self.tune if key in self.options]
        combinations = math.prod(map(len, self.tune.values()))
        if combinations > MOST_COMBINATIONS:
            wrong.append(f"tune: asks for {combinations:,} combinations, expected at most {MOST_COMBINATIONS:,}")
        return _unless_wrong(self, wrong)

    @property
    def tuned_options(self) -> list[dict[str, Any]]:
        """The options of every combination that ``tune`` asks for; the step's own where it asks for none."""
        combinations = itertools.product(*self.tune.values())
        return [{**self.options, **dict(zip(self.tune, values, strict=True))} for values in combinations]

    @field_validator("vectors")
    @classmethod
    def _differ(cls, value: list[Vectors]) -> list[Vectors]:
        if len(set(value)) != len(value):
            raise ValueError("must not name the same vectors twice")
        return value


class Evaluate(Section):
    """How models are scored."""

    batch_size: int = Field(default=64, ge=1)
    """Examples a forward pass."""
    precision: str = "32-true"
    """Precision of the pass (a lightning.Trainer precision)."""
    purified_experts: bool = False
    """Also score every purified expert alone on its own task: what purification costs before anything is merged."""


class Tracking(Section):
    """Where MLflow keeps the record."""

    uri: str = "sqlite:///mlruns/mlflow.db"
    """MLflow tracking URI: a database or a server. Plain folders are no longer supported by MLflow. A percent sign in a
    path is written %25. Write *** for a password or token and set the environment variable PAVE_TRACKING_URI to the
    full URI: secrets are written to no file."""
    experiment: str = "pave-lightning"
    """MLflow experiment."""
    upload_models: bool = False
    """Also store the merged models' weights as MLflow artifacts."""


class Sweep(Section):
    """A recipe run many times with some keys varied; `pave sweep` compares the results."""

    question: str
    """What is to be found out, in one sentence."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of the recipe; experts are trained anew for each."""
    vary: dict[str, list[Any]] = {}
    """Keys of the recipe (as --set names them) and the values that each takes; every combination is run."""
    cases: dict[str, dict[str, Any]] = {}
    """Names of settings, each with the keys that it changes; combined with every value of vary."""
    x: str = ""
    """What stands on the picture's horizontal axis: a varied key, case, model or vectors; where nothing is said, the
    first varied key, or model where none is varied."""
    lines: list[str] = []
    """What tells the picture's lines apart; everything else that differs where nothing is said."""
    score: Literal["normalised", "raw"] = "normalised"
    """normalised: each task's score divided by its expert's; raw: the score itself."""
    log_x: bool = False
    """Whether the horizontal axis is logarithmic."""

    @model_validator(mode="after")
    def _agree(self) -> Sweep:
        wrong = [f"'{key}' takes no value" for key, values in self.vary.items() if not values]
        wrong += [f"'{key}' takes the same value twice" for key, values in self.vary.items() if _repeats(values)]
        if len(set(self.seeds)) != len(self.seeds):
            wrong.append("the seeds must differ")
        fixed = {"name", "output", "shared", "tracking", "sweep"}
        keys = dict.fromkeys([*self.vary, *(key for changes in self.cases.values() for key in changes)])
        wrong += [f"'{key}' cannot be varied" for key in keys if key.partition(".")[0] in fixed]
        wrong += ["'seed' is varied by the key 'seeds'"] if "seed" in keys else []
        columns = [*self.vary, *(["case"] if self.cases else []), "model", "vectors"]
        wrong += [
            f"'{name}' is no varied key; {nearest(name, columns)}"
            for name in [*([self.x] if self.x else []), *self.lines][:MOST_TOLD]
            if name not in columns
        ]
        return _unless_wrong(self, wrong)


def _repeats(values: list[Any]) -> bool:
    first = values[:MOST_COMBINATIONS]  # more are refused
    return any(value in first[:index] for index, value in enumerate(first))


class Recipe(Section):
    """One run: fine-tune experts, capture their statistics, purify, merge, evaluate, report."""

    name: Name
    """Name of the run; its folder is output/name."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of everything drawn at random: heads, order of examples, dropout, samples of rows."""
    base: str
    """The common base model: a folder, a hub id, or package:NAME/FOLDER for a model inside an installed package."""
    output: FolderPath = "checkpoints"
    """Folder in which the run folder is made."""
    shared: FolderPath | None = None
    """Folder of experts and statistics that recipes share: what one of them made from the same inputs, the others take
    from there. Without it they lie in the run folder."""
    trainer: dict[str, Any] = {}
    """Options of lightning.Trainer (accelerator, devices, strategy, precision, max_epochs, ...), passed straight on."""
    training: Training = Training()
    """How experts are fine-tuned, unless a task says otherwise."""
    examples: Examples = Examples()
    """How many rows of each split are used, unless a task says otherwise."""
    tasks: list[Task] = Field(min_length=1)
    """The tasks: names such as pocket/movie, {use: pocket/movie, ...} to change some keys, or whole tasks."""
    capture: Capture = Capture()
    """The capture pass."""
    purify: Purify = Purify()
    """Purification, unless a merge step says otherwise."""
    compute: Compute = Compute()
    """How purification uses the machine."""
    merge: list[MergeStep] = []
    """The merge methods to run."""
    evaluate: Evaluate = Evaluate()
    """How models are scored."""
    tracking: Tracking = Tracking()
    """Where MLflow keeps the record."""
    sweep: Sweep | None = None
    """What `pave sweep` varies; other commands run the recipe as it stands."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, raw: Any) -> Any:
        """Fill tasks and merge steps from the recipe's own sections and from the named suites."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for key, shared in (("tasks", ("examples", "training", "trainer")), ("merge", ("purify",))):
            if not isinstance(raw.get(key), list):
                continue
            defaults = {name: raw[name] for name in shared if isinstance(raw.get(name), dict)}
            raw[key] = [_filled(entry, defaults, key) for entry in raw[key]]
        return raw

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        wrong: list[str] = []
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("merge step", [step.name for step in self.merge]),
        ):
            repeated = sorted({name for name, times in Counter(names).items() if times > 1})
            if repeated:
                wrong.append(
                    f"each {what} needs a name of its own, but {listed(repeated)} stands twice; give one a 'name'"
                )
            alike: dict[str, str] = {}
            for name in dict.fromkeys(names):
                first = alike.setdefault(name.lower(), name)
                if first != name:
                    wrong.append(
                        f"the {what}s '{first}' and '{name}' differ by case alone, and some file systems would write "
                        "both into one folder; give one another name"
                    )
        known = [task.name for task in self.tasks]
        lists = [("purify.tasks", self.purify.tasks)]
        for step in self.merge:
            if step.purify.tasks != self.purify.tasks:  # what is handed down is told once
                lists.append((f"purify.tasks of merge step '{step.name}'", step.purify.tasks))
        for where, chosen in lists:
            wrong += [
                f"{where}: no task is named '{name}'; {nearest(name, known)}"
                for name in [name for name in chosen or [] if name not in known][:MOST_TOLD]
            ]
        wrong += self._anchor_problems()
        for reserved in ("base", "experts"):
            if reserved in [step.name for step in self.merge]:
                wrong.append(f"a merge step cannot be named '{reserved}': the tables use that name")
        return _unless_wrong(self, wrong)

    def _anchor_problems(self) -> list[str]:
        names = [step.name for step in self.merge]
        anchors = {step.name: step.anchor for step in self.merge if step.anchor is not None}
        wrong = [
            f"merge step '{name}': anchor: no merge step is named '{anchor}'; {nearest(anchor, names)}"
            for name, anchor in [pair for pair in anchors.items() if pair[1] not in names][:MOST_TOLD]
        ]
        for name in anchors:
            path, passed = [name], set[str]()
            while path[-1] in anchors and path[-1] not in passed:
                passed.add(path[-1])
                path.append(anchors[path[-1]])
            if path[-1] == name and len(path) > 1:
                wrong.append(f"merge step '{name}': its anchors lead back to itself ({' -> '.join(path)})")
        return wrong

    def step(self, name: str) -> MergeStep:
        """The merge step of that name."""
        return next(step for step in self.merge if step.name == name)

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)


def _filled(entry: Any, defaults: Mapping[str, Any], key: str) -> Any:
    if key == "tasks":
        if isinstance(entry, str):
            entry = {"use": entry}
        if isinstance(entry, dict) and isinstance(entry.get("use"), str):
            own = {name: value for name, value in entry.items() if name != "use"}
            known = suite_task(entry["use"])
            if isinstance(own.get("data"), dict):
                own["data"] = {**known["data"], **own["data"]}
            entry = {**known, **own}
    elif isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, dict):
        return entry
    filled = dict(entry)
    for name, shared in defaults.items():
        own = filled.get(name, {})
        if isinstance(own, dict):
            filled[name] = {**shared, **own}
    return filled


def _class_name(name: Any) -> Any:
    """A class that is called true or 1, which YAML takes for something else than a text."""
    if isinstance(name, bool):
        return "true" if name else "false"
    return str(name) if isinstance(name, int | float) else name


def _unless_wrong(section: AnySection, wrong: list[str]) -> AnySection:
    """The section, unless something is wrong: then everything at once, one line each."""
    if wrong:
        raise ValueError("\n".join(wrong))
    return section


def slug(text: str) -> str:
    """A name that is safe as a folder name on every file system."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
