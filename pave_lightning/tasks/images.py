"""Images as files and as columns of tables: where they are, how they are opened, what is wrong with them."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps, UnidentifiedImageError

from pave_lightning.errors import PaveError, listed, reason, shortened
from pave_lightning.system.files import is_file
from pave_lightning.system.processes import usable_cores
from pave_lightning.tasks.reading import is_text
from pave_lightning.tasks.rows import Rows, UnreadableError
from pave_lightning.tasks.text_files import GIT_POINTER

# Where datasets and others keep an image in a table: its content, or the path of its file.
BYTES, PATH = "bytes", "path"
# Decoding leaves Python's lock, so threads share it; more than these only compete for memory.
MOST_THREADS = 8
# How many are named in a message.
NAMED = 3
# Most characters of a path in a message; a column of encoded contents would be read as paths of any length.
SHOWN_CHARACTERS = 160
BINARY_TYPES: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


def open_image(source: str | bytes, mode: str = "RGB") -> Image.Image:
    """One image as an image processor is given it, as transformers' pipelines open it: turned upright, of one mode.

    Transparency is left out, and of several frames the first is taken. Grey values of 16 bits are divided by 257, so
    that white stays white; Pillow itself would cut them off.

    Args:
        source: the path of its file, or its content.
        mode: Pillow's name of the mode, ``RGB`` or ``L``.

    Raises:
        PaveError: it cannot be read, or is not an image.
    """
    with _quiet():
        return _opened(source, mode)[0]


def open_images(sources: Sequence[str | bytes], mode: str = "RGB") -> list[Image.Image]:
    """As `open_image`, several at once."""
    with _quiet(), _threads(len(sources)) as threads:
        return list(threads.map(lambda source: _opened(source, mode)[0], sources))


def image_findings(rows: Rows, name: str) -> tuple[list[str], list[str]]:
    """What is wrong with a column of images, in words that begin with the column, and what is only worth saying.

    Every image is decoded once.

    Args:
        rows: all rows of a split.
        name: the column: contents, paths, or what `datasets` keeps of an image (``bytes`` and ``path``).
    """
    column = rows.columns[name]
    if not _holds_images(column.type) and not pa.types.is_null(column.type):
        return [
            f"column '{name}' must hold images (contents, paths, or objects with 'bytes' and 'path'), but holds "
            f"{column.type}; name another column"
        ], []
    if absent := _absent_files(column):
        return [_unreadable(name, [f"{_title(path)} ({_no_file(path)})" for path in absent], len(column))], []
    column = sources(column)
    missing = np.asarray(pc.is_null(column).to_numpy(), dtype=np.bool_)
    if missing.any():
        return [f"column '{name}' has no image in {rows.places(missing)}; fill them in or leave these rows out"], []
    found = list(_looked_at(column))
    broken = [(index, fault) for index, fault in enumerate(found) if isinstance(fault, str)]
    if broken:
        titles = [(column[index].as_py(), rows.place(index)) for index, _ in broken]
        told = [
            f"{_title(source) if isinstance(source, str) else place} ({fault})"
            for (source, place), (_, fault) in zip(titles, broken, strict=True)
        ]
        return [_unreadable(name, told, len(found))], []
    return [], list(_mode_remarks(name, Counter(mode for mode in found if isinstance(mode, _Mode))))


def sources(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of images as the contents (large_binary) or the paths (string) of all, null where there is neither."""
    if not pa.types.is_struct(column.type):
        return column.cast(pa.large_binary()) if _is_binary(column.type) else column
    names = [column.type.field(place).name for place in range(column.type.num_fields)]
    if BYTES not in names:
        return pc.struct_field(column, PATH)
    contents = pc.struct_field(column, BYTES).cast(pa.large_binary())
    if PATH not in names or contents.null_count == 0:
        return contents
    paths = pc.struct_field(column, PATH)
    if contents.null_count == len(column):
        return paths
    # Some have their content here and others are files: all are read.
    pairs = zip(contents.to_pylist(), paths.to_pylist(), strict=True)
    read = [Path(path).read_bytes() if one is None and path else one for one, path in pairs]
    return pa.chunked_array([pa.array(read, pa.large_binary())])


