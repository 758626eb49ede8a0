"""Columns of answers that stand in a text, and where they begin: one answer a row, or a list of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pave_lightning.tasks.labels import number_in
from pave_lightning.tasks.reading import is_text
from pave_lightning.tasks.rows import Rows


@dataclass(frozen=True)
class AnswerColumns:
    """The answers of one split.

    Attributes:
        rows: all rows of the split.
        text: the column of the answers' texts.
        start: the column of the characters, counted from 0, at which they begin.
    """

    rows: Rows
    text: str
    start: str

    @cached_property
    def texts(self) -> list[list[Any]]:
        """The texts of each row's answers; none where a row has an empty one alone."""
        found = [_as_list(own) for own in self.rows.columns[self.text].to_pylist()]
        return [[] if len(own) == 1 and _is_blank(own[0]) else own for own in found]

    @cached_property
    def starts(self) -> list[list[int | None]]:
        """Where each row's answers begin; None for what is no whole number, nothing where a row has no answers."""
        told = zip(self.rows.columns[self.start].to_pylist(), self.texts, strict=True)
        return [[_whole(start) for start in _as_list(own)] if texts else [] for own, texts in told]

    def problems(self, *, unanswerable: bool) -> Iterator[str]:
        """What is wrong with the answers by themselves, in words that begin with the column.

        Args:
            unanswerable: whether rows may have no answer.
        """
        texts_name, starts_name, rows = self.text, self.start, self.rows
        kind = rows.columns[texts_name].type
        inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not (is_text(inner) or pa.types.is_null(inner)):
            yield f"column '{texts_name}' must hold texts, or lists of texts, but holds {kind}; name another column"
            return
        texts, starts = self.texts, self.starts
        found = np.asarray([any(map(_is_blank, own)) for own in texts], dtype=np.bool_)
        if found.any():
            yield (f"column '{texts_name}' holds an empty answer beside others in {rows.places(found)}; leave it out")
        none = np.asarray([not own for own in texts], dtype=np.bool_)
        if none.any() and not unanswerable:
            yield (
                f"column '{texts_name}' has no answer in {rows.places(none)}; leave these rows out, or set "
                "unanswerable: true if models may answer with nothing"
            )
        broken = np.asarray([any(start is None or start < 0 for start in own) for own in starts], dtype=np.bool_)
        if broken.any():
            yield (
                f"column '{starts_name}' must hold whole numbers from 0, where answers begin, but does not in "
                f"{rows.places(broken)}; correct these rows"
            )
        unequal = np.asarray([len(own) != len(other) for own, other in zip(texts, starts, strict=True)], dtype=np.bool_)
        if unequal.any():
            row = int(unequal.argmax())
            yield (
                f"columns '{texts_name}' and '{starts_name}' must hold as many entries, but hold "
                f"{len(texts[row])} and {len(starts[row])} in {rows.places(unequal)}; correct these rows"
            )

    def place_problems(self, contexts: Sequence[str]) -> Iterator[str]:
        """Answers that do not stand in their context where they are said to.

        Args:
            contexts: the text of each row; of the answers `problems` tells nothing.
        """
        wrong: dict[int, tuple[str, int | None]] = {}
        for row, (texts, starts) in enumerate(zip(self.texts, self.starts, strict=True)):
            for text, start in zip(texts, starts, strict=True):
                if not contexts[row].startswith(text, start) and row not in wrong:
                    wrong[row] = text, start
        if not wrong:
            return
        flags = np.zeros(self.rows.count, dtype=np.bool_)
        flags[list(wrong)] = True
        row, (text, start) = next(iter(wrong.items()))
        place = contexts[row].find(text)
        instead = "it is nowhere in it" if place < 0 else f"it begins at {place}"
        yield (
            f"column '{self.text}' holds an answer that does not stand in the context where column "
            f"'{self.start}' says, in {self.rows.places(flags)}: {text[:40]!r} is not at {start}, {instead}; correct "
            "or leave out these rows (places are characters, counted from 0)"
        )


def _as_list(value: Any) -> list[Any]:
    """A value, or a list of values, as a list; nothing as an empty one."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_blank(text: str | None) -> bool:
    return text is None or not text.strip()


def _whole(value: Any) -> int | None:
    """A whole number, also one that is written as a text or with a fraction of 0; None for all else."""
    number = number_in(value) if isinstance(value, str) else value
    if number is None or isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None
