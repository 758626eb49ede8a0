"""What kinds of task share that give the whole of an example one answer, whatever an example is: text or image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from pave_lightning.tasks.classes import ClassNames, class_contradictions, class_list, class_misfits, classifier_config
from pave_lightning.tasks.heads import Misfit, Predictions
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Batch, Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import LabelValues, Reading
    from pave_lightning.tasks.rows import ColumnForm, Rows


class SingleAnswerTask(Task):
    """A task that gives the whole of an example one answer.

    Attributes:
        shown_key: the option that names the columns of what a model is shown.
        label_key: the option that names the columns of labels.
    """

    shown_key: ClassVar[str]
    label_key: ClassVar[str] = "label"

    def contradictions(self) -> Iterator[str]:
        """Columns that are named twice."""
        both = [name for name in self.label_columns if name in self.shown_columns]
        if both:
            keys = f"'{self.shown_key}' and '{self.label_key}'"
            yield f"{keys} both name the column '{both[0]}', so the answer would be read with the {self.shown_key}"
        for key, names in ((self.shown_key, self.shown_columns), (self.label_key, self.label_columns)):
            twice = [name for name in names if list(names).count(name) > 1]
            if twice:
                yield f"'{key}' names the column '{twice[0]}' twice"

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """What a model is shown, and the labels."""
        return {
            **dict.fromkeys(self.shown_columns, self.shown_form),
            **dict.fromkeys(self.label_columns, self.label_form),
        }

    @property
    @abstractmethod
    def shown_columns(self) -> tuple[str, ...]:
        """The columns of what a model is shown."""

    @property
    @abstractmethod
    def shown_form(self) -> ColumnForm:
        """What the columns hold that a model is shown."""

    @property
    def label_form(self) -> ColumnForm:
        """What the columns of labels hold."""
        from pave_lightning.tasks.rows import ColumnForm

        return ColumnForm.LABEL

    @property
    @abstractmethod
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels."""

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with what a model is shown, and with labels."""
        for name in self.shown_columns:
            if name in rows.columns:
                yield from self.shown_problems(rows, name)
        for name in self.label_columns:
            if name in rows.columns:
                yield from self.label_problems(rows, name, reading)

    @abstractmethod
    def shown_problems(self, rows: Rows, name: str) -> Iterator[str]:
        """What is wrong with a column that a model is shown, in words that begin with the column."""

    @abstractmethod
    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with a column of labels, in words that begin with the column."""

    def shown(self, rows: Rows) -> dict[str, pa.ChunkedArray]:
        """The columns that a model is shown, of rows without a problem."""
        return {name: rows.columns[name] for name in self.shown_columns}

    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """The labels of usable rows as a model takes them."""
        return self.row_labels({name: rows.column(name).to_pylist() for name in self.label_columns})

    @abstractmethod
    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """Checked labels as a model takes them, shape ``(n, ...)``, from the columns of usable rows."""

    # ---- models ----------------------------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The head's logits, shape ``(n, output_size)``."""
        logits: Tensor = model(**self.inputs(batch)).logits
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """The labels."""
        self.expect_labels(batch)
        return batch["labels"]

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """One prediction for each example."""
        from pave_lightning.tasks.metrics import non_finite_rows

        outputs = self.outputs(model, batch)
        return Predictions(self.chosen(outputs), batch.get("labels"), non_finite_rows(outputs))

    @abstractmethod
    def chosen(self, outputs: Tensor) -> Tensor:
        """What the outputs, shape ``(n, output_size)``, predict: shape ``(n, ...)``."""


class OneLabelTask(SingleAnswerTask):
    """A task whose answer is one label: a class, or a number."""

    label: str = "label"
    """The column that holds the label: class indices or names, or numbers for regression."""

    @classmethod
    def unnamed_head(cls, outputs: int) -> dict[str, Any]:
        """One output is a number, more are classes."""
        return {"num_labels": outputs, "problem_type": "regression" if outputs == 1 else "single_label_classification"}

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The column of the labels."""
        return (self.label,)

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the labels, and what they mean."""
        return {"kind": self.kind, "label": self.label}

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading)

    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with the labels."""
        yield from (f"column '{name}' {found}" for found in self.label_column(rows, reading).problems())

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """What a model is shown, and the labels as numbers, class indices, or classes as spelt here."""
        import pyarrow as pa

        return pa.table({**self.shown(rows), self.label: self.label_column(rows, reading).usable()})

    def label_values(self, rows: Rows) -> LabelValues | None:
        """The distinct labels of a split."""
        if self.label not in rows.columns or rows.own_names is not None:
            return None
        labels = self.label_column(rows, None)
        return labels.values if labels.is_plain else None


class OneClassTask(OneLabelTask):
    """A task whose answer is one class; cross-entropy.

    Attributes:
        needs_classes: whether a recipe must name the classes.
    """

    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy", "f1", "macro_f1", "matthews")
    needs_classes: ClassVar[bool] = True
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy",)

    classes: ClassNames = Field(default=[], validate_default=False)
    """Names of the classes in the order of their indices. Labels that are texts are compared with the names first,
    ignoring case where no two names differ by it alone, and are indices where all of them are; labels that are numbers
    are indices, unless the names look like numbers."""

    @model_validator(mode="before")
    @classmethod
    def _class_names(cls, raw: Any) -> Any:
        return class_list(raw)

    def contradictions(self) -> Iterator[str]:
        """Classes and metrics that do not go together."""
        if self.classes or self.needs_classes:
            yield from class_contradictions(self.kind, self.classes, self.metrics)
        yield from super().contradictions()

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the labels and the classes."""
        return {**super().labelled_by, "classes": list(self.class_names)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes."""
        return tuple(self.classes)

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading, classes=self.class_names)

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64]:
        """Class indices."""
        from pave_lightning.tasks.labels import class_indices

        return class_indices(rows[self.label], self.class_names)

    @property
    def output_size(self) -> int:
        """One logit a class."""
        return len(self.class_names)

    @property
    def head_config(self) -> dict[str, Any]:
        """A classifier with these classes."""
        return {**classifier_config(self.classes), "problem_type": "single_label_classification"}

    def chosen(self, outputs: Tensor) -> Tensor:
        """The class of the largest logit."""
        return outputs.argmax(dim=-1)

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        from torch.nn import functional

        return functional.cross_entropy(outputs.float(), targets)

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Another problem type, or other classes."""
        return class_misfits(self.classes, self.head_config, config, written)
