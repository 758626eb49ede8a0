"""The image processor of a model folder, and images as it prepares them: once, as bytes, and in batches of tensors."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pave_lightning.errors import PaveError, foreign
from pave_lightning.system.files import check_sizes
from pave_lightning.system.keeping import kept

if TYPE_CHECKING:
    from torch import Tensor

# Where processors keep their settings; the second one holds those of several (CLIP).
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PIXELS = "pixel_values"
# What an image processor does last, value by value.
LAST_STEPS = ("do_rescale", "do_normalize")
# Sizes of the images, (width, height), by which it is found out what a processor does.
PROBED_SIZES = ((48, 40), (31, 57))


def has_image_processor(folder: Path) -> bool:
    """Whether a model folder holds the settings of an image processor."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def copy_image_processor(folder: Path, base: Path, target: Path) -> None:
    """Put the settings of the image processor of a model, or else of its base, into another folder; if there are any.

    Args:
        folder: folder of the model.
        base: folder of its base.
        target: an existing folder.
    """
    origin = folder if has_image_processor(folder) else base
    for name in PROCESSOR_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


def load_image_processor(folder: Path, base: Path | None = None) -> ImageProcessor:
    """The image processor of a model folder, in the form that needs no torchvision.

    Inside of `keeping` it is read once, and must not be changed.

    Args:
        folder: folder of a model, or of an adapter.
        base: folder of the base model, whose processor an expert without one of its own has.

    Raises:
        PaveError: there is none, or it cannot be read.
    """
    place = folder if base is None or has_image_processor(folder) else base
    return kept(("image processor", place), lambda: ImageProcessor(_read(place), place))


@dataclass(frozen=True)
class PixelForm:
    """How prepared images are kept.

    Attributes:
        shape: channels, height and width.
        values: float32 of shape ``(channels, 256)``: what the processor makes of each byte, where bytes are kept;
            None where its float32 values are.
    """

    shape: tuple[int, int, int]
    values: npt.NDArray[np.float32] | None

    @property
    def dtype(self) -> npt.DTypeLike:
        """What is kept of each value."""
        return np.float32 if self.values is None else np.uint8


