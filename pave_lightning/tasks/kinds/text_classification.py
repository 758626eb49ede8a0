"""Text classification: one class for a text, or for a pair of texts."""

from __future__ import annotations

from typing import Literal

from pave_lightning.tasks.kinds.single_answers import OneClassTask
from pave_lightning.tasks.kinds.texts import SingleLabelTask
from pave_lightning.tasks.task import task_kind


@task_kind
class TextClassification(OneClassTask, SingleLabelTask):
    """One class for a text, or for a pair of texts; cross-entropy."""

    kind: Literal["text_classification"] = "text_classification"
    """What is predicted: one class for a text."""
