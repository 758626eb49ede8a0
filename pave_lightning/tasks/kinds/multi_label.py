"""Multi-label classification: any number of classes for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.classes import (
    ClassNames,
    class_contradictions,
    class_list,
    class_misfits,
    classifier_config,
)
from pave_lightning.tasks.heads import Likelihood, Misfit
from pave_lightning.tasks.kinds.texts import TextTask
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor
    from torchmetrics import MetricCollection

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import LabelValues, Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

# How the values of a column are called that says of one class whether it holds.
WHETHER = ("false", "true")


@task_kind
class MultiLabel(TextTask):
    """Any number of classes for a text, or for a pair of texts; binary cross-entropy of each class."""

    fitting_metrics: ClassVar[tuple[MetricName, ...]] = (
        "micro_f1",
        "macro_f1",
        "exact_match",
        "mean_average_precision",
    )
    default_metrics: ClassVar[tuple[MetricName, ...]] = fitting_metrics
    likelihood: ClassVar[Likelihood] = Likelihood.BERNOULLI
    label_key: ClassVar[str] = "labels"

    kind: Literal["multi_label"] = "multi_label"
    """What is predicted: any number of classes for a text."""
    labels: str | list[str] = "labels"
    """The column that holds a list of class indices or names, an empty one where no class holds; or one column for each
    class, in the order of the classes, which holds 1 or true where the class holds and 0 or false where it does not."""
    classes: ClassNames = Field(default=[], validate_default=False)
    """Names of the classes in the order of their indices; lists of labels are read as labels of text classification
    are. By default the names of the columns, where there is one for each class."""

    @model_validator(mode="before")
    @classmethod
    def _class_names(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("classes") is None and isinstance(raw.get("labels"), list):
            raw = {**raw, "classes": list(raw["labels"])}
        return class_list(raw)

    @property
    def flags(self) -> tuple[str, ...]:
        """The columns that say of one class each whether it holds; none where there is a column of lists."""
        return () if isinstance(self.labels, str) else tuple(self.labels)

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A text, and a column of lists of classes; or several columns that say of one class each whether it holds."""
        from pave_lightning.tasks.profiles import LABELS, Holds, Suggestion

        lists = (Holds.LISTS_OF_TEXTS, Holds.LISTS_OF_NUMBERS)
        column = given.get("labels") or profile.named((*LABELS, "tags", "categories", "genres", "topics"), *lists)
        labels = column if isinstance(column, str | list) else None if column is None else column.name
        if labels is None:
            labels = [one.name for one in profile.columns if one.holds is Holds.FLAGS or one.distinct == [0, 1]]
        text = given.get("text") or profile.shown([labels] if isinstance(labels, str) else labels)
        if text is None or len(labels) < 2:
            return None
        if not isinstance(labels, str):
            return Suggestion({"text": text, "labels": labels}, 40)
        listed = profile.column(labels)
        if listed is None or listed.holds not in lists or len(listed.distinct) < 2:
            return None
        return Suggestion({"text": text, "labels": labels, "classes": listed.classes}, 40)

    def contradictions(self) -> Iterator[str]:
        """Classes and columns that do not go together."""
        yield from class_contradictions(self.kind, self.classes, self.metrics)
        if self.flags and len(self.flags) != len(self.classes):
            yield (
                f"'labels' names {len(self.flags)} columns, but there are {len(self.classes)} classes; name one column "
                "for each class, in their order"
            )
        yield from super().contradictions()

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def label_form(self) -> ColumnForm:
        """A list, or whether one class holds."""
        from pave_lightning.tasks.rows import ColumnForm

        return ColumnForm.LABEL if self.flags else ColumnForm.LABELS

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The column of lists, or that of each class."""
        return self.flags or (str(self.labels),)

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The columns of the labels and the classes."""
        return {"kind": self.kind, "labels": self.labels, "classes": self.classes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, where labels may be their names."""
        return () if self.flags else tuple(self.classes)

    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with a column of lists, or with that of one class."""
        return self._flag_problems(rows, name) if self.flags else self._list_problems(rows, name, reading)

    def _flag_problems(self, rows: Rows, name: str) -> Iterator[str]:
        column = self._flag(rows, name)
        problems = column.problems()
        if problems and column.is_plain and not column.missing.any():
            problems = [f"must hold 0 or 1, or false or true, for each row; {problems[0]}"]
        yield from (f"column '{name}' {problem}" for problem in problems)

    def _list_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        from pave_lightning.tasks.lists import list_problems, repeated

        wrong = list(list_problems(rows, name, texts=False, empty=True))
        if not wrong:
            wrong = [f"column '{name}' {found}" for found in self._entries(rows, name, reading).problems()]
        if not wrong:
            wrong = list(repeated(rows, name, self._indices(self._entries(rows, name, reading).usable())))
        yield from wrong

    @staticmethod
    def _flag(rows: Rows, name: str) -> LabelColumn:
        """Whether one class holds, for each row."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, name, None, classes=WHETHER)

    def _entries(self, rows: Rows, name: str, reading: Reading | None) -> LabelColumn:
        """The labels of all lists, of which `list_problems` tells nothing."""
        from pave_lightning.tasks.checks import LabelColumn
        from pave_lightning.tasks.lists import entries

        return LabelColumn(entries(rows, name), name, reading, classes=self.classes)

    def _indices(self, labels: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        from pave_lightning.tasks.labels import class_indices

        return class_indices(labels.to_pylist(), self.classes)

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """The texts, and the classes of each row by their indices, or for each class whether it holds."""
        import numpy as np
        import pyarrow as pa

        from pave_lightning.tasks.labels import class_indices
        from pave_lightning.tasks.lists import list_sizes, with_sizes

        found = {name: rows.columns[name] for name in self.text}
        for name in self.label_columns:
            if self.flags:
                given = class_indices(self._flag(rows, name).usable().to_pylist(), WHETHER)
                found[name] = pa.array(given.astype(np.int8))
            else:
                indices = self._indices(self._entries(rows, name, reading).usable())
                found[name] = with_sizes(pa.array(indices), list_sizes(rows, name))
        return pa.table(found)

    def label_values(self, rows: Rows) -> LabelValues | None:
        """The distinct labels of a split; none where there is one column a class."""
        from pave_lightning.tasks.lists import list_problems

        name = self.label_columns[0]
        if self.flags or name not in rows.columns or rows.own_names is not None:
            return None
        if any(list_problems(rows, name, texts=False, empty=True)):  # told elsewhere
            return None
        labels = self._entries(rows, name, None)
        return labels.values if labels.is_plain else None

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64]:
        """Whether each class holds, 0 or 1, shape ``(n, classes)``."""
        import numpy as np

        if self.flags:
            return np.asarray([rows[name] for name in self.flags], dtype=np.int64).T.copy()
        lists = rows[self.label_columns[0]]
        found = np.zeros((len(lists), len(self.classes)), dtype=np.int64)
        for row, indices in enumerate(lists):
            found[row, indices] = 1
        return found

    # ---- examples --------------------------------------------------------------------------------------------------

    def scored_labels(self, encoded: pa.Table) -> npt.NDArray[np.int64]:
        """Whether each class holds, 0 or 1, shape ``(n, classes)``."""
        import numpy as np

        return np.asarray(encoded.column("labels").to_pylist(), dtype=np.int64).reshape(-1, len(self.classes))

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens and classes."""
        import pyarrow as pa

        return {**super().stored_types, "labels": pa.list_(pa.int8())}

    def unseen_classes(self, labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> list[str]:
        """Classes that hold in no row."""
        return [name for name, count in zip(self.classes, labels.sum(axis=0), strict=True) if not count]

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """One logit a class."""
        return len(self.classes)

    @property
    def head_config(self) -> dict[str, Any]:
        """A classifier with these classes, each by itself."""
        return {**classifier_config(self.classes), "problem_type": "multi_label_classification"}

    @classmethod
    def unnamed_head(cls, outputs: int) -> dict[str, Any]:
        """Each output is a class."""
        return {"num_labels": outputs, "problem_type": "multi_label_classification"}

    def chosen(self, outputs: Tensor) -> Tensor:
        """The probability of each class, float32 of shape ``(n, classes)``; it is predicted above one half."""
        return outputs.float().sigmoid()

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over classes."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(outputs.float(), targets.float())

    def build_metrics(self) -> MetricCollection:
        """See `build_multi_label_metrics`."""
        from pave_lightning.tasks.metrics import build_multi_label_metrics

        return build_multi_label_metrics(self.metrics, self.output_size)

    def constant_score(self, metric: MetricName, labels: Tensor) -> float:
        """What the best set of classes scores that is predicted for every row, or their shares as probabilities."""
        from pave_lightning.tasks.constant_answers import constant_labels

        return constant_labels(metric, labels)

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Another problem type, or other classes."""
        return class_misfits(self.classes, self.head_config, config, written)
