"""Zero-shot image classification: the class whose texts are most like an image, by a model of both (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.heads import Misfit
from pave_lightning.tasks.kinds.images import ImageTask
from pave_lightning.tasks.task import Batch, task_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pave_lightning.tasks.image_processors import ImageProcessor
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.rows import Rows
    from pave_lightning.tasks.text_head import TextHead

# What stands for the class in a template.
PLACE = "{}"


@dataclass(frozen=True)
class ImagesAndClasses:
    """What rows become what a model is given with: the image processor, and the frozen head of the classes.

    Attributes:
        images: prepares the images.
        classes: embeds the classes, when it is first asked for them.
    """

    images: ImageProcessor
    classes: TextHead


@task_kind
class ZeroShotImage(ImageTask):
    """The class whose prompts are most like an image; cross-entropy of the logits, those of SigLIP included.

    The head is made of texts by the base's text side, and neither trained nor merged: fine-tuned and merged is what
    reads the images, with its projection (Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023, keep the
    zero-shot head in the same way). ``training.freeze: [visual_projection]`` leaves the projection as it is, too.
    """

    auto_model: ClassVar[str] = "AutoModelForZeroShotImageClassification"
    has_head: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    headless_because: ClassVar[str] = "their classes are texts, which the base embeds and which stay as they are"

    kind: Literal["zero_shot_image"] = "zero_shot_image"
    """What is predicted: the class whose texts are most like an image."""
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """Prompts, with {} in the place of the class; of several the mean of the embeddings counts."""

    @model_validator(mode="before")
    @classmethod
    def _classes_of_data(cls, raw: Any) -> Any:
        none = isinstance(raw, dict) and raw.get("classes") == []
        return {key: value for key, value in raw.items() if key != "classes"} if none else raw

    def contradictions(self) -> Iterator[str]:
        """Templates without a place for the class, or twice the same."""
        yield from super().contradictions()
        for template in self.templates:
            if template.count(PLACE) != 1:
                yield f"'templates' must have one {PLACE} each, in the place of the class, found {template!r}"
        twice = [one for one in dict.fromkeys(self.templates) if self.templates.count(one) > 1]
        if twice:
            yield f"'templates' has {twice[0]!r} twice"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the recipe names, or else those of the data.

        Raises:
            PaveError: the data cannot be read, or do not name them.
        """
        from pave_lightning.tasks.data import class_names_in_data

        return tuple(self.classes) or class_names_in_data(self)

    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with the labels, and a metric that is for fewer classes than the data name."""
        yield from super().label_problems(rows, name, reading)
        if "f1" in self.metrics and len(self.class_names) > 2:
            yield f"column '{name}' has {len(self.class_names)} classes, and 'f1' is for two; use 'macro_f1'"

    @property
    def shown_by(self) -> dict[str, Any]:
        """The column of the images, and the prompts, which a model is shown beside them."""
        return {**super().shown_by, "classes": list(self.class_names), "templates": self.templates}

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """For each class its prompts."""
        return tuple(tuple(template.replace(PLACE, name) for template in self.templates) for name in self.class_names)

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> ImagesAndClasses:  # type: ignore[override]
        """The image processor of a model, or else of its base, and the classes as the base embeds them.

        Raises:
            PaveError: there is no image processor, or no tokenizer.
        """
        from pave_lightning.tasks.text_head import TextHead

        head = TextHead(folder if base is None else base, self.auto_model, self.prompts)
        _ = head.tokenizer  # which tells that it is missing
        return ImagesAndClasses(super().load_processor(folder, base), head)

    def processor_problem(self, processor: ImagesAndClasses) -> str | None:
        """Prompts that are longer than what the base reads."""
        return processor.classes.problem

    def processor_fingerprint(self, processor: ImagesAndClasses) -> str:  # type: ignore[override]
        """SHA-256 of the settings of the image processor; what is kept of a row has nothing of the prompts."""
        return super().processor_fingerprint(processor.images)

    def encode(self, rows: Mapping[str, list[Any]], processor: ImagesAndClasses) -> dict[str, Any]:  # type: ignore[override]
        """Images as the processor prepares them, and labels."""
        return super().encode(rows, processor.images)

    def collate(  # type: ignore[override]
        self, processor: ImagesAndClasses, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Gives pixels their values, and each batch the embeddings of the classes."""
        from pave_lightning.tasks.text_head import BatchesWithClasses

        return BatchesWithClasses(super().collate(processor.images), processor.classes)

    def random_examples(self, processor: ImagesAndClasses, count: int, seed: int) -> dict[str, list[Any]]:  # type: ignore[override]
        """Images of noise."""
        return super().random_examples(processor.images, count, seed)

    def singles(self, batch: Batch) -> Iterator[Batch]:
        """The images one by one, each with all classes."""
        from pave_lightning.tasks.text_head import HEAD

        shared = {name: batch[name] for name in HEAD if name in batch}
        for single in super().singles({name: tensor for name, tensor in batch.items() if name not in HEAD}):
            yield {**single, **shared}

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def head_config(self) -> dict[str, Any]:
        """Nothing: no configuration names the classes."""
        return {}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The images."""
        from pave_lightning.tasks.text_head import HEAD

        return {name: value for name, value in batch.items() if name not in ("labels", *HEAD)}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the classes, float32 of shape ``(n, classes)``, as the base scales them."""
        import torch

        from pave_lightning.tasks.text_head import BIAS, CLASSES

        found = model.get_image_features(**self.inputs(batch))  # type: ignore[operator]
        pooled: Tensor = getattr(found, "pooler_output", found)
        with torch.autocast(pooled.device.type, enabled=False):  # logits go up to 100, of which bfloat16 keeps little
            embedded = torch.nn.functional.normalize(pooled.float(), dim=-1)
            logits = embedded @ batch[CLASSES].float().T
            return logits + batch[BIAS].float() if BIAS in batch else logits

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """None: no configuration names the classes."""
        return iter(())
