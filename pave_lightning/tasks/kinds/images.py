"""What kinds of task share that give an image one class: images from folders and tables, prepared once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pave_lightning.tasks.kinds.single_answers import OneClassTask
from pave_lightning.tasks.task import Batch

if TYPE_CHECKING:
    import pyarrow as pa

    from pave_lightning.tasks.image_processors import ImageProcessor
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

# What is kept of an image, see `ImageProcessor.prepare`.
KEPT = "pixels"


class ImageTask(OneClassTask):
    """A task that gives an image one class."""

    shown_key: ClassVar[str] = "image"
    peft_type: ClassVar[str | None] = None
    reads_tokens: ClassVar[bool] = False
    names_files: ClassVar[bool] = True
    encoded_at_once: ClassVar[int] = 64

    image: str = "image"
    """The column that holds the image: its content, the path of its file (relative to the table's folder), or what
    `datasets` keeps of an image. Where data.train is a folder, or a split in data.folder is one, its sub-folders are
    the classes."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """Images, or the names of their files, and a column of values that repeat."""
        from pave_lightning.tasks.profiles import LABELS, Holds, Suggestion

        images = [
            one for one in profile.columns if one.holds is Holds.IMAGES and given.get("image", one.name) == one.name
        ]
        known = profile.named((*LABELS, "fine_label", "coarse_label")) or profile.label()
        label = profile.column(str(given["label"])) if "label" in given else known
        if len(images) != 1 or label is None or not label.distinct:
            return None
        return Suggestion({"image": images[0].name, "label": label.name, "classes": label.classes}, 65)

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def shown_columns(self) -> tuple[str, ...]:
        """The column of the images."""
        return (self.image,)

    @property
    def shown_form(self) -> ColumnForm:
        """Images."""
        from pave_lightning.tasks.rows import ColumnForm

        return ColumnForm.IMAGE

    @property
    def shown_by(self) -> dict[str, Any]:
        """The column of the images."""
        return {"image": self.image}

    def folder_rows(self, folder: Path) -> Rows:
        """The images of a folder with one sub-folder a class."""
        from pave_lightning.tasks.images import folder_rows

        return folder_rows(folder, self.image, self.label)

    def in_folder(self, rows: Rows, folder: Path) -> Rows:
        """Paths of images made whole."""
        from dataclasses import replace

        from pave_lightning.tasks.images import beside

        if self.image not in rows.columns:
            return rows
        return replace(rows, columns={**rows.columns, self.image: beside(rows.columns[self.image], folder)})

    def named_files(self, rows: Rows) -> list[Path]:
        """The files of the images that are not in the table itself."""
        from pave_lightning.tasks.images import image_paths

        return image_paths(rows.columns[self.image]) if self.image in rows.columns else []

    def shown_problems(self, rows: Rows, name: str) -> Iterator[str]:
        """Images that are missing or broken."""
        from pave_lightning.tasks.images import image_findings

        problems, remarks = image_findings(rows, name)
        rows.remarks.extend(remarks)
        yield from problems

    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with the labels; classes without an image are only worth saying."""
        import numpy as np

        wrong = list(super().label_problems(rows, name, reading))
        if not wrong and rows.count:
            labels = self.label_column(rows, reading).usable().to_pylist()
            found = np.unique(self.row_labels({name: labels}))
            absent = [one for index, one in enumerate(self.class_names) if index not in found]
            if absent:
                rows.remarks.append(f"no image of the class{'es' * (len(absent) > 1)} {', '.join(absent)}")
        yield from wrong

    def shown(self, rows: Rows) -> dict[str, pa.ChunkedArray]:
        """The images' contents, or the paths of their files."""
        from pave_lightning.tasks.images import sources

        return {self.image: sources(rows.columns[self.image])}

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> ImageProcessor:
        """The image processor; see `load_image_processor`."""
        from pave_lightning.tasks.image_processors import load_image_processor

        return load_image_processor(folder, base)

    def processor_fingerprint(self, processor: ImageProcessor) -> str:
        """SHA-256 of its settings."""
        return processor.fingerprint

    def encode(self, rows: Mapping[str, list[Any]], processor: ImageProcessor) -> dict[str, Any]:
        """Images as the processor prepares them, see `ImageProcessor.prepare`, and labels; all are of one length."""
        from pave_lightning.tasks.images import open_images

        images = open_images(rows[self.image], processor.mode)
        return {KEPT: processor.prepare(images), "labels": self.row_labels(rows), "length": [1] * len(images)}

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Bytes."""
        import pyarrow as pa

        return {KEPT: pa.large_binary()}

    def collate(
        self, processor: ImageProcessor, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Gives the pixels of all images the values that the model is given."""
        from pave_lightning.tasks.image_processors import PixelBatches

        return PixelBatches(processor, KEPT)

    def random_examples(self, processor: ImageProcessor, count: int, seed: int) -> dict[str, list[Any]]:
        """Images of noise."""
        return {KEPT: processor.random(count, seed), "length": [1] * count}
