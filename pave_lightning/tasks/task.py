"""What every kind of task looks like: its options, its rows, its head and its scores; and which kinds there are.

A kind is a subclass of `Task` under the decorator `task_kind`, one file each in `kinds`, found without a list; third
parties register theirs by the entry point ``pave_lightning.tasks``, which names a module that holds one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from pave_lightning.config import Name, Section, unless_wrong
from pave_lightning.errors import PaveError
from pave_lightning.system.plug_ins import Registry
from pave_lightning.tasks.heads import HeadForm, Likelihood, Misfit, Predictions
from pave_lightning.tasks.options import Data, Examples, Expert, MetricName, Training

if TYPE_CHECKING:  # what a recipe is read with loads none of these
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn
    from torchmetrics import MetricCollection

    from pave_lightning.tasks.labels import LabelValues, Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

Batch = Mapping[str, "Tensor"]

FOLDER = "pave_lightning.tasks.kinds"
GROUP = "pave_lightning.tasks"
# The kind of a task that names none.
DEFAULT = "text_classification"


class Task(Section):
    """One task: its data, how its expert is fine-tuned, and, by its kind, columns, head, loss and metrics.

    A kind is a subclass in `pave_lightning.tasks.kinds`: its options are further fields, and its methods say all that
    others need to know of its rows, its batches, its head and its metrics. Libraries that take long to load are
    imported inside of methods, so that reading a recipe stays quick.

    Attributes:
        auto_model: name of the class of transformers that builds a model with this kind's head.
        peft_type: the ``task_type`` of this kind's adapters, by peft's name; None for kinds that peft has no name for.
        fitting_metrics: the metrics that fit this kind.
        default_metrics: the metrics where a recipe names none.
        likelihood: how what is right is thought to be drawn from the outputs.
        has_head: whether models have a part of their own for the task, which is not merged.
        headless_because: why there is none, in words that go on after "since".
        reads_tokens: whether the model is given tokens, so that its processor is a tokenizer.
        names_files: whether rows name files of their own, such as images, and may be given as a folder of these.
        encoded_at_once: how many rows are encoded, and written, at a time.
    """

    auto_model: ClassVar[str]
    peft_type: ClassVar[str | None]
    fitting_metrics: ClassVar[tuple[MetricName, ...]]
    default_metrics: ClassVar[tuple[MetricName, ...]]
    likelihood: ClassVar[Likelihood] = Likelihood.CATEGORICAL
    has_head: ClassVar[bool] = True
    headless_because: ClassVar[str] = "their whole models are merged"
    reads_tokens: ClassVar[bool] = True
    names_files: ClassVar[bool] = False
    encoded_at_once: ClassVar[int] = 1000

    name: Name
    """Name of the task in tables, folders and MLflow."""
    data: Data
    """Where the rows come from."""
    kind: str
    """What is predicted; it decides the columns, the head, the loss and the metrics."""
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

    def __new__(cls, **options: Any) -> Task:
        """A task of the kind that the options name; the first of all kinds where they name none."""
        if cls is Task:
            return super().__new__(kind_named(kind_of(options)))
        return super().__new__(cls)

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Any:
        """A task from plain values; of the kind that they name where this is no kind itself."""
        if cls is Task:
            return any_task().validate_python(obj, **how)
        return super().model_validate(obj, **how)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **how: Any) -> Any:
        """As `model_validate`, from JSON."""
        if cls is Task:
            return any_task().validate_json(json_data, **how)
        return super().model_validate_json(json_data, **how)

    @model_validator(mode="before")
    @classmethod
    def _fill_metrics(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        # A key of another kind that is left empty, as where one takes back what a known task says.
        raw = {key: value for key, value in raw.items() if value is not None or key in cls.model_fields}
        if isinstance(raw.get("metrics"), str):
            raw["metrics"] = [raw["metrics"]]
        if raw.get("metrics") is None:
            raw["metrics"] = list(cls.default_metrics)
        if raw.get("primary_metric") is None and isinstance(raw["metrics"], list) and raw["metrics"]:
            raw["primary_metric"] = raw["metrics"][0]
        return raw

    @model_validator(mode="after")
    def _agree(self) -> Task:
        wrong = [
            f"metric '{metric}' does not fit a {self.kind} task; fitting are {', '.join(self.fitting_metrics)}"
            for metric in dict.fromkeys([*self.metrics, self.primary_metric])
            if metric not in self.fitting_metrics
        ]
        if self.primary_metric not in self.metrics:
            wrong.append(
                f"the primary metric '{self.primary_metric}' is not among the metrics {', '.join(self.metrics)}"
            )
        if len(set(self.metrics)) != len(self.metrics):
            wrong.append("the names in 'metrics' must differ")
        return unless_wrong(self, [*wrong, *self.contradictions()])

    def contradictions(self) -> Iterator[str]:
        """What of the kind's own options does not go together."""
        return iter(())

    @property
    def own_options(self) -> dict[str, Any]:
        """The options of this kind alone, as plain values."""
        return {name: value for name, value in self.model_dump().items() if name not in Task.model_fields} | {
            "kind": self.kind
        }

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """What a recipe would say of files whose rows look like this kind's; None where they do not.

        Args:
            profile: the files' columns.
            given: options that are decided already.
        """
        return None

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def columns(self) -> dict[str, ColumnForm]:
        """The columns that are read, and what they hold; those of the labels come last."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Those of `columns` that hold what is right, and that no model is shown."""
        return (list(self.columns)[-1],)

    @property
    @abstractmethod
    def shown_by(self) -> dict[str, Any]:
        """The options that decide what of a row a model is shown, as plain values."""

    @property
    @abstractmethod
    def labelled_by(self) -> dict[str, Any]:
        """The options that decide what a row's labels are, as plain values."""

    @abstractmethod
    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with the columns that are there, each in words that begin with the column.

        Args:
            rows: all rows of a split; row numbers in messages count from 0 within them.
            reading: how class labels are read, where other splits decide it too; otherwise these rows alone do.
        """

    @abstractmethod
    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """The used columns of rows without a problem, with labels as numbers, class indices, or classes as spelt here.

        Args:
            rows: rows of which `problems` tells nothing.
            reading: as there.
        """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes by whose names labels may be given, in index order; none where labels are numbers."""
        return ()

    def folder_rows(self, folder: Path) -> Rows:
        """The rows that a folder of files holds, for kinds whose rows name files.

        Raises:
            UnreadableError: the folder holds none.
        """
        raise NotImplementedError

    def in_folder(self, rows: Rows, folder: Path) -> Rows:
        """Rows of a table in a folder, what they name relative to it by its whole path."""
        return rows

    def named_files(self, rows: Rows) -> list[Path]:
        """The files that rows name, as `in_folder` leaves them; those that do not exist, too."""
        return []

    def label_values(self, rows: Rows) -> LabelValues | None:
        """The distinct labels of a split; None where it has none that could be read in two ways."""
        return None

    @abstractmethod
    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """All labels of usable rows as a model takes them, shape ``(n, ...)``: int64 classes, or float32 numbers.

        Rows of which all labels are the same can tell no good model from a bad one.
        """

    def unseen_classes(self, labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> list[str]:
        """Classes that none of these labels is of.

        Args:
            labels: as `answers` gives them.
        """
        import numpy as np

        names = self.class_names
        return [names[index] for index in np.setdiff1d(np.arange(len(names)), labels).tolist()]

    # ---- examples --------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_processor(self, folder: Path, base: Path | None = None) -> Any:
        """What turns rows into what a model is given: a tokenizer, an image processor.

        Args:
            folder: folder of a model, or of an adapter.
            base: folder of the base model, whose processor an expert without one of its own has.

        Raises:
            PaveError: there is none, or it cannot be used.
        """

    def processor_problem(self, processor: Any) -> str | None:
        """Why a processor cannot be used for this task; None where it can."""
        return None

    def padding(self, config: Any, processor: Any) -> int | None:
        """The token that fills up batches of a model with a configuration; None where a batch needs none."""
        from pave_lightning.tasks.tokenizers import padding_id

        return padding_id(config, processor) if self.reads_tokens else None

    @abstractmethod
    def processor_fingerprint(self, processor: Any) -> str:
        """SHA-256 of all that decides what a processor makes of a row; the same in every process."""

    @abstractmethod
    def encode(self, rows: Mapping[str, list[Any]], processor: Any) -> dict[str, Any]:
        """Rows as lists that a file can hold, one entry a row: what a model is given, ``labels``, and ``length``.

        Args:
            rows: the used columns, see `usable`.
            processor: see `load_processor`.
        """

    def scored_labels(self, encoded: pa.Table) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """The labels that scores count, shape ``(n, ...)``: int64 class indices, or float32 numbers.

        Args:
            encoded: rows as `encode` makes them.
        """
        import numpy as np

        return np.asarray(encoded.column("labels")).copy()  # the file's own memory cannot be written to

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """What holds entries of `encode` in a file, by name, where that is not what Arrow would choose itself."""
        return {}

    def findings(self, encoded: pa.Table, processor: Any, places: npt.NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """What is wrong with encoded rows (of which nothing is left, say), and what is only worth saying.

        Args:
            encoded: rows as `encode` makes them.
            processor: what they were encoded with.
            places: int64 of shape ``(n,)``: the number of each row in its file, counted from 0.
        """
        return [], []

    @abstractmethod
    def collate(self, processor: Any, padding: int | None = None) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """What puts encoded rows into one batch.

        Args:
            processor: see `load_processor`.
            padding: the token that fills up rows, where that is another than the processor's.
        """

    def collate_training(
        self, processor: Any, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """What puts encoded rows into one batch that is only trained on; see `collate`."""
        return self.collate(processor, padding)

    @abstractmethod
    def random_examples(self, processor: Any, count: int, seed: int) -> dict[str, list[Any]]:
        """Examples without any data, without labels, in the form of `encode`.

        Args:
            processor: see `load_processor`.
            count: how many.
            seed: of the draws.
        """

    def singles(self, batch: Batch) -> Iterator[Batch]:
        """The examples of a batch one by one, each a batch without padding; for each of them outputs stand alone.

        Args:
            batch: a batch, all tensors of which begin with its examples.
        """
        mask = self.mask(batch, "")
        for index in range(len(next(iter(batch.values())))):
            yield {
                name: tensor[index : index + 1, mask[index].bool()]
                if mask is not None and tensor.shape == mask.shape
                else tensor[index : index + 1]
                for name, tensor in batch.items()
            }

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Number of outputs of the head for one prediction."""

    @property
    def head_config(self) -> dict[str, Any]:
        """The part of a model's configuration that describes the head; nothing where tasks do not differ in it."""
        return {}

    @classmethod
    def unnamed_head(cls, outputs: int) -> dict[str, Any]:
        """The part of a model's configuration that describes a head of which no more than its size is known."""
        return {"num_labels": outputs} if cls.has_head else {}

    @property
    def head_form(self) -> HeadForm:
        """What a model with this task's head is built from."""
        return HeadForm(self.auto_model, self.peft_type, self.head_config)

    def private_names(self, model: nn.Module) -> set[str]:
        """Names of the parameters that belong to the head and are never merged; none for a model without one.

        Args:
            model: a model that `auto_model` builds.
        """
        from pave_lightning.weights.backbones import name_prefix

        prefix = name_prefix(model)
        return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that a backbone is given; a model with a head is given the same, see `model_inputs`."""
        return {name: value for name, value in batch.items() if name != "labels"}

    @classmethod
    def model_inputs(cls, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a model of `auto_model` is given in order that its backbone is given these inputs."""
        return dict(inputs)

    def mask(self, batch: Batch, module: str) -> Tensor | None:
        """Which positions of what a module is given are data, bool or int64 of shape ``(n, length)``; None for all.

        Args:
            batch: a batch.
            module: the module's dotted name.
        """
        return batch.get("attention_mask")

    def read_positions(self, batch: Batch) -> Tensor | None:
        """The positions whose states the head reads, bool of shape ``(n, length)``; None where the model chooses one.

        Args:
            batch: a batch.
        """
        return None

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head says, floating-point of shape ``(n, output_size)``: one row for each prediction.

        Distillation and calibration match it, so it needs no labels.

        Args:
            model: a model with this kind's head, or a peft model around one.
            batch: a batch; its labels are not looked at.
        """

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """What is right, for each row of `outputs`: shape ``(n,)`` or ``(n, ...)``."""

    @abstractmethod
    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of `outputs`, scalar, float32."""

    def aims(self, targets: Tensor) -> Tensor:
        """What the outputs ought to be, floating-point of shape ``(n, output_size)``, for heads that are fitted to it.

        By the `likelihood`: one-hot classes, whether each output holds, or numbers.

        Args:
            targets: what is right, see `targets`.
        """
        from torch.nn import functional

        if self.likelihood is Likelihood.CATEGORICAL:
            return functional.one_hot(targets, self.output_size).double()
        return targets.reshape(len(targets), self.output_size).double()

    def likelihood_directions(self, outputs: Tensor) -> Tensor:
        r"""Rows whose outer products sum to the Fisher information of the outputs.

        With J the Jacobian of the outputs of one example, the example's Fisher information is
        :math:`\sum_k (J^T v_k)(J^T v_k)^T`.

        Args:
            outputs: of one example, shape ``(n, output_size)``.

        Returns:
            Shape ``(k, n, output_size)``, of the outputs' dtype.
        """
        from pave_lightning.tasks.likelihood import directions

        return directions(self.likelihood, outputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a labelled batch, scalar, float32."""
        return self.output_loss(self.outputs(model, batch), self.targets(batch))

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """What a model predicts for a batch, with or without labels, in one pass; capture looks at that pass."""

    def respond(self, model: nn.Module, batch: Batch, processor: Any) -> Predictions:
        """What a model answers to a batch, as the metrics take it: what it predicts, or the text that it writes.

        Args:
            model: a model with this kind's head, or a peft model around one.
            batch: a batch, with or without labels.
            processor: what its rows were encoded with.
        """
        return self.predict(model, batch)

    def build_metrics(self) -> MetricCollection:
        """The metrics, keyed by their names in the recipe; states add up over batches and processes."""
        from pave_lightning.tasks.metrics import build_metrics

        return build_metrics(self.metrics, self.output_size)

    @property
    def mean_metrics(self) -> tuple[MetricName, ...]:
        """Metrics that are means of what `row_scores` says, and that predictions alone do not tell; kept in this order.

        Empty where predictions are numbers, which tell all.
        """
        return ()

    def row_scores(self, found: Predictions) -> Tensor:
        """What each example of a batch adds to the `mean_metrics`: float64 of shape ``(n, metrics)``.

        Args:
            found: predictions with targets.
        """
        raise NotImplementedError

    def constant_score(self, metric: MetricName, labels: Tensor) -> float:
        """What the best constant answer scores: always the same class, or the same number.

        Args:
            metric: one of the task's metrics.
            labels: the labels that scores count, see `scored_labels`; at least one.
        """
        from pave_lightning.tasks.constant_answers import constant_class

        return constant_class(metric, labels)

    def base_problem(self, config: Any) -> str | None:
        """Why models of a base cannot be used for this task, in words that go on after its class; None where they can.

        Args:
            config: the base's configuration, as transformers reads it.
        """
        return None

    @abstractmethod
    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """What a given expert's configuration says of its head that is not what this task asks.

        Args:
            config: the expert's configuration, as transformers reads it.
            written: the configuration as its file has it.
        """

    def expect_labels(self, batch: Batch) -> None:
        """Make sure that a batch has labels.

        Raises:
            PaveError: it has none.
        """
        if "labels" not in batch:
            raise PaveError(f"task '{self.name}': labels are needed, but the examples have none")


def auto_models(tasks: Iterable[Task]) -> tuple[str, ...]:
    """Names of the classes of transformers that build the tasks' models, each once, in their order."""
    return tuple(dict.fromkeys(task.auto_model for task in tasks))


# ---- kinds -----------------------------------------------------------------------------------------------------------

KindT = TypeVar("KindT", bound=Task)

_registry = Registry[Task]("kind of task", FOLDER, GROUP, several="kinds of task")


def task_kind(kind: type[KindT]) -> type[KindT]:
    """Register a kind of task under the name that its field ``kind`` has by default.

    Raises:
        ValueError: another kind has that name.
    """
    name = kind.model_fields["kind"].default
    if not isinstance(name, str):
        raise ValueError(f'{kind.__name__}: expected a field kind: Literal["name"] = "name"')
    _registry.add(name, kind)
    return kind


def known_kinds() -> dict[str, type[Task]]:
    """All kinds of task by name, sorted; a third party's that cannot be loaded is told and left out."""
    return _registry.known()


def kind_named(name: str) -> type[Task]:
    """The kind of task of that name.

    Raises:
        PaveError: there is none.
    """
    return _registry.named(name)


def kind_of(raw: Any) -> str:
    """The kind of a task or of what describes one; the default where it names none, or one that nobody knows."""
    named = raw.get("kind", DEFAULT) if isinstance(raw, dict) else getattr(raw, "kind", DEFAULT)
    return named if isinstance(named, str) and named in known_kinds() else DEFAULT


def kind_of_adapters(peft_type: str | None, *, reads_tokens: bool = True) -> type[Task]:
    """A kind of task for adapters with a ``task_type`` of peft; the default where none fits.

    Args:
        peft_type: the ``task_type``; None where peft was told none.
        reads_tokens: whether their base is given tokens.
    """
    known = [kind for kind in known_kinds().values() if kind.reads_tokens is reads_tokens]
    fitting = [kind for kind in known if kind.peft_type == peft_type]
    return kind_named(DEFAULT) if kind_named(DEFAULT) in fitting or not fitting else fitting[0]


def any_kind() -> Any:
    """The type of tasks of all kinds, told apart by ``kind``, for pydantic."""
    tagged: list[Any] = [Annotated[kind, Tag(name)] for name, kind in known_kinds().items()]
    return Annotated[reduce(or_, tagged), Discriminator(kind_of)]


@cache
def any_task() -> TypeAdapter[Task]:
    """What makes a task of its kind from plain values."""
    return TypeAdapter(any_kind())
