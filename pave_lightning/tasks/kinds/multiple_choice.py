"""Multiple choice: which of several endings or answers goes with a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.heads import Likelihood, Misfit, Predictions
from pave_lightning.tasks.kinds.sequences import (
    EXAMPLE_OF,
    SequencesTask,
    by_example,
    longest,
    nested,
    places_within,
    random_sequences,
)
from pave_lightning.tasks.kinds.tokens import tokenise
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Batch, task_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.checks import LabelColumn
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

# How many choices examples without data have.
RANDOM_CHOICES = 4


# Usual names of columns, in lower case.
CHOICES = ("choices", "options", "endings", "candidates", "answers")
ANSWERS = ("label", "answer", "answerkey", "answer_key", "answer_idx", "target", "gold", "correct", "cop")
ASKED = (("sent1", "sent2"), ("article", "question"), ("passage", "question"), ("context", "question"))
ASKED_ALONE = ("question", "ctx", "context", "premise", "stem", "goal", "text", "prompt", "sentence")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def likely_choices(profile: Profile) -> str | list[str] | None:
    """The column of lists of choices, or those of texts whose names are one word with numbers or letters behind it."""
    from pave_lightning.tasks.profiles import Holds

    listed = profile.named(CHOICES, Holds.LISTS_OF_TEXTS)
    if listed is not None:
        return listed.name
    inside = profile.named(CHOICES, Holds.LISTS_OF_OBJECTS, Holds.OBJECTS)
    if inside is not None and "text" in inside.keys:
        return f"{inside.name}.text"
    numbered: dict[str, list[str]] = {}
    for column in profile.texts():
        found = re.fullmatch(r"(.*?)[ _-]?([0-9]|[A-Ha-h])", column.name)
        if found is not None:
            numbered.setdefault(found[1], []).append(column.name)
    likely = [names for word, names in numbered.items() if len(names) > 2 or word.casefold() in (*CHOICES, *SINGLE)]
    return sorted(likely[0]) if len(likely) == 1 and len(likely[0]) > 1 else None


SINGLE = ("choice", "option", "ending", "candidate", "solution", "sol")


def choice_count(profile: Profile, choices: str | list[str]) -> int | None:
    """How many choices every row has; None where rows differ, or there are none."""
    if not isinstance(choices, str):
        return len(choices)
    name, _, key = choices.partition(".")
    column = profile.column(choices) or profile.column(name)
    if column is None:
        return None
    values = [own.get(key) if key and isinstance(own, dict) else own for own in column.values]
    counts = {len(own) if isinstance(own, list) else 0 for own in values}
    return counts.pop() if len(counts) == 1 else None


def asked_text(profile: Profile, without: Sequence[str]) -> list[str] | None:
    """The column, or two, of the text that choices go with; None where several are as likely."""
    texts = {column.name.casefold(): column.name for column in profile.texts(without)}
    for pair in ASKED:
        if all(name in texts for name in pair):
            return [texts[name] for name in pair]
    known = [texts[name] for name in ASKED_ALONE if name in texts]
    if len(texts) == 1 or known:
        return known[:1] or list(texts.values())
    return None


def choice_names(written: Sequence[str], count: int) -> list[str]:
    """Names of all choices, of which labels name some: letters, or numbers counted from 1."""
    for names in (list(LETTERS[:count]), list(LETTERS[:count].lower()), [str(one + 1) for one in range(count)]):
        if set(written) <= set(names):
            return names
    return list(written)


@task_kind
class MultipleChoice(SequencesTask):
    """One of several choices for a text; each is read with the text, and the softmax is over the choices of a row."""

    auto_model: ClassVar[str] = "AutoModelForMultipleChoice"
    # peft has no type of its own; this one keeps a classifier whole, and changes nothing else.
    peft_type: ClassVar[str] = "SEQ_CLS"
    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy",)
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("accuracy",)
    likelihood: ClassVar[Likelihood] = Likelihood.JOINT

    kind: Literal["multiple_choice"] = "multiple_choice"
    """What is predicted: one of several choices for a text."""
    choices: str | list[str]
    """The column that holds a list of choices, of one length in all rows, or one column for each choice. Models read
    each choice with the text; where 'text' names two columns, the second stands in front of each choice, as the
    beginning of a sentence that it ends does, or as a question about a passage."""
    choice_names: list[str] = Field(default=[])
    """Names of the choices, such as [A, B, C, D], where labels are names. By default the names of the columns, where
    there is one for each choice."""
    label: str = "label"
    """The column that holds the right choice: its index, counted from 0, or its name."""

    @model_validator(mode="before")
    @classmethod
    def _plain_names(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("choice_names"), list):
            return raw
        names = [
            str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in raw["choice_names"]
        ]
        return {**raw, "choice_names": names}

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A text, choices in a column of lists or in columns that are numbered, and which of them is right."""
        from pave_lightning.tasks.profiles import Suggestion

        choices = given.get("choices") or likely_choices(profile)
        if choices is None:
            return None
        count = choice_count(profile, choices)
        columns = [choices.partition(".")[0]] if isinstance(choices, str) else list(choices)
        label = profile.column(str(given["label"])) if "label" in given else profile.named(ANSWERS)
        text = given.get("text") or asked_text(profile, [*columns, *([] if label is None else [label.name])])
        if count is None or label is None or text is None or not 2 <= len(label.distinct) <= count:
            return None
        options = {"text": text, "choices": choices, "label": label.name}
        written = [str(value) for value in label.distinct]
        counted = all(value.isdecimal() and int(value) < count for value in written)
        if not counted and not (isinstance(choices, list) and set(written) <= set(choices)):
            options["choice_names"] = choice_names(written, count)
        return Suggestion(options, 70)

    @property
    def choice_columns(self) -> tuple[str, ...]:
        """The column of lists, or that of each choice."""
        return (self.choices,) if isinstance(self.choices, str) else tuple(self.choices)

    def contradictions(self) -> Iterator[str]:
        """Columns and names that do not go together."""
        yield from super().contradictions()
        columns = self.choice_columns
        twice = [name for name in columns if columns.count(name) > 1 or name in self.text or name == self.label]
        if twice:
            yield f"'choices' names the column '{twice[0]}', which is named a second time"
        if not isinstance(self.choices, str) and len(columns) < 2:
            yield "'choices' must name a column of lists, or two columns or more"
        if len(set(self.choice_names)) != len(self.choice_names):
            yield "the names in 'choice_names' must differ"
        if self.choice_names and not isinstance(self.choices, str) and len(self.choice_names) != len(columns):
            yield f"'choice_names' holds {len(self.choice_names)} names for {len(columns)} columns of choices"

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """The texts, the choices and the label."""
        from pave_lightning.tasks.rows import ColumnForm

        form = ColumnForm.TEXTS if isinstance(self.choices, str) else ColumnForm.TEXT
        shown = {**dict.fromkeys(self.text, ColumnForm.TEXT), **dict.fromkeys(self.choice_columns, form)}
        return {**shown, self.label: ColumnForm.LABEL}

    @property
    def shown_by(self) -> dict[str, Any]:
        """The columns of texts and choices, and where they are cut."""
        return {**super().shown_by, "choices": self.choices}

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the label, and the names of the choices."""
        return {**super().labelled_by, "choice_names": self.choice_names}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the choices, where they have any."""
        own = () if isinstance(self.choices, str) else tuple(self.choices)
        return tuple(self.choice_names) or own

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with texts, choices and labels, and rows with other numbers of choices."""
        from pave_lightning.tasks.checks import text_problems
        from pave_lightning.tasks.lists import list_problems

        texts = [*self.text, *(() if isinstance(self.choices, str) else self.choices)]
        for name in texts:
            if name in rows.columns:
                yield from text_problems(rows, name)
        if isinstance(self.choices, str) and self.choices in rows.columns:
            wrong = list(list_problems(rows, self.choices, texts=True)) or list(
                self._count_problems(rows, self.choices)
            )
            yield from wrong
            if wrong:  # without the number of choices no label can be read
                return
        if self.label in rows.columns and all(name in rows.columns for name in self.choice_columns):
            yield from self.label_problems(rows, self.label, reading)

    def _count_problems(self, rows: Rows, name: str) -> Iterator[str]:
        from pave_lightning.tasks.lists import list_sizes

        sizes = list_sizes(rows, name)
        expected = len(self.choice_names) or int(sizes[0])
        if expected < 2:
            yield f"column '{name}' must hold two choices or more, but holds {expected} in {rows.place(0)}"
            return
        other = sizes != expected
        if other.any():
            why = "'choice_names' names them" if self.choice_names else f"as in {rows.place(0)}"
            yield (
                f"column '{name}' must hold {expected} choices ({why}), but holds {sizes[int(other.argmax())]} in "
                f"{rows.places(other)}; leave these rows out, or give them a task of their own"
            )

    def label_column(self, rows: Rows, reading: Reading | None) -> LabelColumn:
        """The labels of one split."""
        from pave_lightning.tasks.checks import LabelColumn
        from pave_lightning.tasks.lists import list_sizes

        names = self.class_names
        if not names and isinstance(self.choices, str) and self.choices in rows.columns:
            names = tuple(map(str, range(int(list_sizes(rows, self.choices)[0]))))
        return LabelColumn(rows, self.label, reading, classes=names)

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """Texts and choices, and the index of the right choice."""
        import pyarrow as pa

        from pave_lightning.tasks.labels import class_indices

        shown = {name: rows.columns[name] for name in (*self.text, *self.choice_columns)}
        labels = self.label_column(rows, reading)
        indices = class_indices(labels.usable().to_pylist(), labels.classes or ())
        return pa.table({**shown, self.label: pa.array(indices)})

    def row_labels(self, rows: Mapping[str, list[Any]]) -> npt.NDArray[np.int64]:
        """The index of the right choice of each row."""
        import numpy as np

        return np.asarray(rows[self.label], dtype=np.int64)

    def unseen_classes(self, labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]) -> list[str]:
        """None: a choice is told by what it says, not by its place."""
        return []

    # ---- examples --------------------------------------------------------------------------------------------------

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The text with each choice, as pairs, the index of the right one, and the length of the longest pair."""
        given = rows[self.choice_columns[0]] if isinstance(self.choices, str) else None
        choices = given if given is not None else list(zip(*(rows[name] for name in self.choice_columns), strict=True))
        sizes = [len(found) for found in choices]
        firsts = [text for text, size in zip(rows[self.text[0]], sizes, strict=True) for _ in range(size)]
        seconds = [choice for found in choices for choice in found]
        if len(self.text) == 2:
            starts = [text for text, size in zip(rows[self.text[1]], sizes, strict=True) for _ in range(size)]
            seconds = [f"{start} {choice}" for start, choice in zip(starts, seconds, strict=True)]
        tokens = nested(tokenise(processor, firsts, seconds, max_length=self.training.max_length), sizes)
        return {**tokens, "labels": self.row_labels(rows), "length": longest(tokens)}

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Choices of tokens drawn uniformly from the vocabulary; see `random_tokens`."""
        choices = len(self.class_names) or RANDOM_CHOICES
        return random_sequences(processor, count, choices, self.training.max_length, seed)[0]

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """One logit for each choice of a row, whose outputs are as many rows."""
        return 1

    @classmethod
    def unnamed_head(cls, outputs: int) -> dict[str, Any]:
        """Nothing: the head gives one number."""
        return {}

    @classmethod
    def model_inputs(cls, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choices as rows of one choice each, so that their numbers may differ."""
        return {name: value[:, None] for name, value in inputs.items()}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of all choices of a batch, shape ``(choices, 1)``."""
        logits: Tensor = model(**self.model_inputs(self.inputs(batch))).logits
        return logits

    def targets(self, batch: Batch) -> Tensor:
        """For each choice of a batch whether it is the right one of its row, and its row: shape ``(choices, 2)``."""
        import torch

        self.expect_labels(batch)
        owners = batch[EXAMPLE_OF]
        return torch.stack([(places_within(owners) == batch["labels"][owners]).long(), owners], dim=1)

    def aims(self, targets: Tensor) -> Tensor:
        """1 for right choices, 0 for others."""
        return targets[:, :1].double()

    def chosen(self, outputs: Tensor) -> Tensor:
        """The logits themselves."""
        return outputs.squeeze(-1)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """The choice of the largest logit, for each row."""
        logits = self.outputs(model, batch)[:, 0].float()
        broken = by_example((~logits.isfinite()).float(), batch[EXAMPLE_OF]).gt(0).any(dim=1).sum()
        values = by_example(logits, batch[EXAMPLE_OF]).argmax(dim=1)
        return Predictions(values, batch.get("labels"), broken)

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over the choices of a row, the mean over rows."""
        logits = by_example(outputs[:, 0].float(), targets[:, 1])
        right = outputs.float()[:, 0][targets[:, 0].bool()]
        return (logits.logsumexp(dim=1) - right).mean()

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """None: what has a head of this kind fits."""
        return iter(())
