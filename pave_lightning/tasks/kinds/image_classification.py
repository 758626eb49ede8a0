"""Image classification: one class for an image."""

from __future__ import annotations

from typing import ClassVar, Literal

from pave_lightning.tasks.kinds.images import ImageTask
from pave_lightning.tasks.task import task_kind


@task_kind
class ImageClassification(ImageTask):
    """One class for an image, by a head on the backbone; cross-entropy."""

    auto_model: ClassVar[str] = "AutoModelForImageClassification"

    kind: Literal["image_classification"] = "image_classification"
    """What is predicted: one class for an image."""
