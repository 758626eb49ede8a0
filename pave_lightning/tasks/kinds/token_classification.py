"""Token classification: one class for each word of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.classes import (
    ClassNames,
    class_contradictions,
    class_list,
    class_misfits,
    classifier_config,
)
from pave_lightning.tasks.heads import Misfit, Predictions
from pave_lightning.tasks.kinds.tokens import (
    PaddedBatches,
    padding_problem,
    random_tokens,
    token_findings,
    token_types,
    tokenise,
    tokenizer_fingerprint,
    tokenizer_name,
)
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Batch, Task, task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import LabelValues, Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

# The label of tokens that carry none: all but the first one of each word.
UNLABELLED = -100
# Marks, in a batch, the first token of each word.
FIRST = "is_first"


@task_kind
class TokenClassification(Task):
    """One class for each word of a row, which its first token carries; cross-entropy over words."""

    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy", "macro_f1")
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy", "macro_f1")

    kind: Literal["token_classification"] = "token_classification"
    """What is predicted: one class for each word."""
    words: str = "words"
    """The column that holds a list of words."""
    label: str = "labels"
    """The column that holds a list of labels, one a word: class indices or names."""
    classes: ClassNames = Field(default=[], validate_default=False)
    """Names of the classes in the order of their indices; labels are read as those of text classification are."""

    @model_validator(mode="before")
    @classmethod
    def _class_names(cls, raw: Any) -> Any:
        return class_list(raw)

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """Two columns of lists that have as many entries in every row: words, and labels that repeat."""
        from pave_lightning.tasks.profiles import Holds, Suggestion

        lists = [one for one in profile.columns if one.holds in (Holds.LISTS_OF_TEXTS, Holds.LISTS_OF_NUMBERS)]
        for words in lists:
            if words.holds is not Holds.LISTS_OF_TEXTS or given.get("words", words.name) != words.name:
                continue
            for label in lists:
                fits = label.sizes == words.sizes and 2 <= len(label.distinct) < len(words.distinct)
                if label is not words and fits and given.get("label", label.name) == label.name:
                    classes = label.classes
                    if isinstance(classes, list) and "O" in classes and not label.class_names:
                        classes = ["O", *(name for name in classes if name != "O")]
                    return Suggestion({"words": words.name, "label": label.name, "classes": classes}, 60)
        return None

    def contradictions(self) -> Iterator[str]:
        """Classes and columns that do not go together."""
        yield from class_contradictions(self.kind, self.classes, self.metrics)
        if self.label == self.words:
            yield f"'words' and 'label' both name the column '{self.label}'"

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """The words and their labels."""
        from pave_lightning.tasks.rows import ColumnForm

        return {self.words: ColumnForm.TEXTS, self.label: ColumnForm.LABELS}

    @property
    def shown_by(self) -> dict[str, Any]:
        """The column of the words, and where rows are cut."""
        return {"words": self.words, "max_length": self.training.max_length}

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the labels and the classes."""
        return {"kind": self.kind, "label": self.label, "classes": self.classes}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes."""
        return tuple(self.classes)

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with words and labels, and rows that have more of the one than of the other."""
        from pave_lightning.tasks.lists import list_problems, unequal

        there = [name for name in (self.words, self.label) if name in rows.columns]
        wrong = [problem for name in there for problem in list_problems(rows, name, texts=name == self.words)]
        if not wrong and len(there) == 2:
            wrong = list(unequal(rows, self.words, self.label))
        if not wrong and self.label in there:
            wrong = [f"column '{self.label}' {found}" for found in self._labels(rows, reading).problems()]
        yield from wrong

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """The words, and for each its class, as spelt here or by its index."""
        import pyarrow as pa

        from pave_lightning.tasks.lists import list_sizes, with_sizes

        labels = with_sizes(self._labels(rows, reading).usable(), list_sizes(rows, self.label))
        return pa.table({self.words: rows.columns[self.words], self.label: labels})

    def label_values(self, rows: Rows) -> LabelValues | None:
        """The distinct labels of a split."""
        from pave_lightning.tasks.lists import list_problems

        if self.label not in rows.columns or rows.own_names is not None:
            return None
        if any(list_problems(rows, self.label, texts=False)):  # told elsewhere
            return None
        labels = self._labels(rows, None)
        return labels.values if labels.is_plain else None

    def _labels(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of all words of one split, of which `list_problems` tells nothing."""
        from pave_lightning.tasks.checks import LabelColumn
        from pave_lightning.tasks.lists import entries

        return LabelColumn(entries(rows, self.label), self.label, reading, classes=self.classes)

    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """The class indices of all words."""
        return self._indices([label for labels in rows.column(self.label).to_pylist() for label in labels])

    def _indices(self, labels: list[Any]) -> npt.NDArray[np.int64]:
        from pave_lightning.tasks.labels import class_indices

        return class_indices(labels, self.classes)

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer, one that takes words; see `load_tokenizer`."""
        from pave_lightning.tasks.tokenizers import load_tokenizer

        return load_tokenizer(folder, base, words=True)

    def processor_problem(self, processor: PreTrainedTokenizerBase) -> str | None:
        """Why rows could not be padded, or words not be told from tokens."""
        if not processor.is_fast:
            return (
                f"the tokenizer {type(processor).__name__} does not tell which word a token is of; use a fast one "
                "(tokenizer.json)"
            )
        return padding_problem(processor)

    def processor_fingerprint(self, processor: PreTrainedTokenizerBase) -> str:
        """See `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(processor)

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Tokens of words, which of them begin a word, and the labels of these; what is cut off is not scored."""
        tokens = tokenise(processor, rows[self.words], max_length=self.training.max_length, is_split_into_words=True)
        first, labels = [], []
        for index, given in enumerate(rows[self.label]):
            words = tokens.word_ids(index)
            begins = [word is not None and (place == 0 or words[place - 1] != word) for place, word in enumerate(words)]
            classes = self._indices(given)
            first.append([int(found) for found in begins])
            labels.append(
                [int(classes[word]) if found else UNLABELLED for found, word in zip(begins, words, strict=True)]
            )
        lengths = [len(row) for row in first]
        return {**dict(tokens), FIRST: first, "labels": labels, "length": lengths}

    def scored_labels(self, encoded: pa.Table) -> npt.NDArray[np.int64]:
        """The class indices of all words that are left."""
        import numpy as np
        import pyarrow.compute as pc

        labels = np.asarray(pc.list_flatten(encoded.column("labels")), dtype=np.int64)
        scored: npt.NDArray[np.int64] = labels[labels != UNLABELLED]
        return scored

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens."""
        return token_types()

    def findings(
        self, encoded: pa.Table, processor: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[str]]:
        """Rows of which the tokenizer leaves nothing, or nothing that it knows; or no word at all."""
        problems, remarks = token_findings(encoded, processor, places)
        if not problems and not len(self.scored_labels(encoded)):
            problems = [
                f"the tokenizer {tokenizer_name(processor)} leaves no word of any row within training.max_length "
                f"{self.training.max_length}, so there is nothing to learn from and to score; correct the words, or "
                "raise it"
            ]
        return problems, remarks

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads rows, and what belongs to their tokens, to the longest one."""
        return PaddedBatches(processor, padding, others={FIRST: 0, "labels": UNLABELLED})

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Sequences of tokens drawn uniformly from the vocabulary, each a word; see `random_tokens`."""
        rows, drawn = random_tokens(processor, count, self.training.max_length, seed)
        first = [
            [int(place in range(words.start, words.stop)) for place in range(length)]
            for length, words in zip(rows["length"], drawn, strict=True)
        ]
        return {**rows, FIRST: first}

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """One logit a class."""
        return len(self.classes)

    @property
    def head_config(self) -> dict[str, Any]:
        """A classifier of tokens with these classes."""
        return classifier_config(self.classes)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All but labels and what marks words."""
        return {name: value for name, value in batch.items() if name not in ("labels", FIRST)}

    def read_positions(self, batch: Batch) -> Tensor:
        """The first token of each word."""
        return batch[FIRST].bool()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of all words of a batch, shape ``(words, output_size)``."""
        logits: Tensor = model(**self.inputs(batch)).logits
        return logits[self.read_positions(batch)]

    def targets(self, batch: Batch) -> Tensor:
        """The classes of all words of a batch, shape ``(words,)``."""
        self.expect_labels(batch)
        return batch["labels"][self.read_positions(batch)]

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, the mean over words; 0 where a tokenizer leaves no word of any row."""
        from torch.nn import functional

        if not len(targets):
            return outputs.float().sum()
        return functional.cross_entropy(outputs.float(), targets)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """One class for each word."""
        from pave_lightning.tasks.metrics import non_finite_rows

        logits, first = model(**self.inputs(batch)).logits, self.read_positions(batch)
        broken = non_finite_rows(logits.masked_fill(~first[..., None], 0))
        targets = self.targets(batch) if "labels" in batch else None
        return Predictions(logits[first].argmax(dim=-1), targets, broken, examples=first.nonzero()[:, 0])

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Other classes."""
        return class_misfits(self.classes, self.head_config, config, written)