class ImageProcessor:
    """An image processor of transformers, whose last steps (rescaling, normalising) can be left for later.

    What comes before them, as a rule to resize and to crop, gives bytes. These are kept, a quarter of the size of what
    a model is given, and a table of 256 values a channel makes that of them, to the last bit. Where a processor is
    built otherwise, what it gives is kept itself.

    Args:
        processor: a processor with the PIL backend.
        folder: where it was read, for messages.
    """

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor, self.folder = processor, folder

    @cached_property
    def mode(self) -> str:
        """Pillow's name of the mode that it is given: grey where it normalises one channel, else colours."""
        mean = getattr(self.processor, "image_mean", None)
        return "L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all its settings."""
        return hashlib.sha256(f"{type(self.processor).__name__} {self.processor.to_json_string()}".encode()).hexdigest()

    @cached_property
    def form(self) -> PixelForm:
        """How what it prepares is kept.

        Raises:
            PaveError: it gives images of different sizes, or more than their pixels.
        """
        drawn = np.random.default_rng(0)
        images = [self._drawn(drawn, width, height) for width, height in PROBED_SIZES]
        whole = [self._whole(image) for image in images]
        shapes = {one.shape for one in whole}
        if len(shapes) > 1 or len(whole[0].shape) != 3:
            found = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
            raise PaveError(
                f"{self.folder}: its image processor makes images of {found} of images of different sizes, but a batch "
                f"needs one size; set 'do_resize' and 'size' (height and width) in {PROCESSOR_FILES[0]}"
            )
        shape = whole[0].shape
        values = self._table(shape[0])
        if values is not None:
            first = [self._first_steps(image) for image in images]
            exact = all(one.dtype == np.uint8 and one.shape == shape for one in first) and all(
                np.array_equal(_looked_up(values, one[None])[0], other) for one, other in zip(first, whole, strict=True)
            )
            values = values if exact else None
        return PixelForm(shape, values)

    def prepare(self, images: Sequence[Image.Image]) -> list[bytes]:
        """Images as they are kept, see `PixelForm`; all of one length."""
        form = self.form
        make = self._whole if form.values is None else self._first_steps
        return [np.ascontiguousarray(make(image), dtype=form.dtype).tobytes() for image in images]

    def pixels(self, kept_images: Sequence[bytes]) -> Tensor:
        """What a model is given of images that `prepare` made: float32 of shape ``(n, channels, height, width)``."""
        import torch

        form = self.form
        stored = np.frombuffer(b"".join(kept_images), dtype=form.dtype).reshape(len(kept_images), *form.shape)
        return torch.from_numpy(stored.copy() if form.values is None else _looked_up(form.values, stored))

    def random(self, count: int, seed: int) -> list[bytes]:
        """Images of noise, each byte drawn uniformly, as `prepare` makes them."""
        _, height, width = self.form.shape
        drawn = np.random.default_rng(seed)
        return self.prepare([self._drawn(drawn, width, height) for _ in range(count)])

    def _drawn(self, drawn: np.random.Generator, width: int, height: int) -> Image.Image:
        bands = () if self.mode == "L" else (3,)
        return Image.fromarray(drawn.integers(0, 256, (height, width, *bands), dtype=np.uint8))

    def _table(self, channels: int) -> npt.NDArray[np.float32] | None:
        """What its last steps make of each byte in each channel, ``(channels, 256)``; None where they refuse."""
        bytes_ = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256)).copy()
        nothing_else = dict.fromkeys(("do_resize", "do_center_crop", "do_pad", "do_convert_rgb"), False)
        try:
            made = self.processor(bytes_, input_data_format="channels_first", **nothing_else)
            return np.asarray(made[PIXELS][0], dtype=np.float32).reshape(channels, 256)
        except (ValueError, TypeError, KeyError, IndexError):
            return None

    def _whole(self, image: Image.Image) -> npt.NDArray[np.float32]:
        return self._run(image).astype(np.float32)

    def _first_steps(self, image: Image.Image) -> npt.NDArray[Any]:
        return self._run(image, **dict.fromkeys(LAST_STEPS, False))

    def _run(self, image: Image.Image, **changes: Any) -> npt.NDArray[Any]:
        with foreign(f"{self.folder}: its image processor fails"):
            made = self.processor(image, **changes)
            pixels = np.asarray(made[PIXELS][0]) if list(made) == [PIXELS] else None
        if pixels is None:
            raise PaveError(
                f"{self.folder}: its image processor gives {', '.join(made)}, but only {PIXELS} can be kept; such "
                "models are not supported yet"
            )
        return pixels


class PixelBatches:
    """Puts kept images and their labels into one batch.

    Args:
        processor: made what is kept.
        key: the name of what is kept in rows.
    """

    def __init__(self, processor: ImageProcessor, key: str) -> None:
        self.processor, self.key = processor, key

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch: ``pixel_values``, float32 of shape ``(n, channels, height, width)``, and ``labels`` if any."""
        import torch

        batch = {PIXELS: self.processor.pixels([row[self.key] for row in rows])}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def _looked_up(values: npt.NDArray[np.float32], pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Bytes of shape ``(n, channels, height, width)`` as the float32 values of a table ``(channels, 256)``."""
    found = np.empty(pixels.shape, dtype=np.float32)
    for channel, table in enumerate(values):
        np.take(table, pixels[:, channel], out=found[:, channel], mode="clip")
    return found


def _read(folder: Path) -> Any:
    from transformers import AutoImageProcessor
    from transformers.utils import logging as transformers_logging

    if not has_image_processor(folder):
        raise PaveError(
            f"{folder}: there is no image processor ({PROCESSOR_FILES[0]}), which says how images are resized and "
            "normalised; copy it from the model that it was made of"
        )
    check_sizes(folder)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # torchvision is not needed
    try:
        with (
            warnings.catch_warnings(),
            foreign(f"{folder}: its image processor could not be loaded without torchvision"),
        ):
            warnings.simplefilter("ignore")
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    finally:
        transformers_logging.set_verbosity(verbosity)
