"""Text classification: one class for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.classes import ClassNames, class_contradictions, class_list, class_misfits, classifier_config
from pave_lightning.tasks.heads import Misfit
from pave_lightning.tasks.kinds.texts import SingleLabelTask
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.rows import Rows


@task_kind
class TextClassification(SingleLabelTask):
    """One class for a text, or for a pair of texts; cross-entropy."""

    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy", "f1", "macro_f1", "matthews")
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy",)

    kind: Literal["text_classification"] = "text_classification"
    """What is predicted: one class for a text."""
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
        yield from class_contradictions(self.kind, self.classes, self.metrics)
        yield from super().contradictions()

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the labels and the classes."""
        return {**super().labelled_by, "classes": self.classes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes."""
        return tuple(self.classes)

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading, classes=self.classes)

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64]:
        """Class indices."""
        from pave_lightning.tasks.labels import class_indices

        return class_indices(rows[self.label], self.classes)

    @property
    def output_size(self) -> int:
        """One logit a class."""
        return len(self.classes)

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

    def likelihood_directions(self, outputs: Tensor) -> Tensor:
        """The class is drawn by the softmax of the logits."""
        from pave_lightning.tasks.likelihood import categorical_directions

        return categorical_directions(outputs)

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Another problem type, or other classes."""
        return class_misfits(self.classes, self.head_config, config, written)