def beside(column: pa.ChunkedArray, folder: Path) -> pa.ChunkedArray:
    """A column of images with all paths whole: those that are relative are so to a folder, that of their table."""
    if is_text(column.type):
        return pa.chunked_array([pa.array([_whole(path, folder) for path in column.to_pylist()], pa.string())])
    if not pa.types.is_struct(column.type) or column.type.get_field_index(PATH) < 0:
        return column
    paths = [_whole(path, folder) for path in pc.struct_field(column, PATH).to_pylist()]
    fields = {PATH: pa.array(paths, pa.string())}
    if column.type.get_field_index(BYTES) >= 0:
        contents = pc.struct_field(column, BYTES)
        fields[BYTES] = pa.array(contents.to_pylist(), pa.large_binary())
    return pa.chunked_array([pa.StructArray.from_arrays(list(fields.values()), names=list(fields))])


def image_paths(column: pa.ChunkedArray) -> list[Path]:
    """The files of a column of images that are read for it."""
    if not _holds_images(column.type) or _is_binary(column.type):
        return []
    if is_text(column.type):
        return [Path(path) for path in column.to_pylist() if path is not None]
    rows: list[dict[str, Any] | None] = column.to_pylist()
    return [Path(row[PATH]) for row in rows if row and row.get(BYTES) is None and row.get(PATH)]


def folder_rows(folder: Path, image: str, label: str) -> Rows:
    """The images of a folder with one sub-folder a class, those in sub-folders of these included.

    Args:
        folder: the folder.
        image: name of the column of paths.
        label: name of the column of classes, the names of the sub-folders.

    Returns:
        Rows in the order of classes and paths. Hidden files are left out, and so are those that have no ending of an
        image, or none at all and no image as content; these are told in the remarks.

    Raises:
        UnreadableError: there is no sub-folder, or no image in any of them.
    """
    endings = Image.registered_extensions()
    known = {ending for ending, format_ in endings.items() if format_ in Image.OPEN}
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise UnreadableError(
            f"the folder {folder} has no sub-folders; expected one for each class, with its images, or a file with a "
            "column of paths"
        )
    paths: list[str] = []
    labels: list[str] = []
    others: list[str] = []
    empty: list[str] = []
    for child in classes:
        before = len(paths)
        for file in sorted(_files(child)):
            if file.suffix.lower() in known or (not file.suffix and _is_image(file)):
                paths.append(str(file))
                labels.append(child.name)
            else:
                others.append(str(file.relative_to(folder)))
        if len(paths) == before:
            empty.append(child.name)
    if not paths:
        raise UnreadableError(f"there is no image in the sub-folders of {folder} ({listed(empty, NAMED)})")
    remarks = []
    if others:
        count = "1 file is not an image" if len(others) == 1 else f"{len(others)} files are not images"
        remarks.append(f"{count} and left out: {listed(others, NAMED)}")
    if empty:
        remarks.append(f"no image in {listed(empty, NAMED)}")
    columns = {image: pa.chunked_array([pa.array(paths)]), label: pa.chunked_array([pa.array(labels)])}
    return Rows(columns, len(paths), list(columns), untyped=True, remarks=remarks)


@dataclass(frozen=True)
class _Mode:
    """What kind of image one is: whether something of it is left out or made smaller."""

    transparent: bool
    deep: bool
    moving: bool


