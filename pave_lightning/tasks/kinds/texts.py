"""What kinds of task that give a whole text one answer share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from pave_lightning.tasks.heads import Predictions
from pave_lightning.tasks.kinds.tokens import (
    PaddedBatches,
    padding_problem,
    random_tokens,
    token_findings,
    token_types,
    tokenise,
    tokenizer_fingerprint,
)
from pave_lightning.tasks.task import Batch, Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import LabelValues, Reading
    from pave_lightning.tasks.rows import ColumnForm, Rows


class TextTask(Task):
    """A task that reads a text, or a pair of texts, and gives the whole of it one answer.

    Attributes:
        label_key: the option that names the columns of labels.
    """

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"

    label_key: ClassVar[str] = "label"

    text: list[str] = Field(min_length=1, max_length=2)
    """The column that holds the text, or the two columns of a text pair."""

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, raw: Any) -> Any:
        return {**raw, "text": [raw["text"]]} if isinstance(raw, dict) and isinstance(raw.get("text"), str) else raw

    def contradictions(self) -> Iterator[str]:
        """Columns that are named twice."""
        both = [name for name in self.label_columns if name in self.text]
        if both:
            keys = f"'text' and '{self.label_key}'"
            yield f"{keys} both name the column '{both[0]}', so the answer would be read with the text"
        for key, names in (("text", self.text), (self.label_key, self.label_columns)):
            twice = [name for name in names if list(names).count(name) > 1]
            if twice:
                yield f"'{key}' names the column '{twice[0]}' twice"

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """The texts, and the labels."""
        from pave_lightning.tasks.rows import ColumnForm

        return {**dict.fromkeys(self.text, ColumnForm.TEXT), **dict.fromkeys(self.label_columns, self.label_form)}

    @property
    def label_form(self) -> ColumnForm:
        """What the columns of labels hold."""
        from pave_lightning.tasks.rows import ColumnForm

        return ColumnForm.LABEL

    @property
    @abstractmethod
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels."""

    @property
    def shown_by(self) -> dict[str, Any]:
        """The columns of the texts, and where they are cut."""
        return {"text": self.text, "max_length": self.training.max_length}

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with texts and labels."""
        from pave_lightning.tasks.checks import text_problems

        for name in self.text:
            if name in rows.columns:
                yield from text_problems(rows, name)
        for name in self.label_columns:
            if name in rows.columns:
                yield from self.label_problems(rows, name, reading)

    @abstractmethod
    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with a column of labels, in words that begin with the column."""

    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """The labels of usable rows as a model takes them."""
        return self.row_labels({name: rows.column(name).to_pylist() for name in self.label_columns})

    @abstractmethod
    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """Checked labels as a model takes them, shape ``(n, ...)``, from the columns of usable rows."""

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

    # ---- models ----------------------------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The head's logits, shape ``(n, output_size)``."""
        logits: Tensor = model(**self.inputs(batch)).logits
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """The labels."""
        self.expect_labels(batch)
        return batch["labels"]

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """One prediction for each text."""
        from pave_lightning.tasks.metrics import non_finite_rows

        outputs = self.outputs(model, batch)
        return Predictions(self.chosen(outputs), batch.get("labels"), non_finite_rows(outputs))

    @abstractmethod
    def chosen(self, outputs: Tensor) -> Tensor:
        """What the outputs, shape ``(n, output_size)``, predict: shape ``(n, ...)``."""


class SingleLabelTask(TextTask):
    """A text task whose answer is one label: a class, or a number."""

    label: str = "label"
    """The column that holds the label: class indices or names, or numbers for regression."""

    @classmethod
    def unnamed_head(cls, outputs: int) -> dict[str, Any]:
        """One output is a number, more are classes."""
        return {"num_labels": outputs, "problem_type": "regression" if outputs == 1 else "single_label_classification"}

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The column of the labels."""
        return (self.label,)

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the labels, and what they mean."""
        return {"kind": self.kind, "label": self.label}

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn

        return LabelColumn(rows, self.label, reading)

    def label_problems(self, rows: Rows, name: str, reading: Reading | None) -> Iterator[str]:
        """What is wrong with the labels."""
        yield from (f"column '{name}' {found}" for found in self.label_column(rows, reading).problems())

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """The texts, and the labels as numbers, class indices, or classes as spelt here."""
        import pyarrow as pa

        texts = {name: rows.columns[name] for name in self.text}
        return pa.table({**texts, self.label: self.label_column(rows, reading).usable()})

    def label_values(self, rows: Rows) -> LabelValues | None:
        """The distinct labels of a split."""
        if self.label not in rows.columns or rows.own_names is not None:
            return None
        labels = self.label_column(rows, None)
        return labels.values if labels.is_plain else None
