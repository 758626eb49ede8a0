"""Regression: one number for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pave_lightning.config import Span
from pave_lightning.tasks.classes import head_misfits
from pave_lightning.tasks.heads import Likelihood, Misfit
from pave_lightning.tasks.kinds.texts import SingleLabelTask
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import Rows


@task_kind
class Regression(SingleLabelTask):
    """One number for a text, or for a pair of texts; mean squared error."""

    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("pearson", "spearman")
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("pearson", "spearman")
    likelihood: ClassVar[Likelihood] = Likelihood.GAUSSIAN

    kind: Literal["regression"] = "regression"
    """What is predicted: one number for a text."""
    value_range: Span | None = None
    """Lowest and highest possible label; labels outside are refused."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A text or a pair of texts, and a column of amounts; whole numbers only where name or number say that."""
        from pave_lightning.tasks.profiles import MOST_NUMBERED, SCORES, Holds, Suggestion

        found = cls.judged(profile, given)
        if found is None or not found[1].is_numeric:
            return None
        text, label = found
        amount = (
            label.holds is Holds.NUMBERS
            or label.name.strip().casefold() in SCORES
            or (not label.class_names and len(label.distinct) > MOST_NUMBERED)
        )
        remark = (
            f"found: {label.distinct[0]:g} to {label.distinct[-1]:g}; value_range: [LOWEST, HIGHEST] refuses others"
        )
        return Suggestion({"text": text, "label": label.name}, 35 if amount else 20, remark)

    def contradictions(self) -> Iterator[str]:
        """A range that is none."""
        yield from super().contradictions()
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            yield "'value_range' must be [lowest, highest]"

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading, value_range=self.value_range)

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.float32]:
        """The numbers."""
        import numpy as np

        return np.asarray(rows[self.label], dtype=np.float32)

    @property
    def output_size(self) -> int:
        """One number."""
        return 1

    @property
    def head_config(self) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def chosen(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs.squeeze(-1).float()

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        from torch.nn import functional

        return functional.mse_loss(outputs.squeeze(-1).float(), targets.float())

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Another problem type, or several outputs."""
        return head_misfits(self.head_config, config)