def _files(folder: Path) -> Iterator[Path]:
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(place) / name for name in files if not name.startswith("."))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of large images, and of profiles that nobody asked for; around threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(source: str | bytes, mode: str) -> tuple[Image.Image, _Mode]:
    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(content) as opened:
            found = _Mode(
                opened.mode in _TRANSPARENT or "transparency" in opened.info,
                opened.mode.startswith("I") or opened.mode == "F",
                getattr(opened, "n_frames", 1) > 1,
            )
            image: Image.Image = ImageOps.exif_transpose(opened)
            image = _of_8_bits(image) if found.deep else image
            image = image.convert(mode)
            image.load()
    # Decoders raise errors of many kinds for broken content; too many pixels are one of them.
    except UnidentifiedImageError as error:
        raise PaveError(_not_an_image(source)) from error
    except FileNotFoundError as error:
        raise PaveError(_no_file(str(source))) from error
    except IsADirectoryError as error:
        raise PaveError("a folder, not a file") from error
    except OSError as error:
        raise PaveError(error.strerror or reason(error)) from error
    except Exception as error:
        raise PaveError(reason(error)) from error
    return image, found


def _not_an_image(source: str | bytes) -> str:
    """What content is that no decoder knows."""
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            source = file.read(len(GIT_POINTER))
    if not source:
        return "the file is empty"
    if source.startswith(GIT_POINTER):
        return "a pointer of Git LFS and not the image; run: git lfs pull"
    return "not an image"


def _no_file(path: str) -> str:
    """Why there is no file of a path."""
    if _is_address(path):
        return "an address; download the images and give the paths of their files"
    return "no such file" + ("; folders are told apart by / here" if "\\" in path and os.sep == "/" else "")


def _is_image(file: Path) -> bool:
    """Whether some decoder knows what a file holds."""
    try:
        with _quiet(), Image.open(file):
            return True
    except Exception:  # decoders raise errors of many kinds
        return False


def _of_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":  # numbers from 0 to 1, or to 255
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))


def _looked_at(column: pa.ChunkedArray) -> Iterator[_Mode | str]:
    """For each image what kind it is, or why it cannot be read."""

    def look(source: str | bytes) -> _Mode | str:
        try:
            return _opened(source, "RGB")[1]
        except PaveError as error:
            return str(error)

    with _quiet(), _threads(len(column)) as threads:
        for batch in (column.slice(start, 256) for start in range(0, len(column), 256)):
            yield from threads.map(look, batch.to_pylist())


def _mode_remarks(name: str, found: Counter[_Mode]) -> Iterator[str]:
    told = {
        "transparent": "{} with transparency, which is left out, as transformers' pipelines leave it out",
        "deep": "{} with more than 8 bits a channel, which are divided down to 8",
        "moving": "{} with several frames, of which the first is taken",
    }
    for key, words in told.items():
        count = sum(number for mode, number in found.items() if getattr(mode, key))
        if count:
            yield f"column '{name}' has " + words.format(f"{count} image{'s' * (count > 1)}")


def _unreadable(name: str, told: Sequence[str], of: int) -> str:
    """That images of a column cannot be read, the first of them named."""
    count = "1 image" if len(told) == 1 else f"{len(told)} of {of} images"
    return f"column '{name}': {count} cannot be read: {listed(told, NAMED)}; repair or leave them out"


def _title(path: str) -> str:
    return shortened(path, SHOWN_CHARACTERS)


def _threads(work: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(MOST_THREADS, usable_cores(), work)))


def _is_address(path: str) -> bool:
    return "://" in path


def _whole(path: str | None, folder: Path) -> str | None:
    """A path as it is read: from a folder, without blanks around it, which separators of .csv files leave."""
    return path if path is None or _is_address(path) else str(folder / (path.strip() or path))


def _absent_files(column: pa.ChunkedArray) -> list[str]:
    """Files that do not exist, of a column of which some rows have contents and others name files."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index(BYTES) < 0:
        return []
    return [str(path) for path in image_paths(column) if not is_file(path)]


def _is_binary(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in BINARY_TYPES)


def _holds_images(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return is_text(kind) or _is_binary(kind)
    contents, paths = (kind.get_field_index(name) for name in (BYTES, PATH))
    return (contents >= 0 and _is_binary(kind.field(contents).type)) or (paths >= 0 and is_text(kind.field(paths).type))
