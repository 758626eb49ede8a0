"""Text classification: one class for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pave_lightning.tasks.kinds.single_answers import OneClassTask
from pave_lightning.tasks.kinds.texts import SingleLabelTask
from pave_lightning.tasks.task import task_kind

if TYPE_CHECKING:
    from pave_lightning.tasks.profiles import Profile, Suggestion


@task_kind
class TextClassification(OneClassTask, SingleLabelTask):
    """One class for a text, or for a pair of texts; cross-entropy."""

    kind: Literal["text_classification"] = "text_classification"
    """What is predicted: one class for a text."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A text or a pair of texts, and a column of values that repeat."""
        from pave_lightning.tasks.profiles import Holds, Suggestion

        found = cls.judged(profile, given)
        if found is None or not found[1].distinct or found[1].holds is Holds.NUMBERS:
            return None
        text, label = found
        remark = "kind: regression, if these are amounts and not classes" if label.is_numeric else ""
        return Suggestion({"text": text, "label": label.name, "classes": label.classes}, 30, remark)
