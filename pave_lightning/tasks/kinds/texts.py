"""What kinds of task that give a whole text one answer share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from pave_lightning.tasks.kinds.single_answers import OneLabelTask, SingleAnswerTask
from pave_lightning.tasks.kinds.tokens import (
    PaddedBatches,
    padding_problem,
    random_tokens,
    token_findings,
    token_types,
    tokenise,
    tokenizer_fingerprint,
)
from pave_lightning.tasks.task import Batch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.profiles import Column, Profile
    from pave_lightning.tasks.rows import ColumnForm, Rows


class TextTask(SingleAnswerTask):
    """A task that reads a text, or a pair of texts, and gives the whole of it one answer."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"

    shown_key: ClassVar[str] = "text"

    text: list[str] = Field(min_length=1, max_length=2)
    """The column that holds the text, or the two columns of a text pair."""

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, raw: Any) -> Any:
        return {**raw, "text": [raw["text"]]} if isinstance(raw, dict) and isinstance(raw.get("text"), str) else raw

    @classmethod
    def judged(cls, profile: Profile, given: Mapping[str, Any]) -> tuple[list[str], Column] | None:
        """The columns of the text, and the column of one label a row, that files seem to have; None where open."""
        text = given.get("text")
        names = [text] if isinstance(text, str) else list(text or ())
        label = profile.column(str(given["label"])) if "label" in given else profile.label(names)
        if label is None:
            return None
        names = names or profile.shown([label.name]) or []
        return (names, label) if names else None

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def shown_columns(self) -> tuple[str, ...]:
        """The columns of the texts."""
        return tuple(self.text)

    @property
    def shown_form(self) -> ColumnForm:
        """Texts."""
        from pave_lightning.tasks.rows import ColumnForm

        return ColumnForm.TEXT

    @property
    def shown_by(self) -> dict[str, Any]:
        """The columns of the texts, and where they are cut."""
        return {"text": self.text, "max_length": self.training.max_length}

    def shown_problems(self, rows: Rows, name: str) -> Iterator[str]:
        """What is wrong with a column of texts."""
        from pave_lightning.tasks.checks import text_problems

        yield from text_problems(rows, name)

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer; see `load_tokenizer`."""
        from pave_lightning.tasks.tokenizers import load_tokenizer

        return load_tokenizer(folder, base)

    def processor_problem(self, processor: PreTrainedTokenizerBase) -> str | None:
        """Why rows could not be padded."""
        return padding_problem(processor)

    def processor_fingerprint(self, processor: PreTrainedTokenizerBase) -> str:
        """See `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(processor)

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Tokens of texts or pairs, labels, and lengths in tokens."""
        texts = [rows[name] for name in self.text]
        tokens = dict(tokenise(processor, *texts, max_length=self.training.max_length))
        lengths = [len(mask) for mask in tokens["attention_mask"]]
        return {**tokens, "labels": self.row_labels(rows), "length": lengths}

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens."""
        return token_types()

    def findings(
        self, encoded: pa.Table, processor: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[str]]:
        """Rows of which the tokenizer leaves nothing, or nothing that it knows."""
        return token_findings(encoded, processor, places)

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads rows to the longest one."""
        return PaddedBatches(processor, padding)

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Sequences of tokens drawn uniformly from the vocabulary; see `random_tokens`."""
        return random_tokens(processor, count, self.training.max_length, seed)[0]


class SingleLabelTask(OneLabelTask, TextTask):
    """A text task whose answer is one label: a class, or a number."""
