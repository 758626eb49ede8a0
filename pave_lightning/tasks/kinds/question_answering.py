"""Extractive question answering: the part of a text that answers a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pave_lightning.tasks.classes import head_misfits
from pave_lightning.tasks.heads import Likelihood, Misfit, Predictions
from pave_lightning.tasks.kinds.sequences import (
    EXAMPLE_OF,
    SequenceBatches,
    by_example,
    nested,
    nested_types,
    random_sequences,
    sequence_findings,
    single_examples,
)
from pave_lightning.tasks.kinds.spans import (
    best_spans,
    cut_texts,
    places_in_context,
    stands_for_none,
    tokens_of,
)
from pave_lightning.tasks.kinds.tokens import (
    MASK,
    TOKENS,
    padding_problem,
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
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.answers import AnswerColumns
    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

# Where each token's text begins and ends in the context, in characters; -1 for tokens that no answer may begin or end
# with, and 0 and 0 for the token that stands for no answer.
BEGINS, ENDS = "span_begins", "span_ends"
# The tokens that the answer begins and ends with, one of each a window.
FIRST, LAST = "first_tokens", "last_tokens"
CONTEXT, LABELS = "context", "labels"
# What of a batch belongs to rows, and what no model is given.
OF_ROWS = (CONTEXT, LABELS)
OWN = (EXAMPLE_OF, BEGINS, ENDS, FIRST, LAST, *OF_ROWS)
# A direction of the Fisher information that adds less than this share of all is left out.
NEGLIGIBLE = 1e-6


@task_kind
class QuestionAnswering(Task):
    """The part of a context that answers a question; cross-entropy of its first and of its last token.

    A context that is too long for one sequence is read in windows that overlap, and the best span of all windows is the
    answer. Windows without the answer are taught to answer with their first special token, as BERT's authors do.

    Source: Devlin et al., *BERT*, NAACL 2019 (arXiv 1810.04805), sections 4.2 and 4.3.
    """

    auto_model: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_type: ClassVar[str] = "QUESTION_ANS"
    fitting_metrics: ClassVar[tuple[MetricName, ...]] = ("token_f1", "exact_match")
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("token_f1", "exact_match")
    likelihood: ClassVar[Likelihood] = Likelihood.JOINT

    kind: Literal["question_answering"] = "question_answering"
    """What is predicted: the part of a context that answers a question."""
    question: str = "question"
    """The column that holds the question."""
    context: str = "context"
    """The column that holds the text that the answer stands in."""
    answer: list[str] = Field(default=["answers.text", "answers.answer_start"], min_length=2, max_length=2)
    """The two columns of the answers: their texts, and where they begin in the context, in characters counted from 0;
    each holds one answer or a list of them. A dotted name leads into objects; one name alone, such as answers, is that
    of objects with text and answer_start, as SQuAD has them."""
    unanswerable: bool = False
    """Whether rows may have no answer, as in SQuAD 2; models may then answer with nothing."""
    doc_stride: int | None = Field(default=None, ge=0)
    """How many tokens two neighbouring windows of a context share; by default a quarter of training.max_length."""
    max_answer_length: int = Field(default=30, ge=1)
    """Most tokens of an answer."""

    @model_validator(mode="before")
    @classmethod
    def _nested_answers(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("answer"), str):
            raw = {**raw, "answer": [f"{raw['answer']}.text", f"{raw['answer']}.answer_start"]}
        return raw

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """A question, a context, and answers with the place in the context at which they begin."""
        from pave_lightning.tasks.profiles import Holds, Suggestion

        question = profile.column(str(given.get("question", "question"))) or profile.named(("question", "query"))
        usual = ("context", "passage", "paragraph", "document", "text")
        context = profile.column(str(given["context"])) if "context" in given else profile.named(usual, Holds.TEXTS)
        if question is None or context is None:
            return None
        answer: Any = given.get("answer")
        nested = profile.named(("answers", "answer"), Holds.OBJECTS, Holds.LISTS_OF_OBJECTS)
        if answer is None and nested is not None and {"text", "answer_start"} <= nested.keys:
            answer = nested.name
            texts = [own["text"] if isinstance(own, dict) else own for own in nested.values]
            unanswerable = not all(texts)
        elif answer is None:
            text = profile.named(("answer_text", "answer", "answers"))
            start = profile.named(("answer_start", "answer_starts", "start"))
            if text is None or start is None:
                return None
            answer, unanswerable = [text.name, start.name], not all(text.values)
        else:
            unanswerable = False
        options = {"question": question.name, "context": context.name, "answer": answer}
        return Suggestion({**options, **({"unanswerable": True} if unanswerable else {})}, 80)

    def contradictions(self) -> Iterator[str]:
        """Columns that are named twice, and windows that do not go on."""
        names = [self.question, self.context, *self.answer]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            yield f"the column '{twice[0]}' is named twice among 'question', 'context' and 'answer'"
        if self.stride > self.training.max_length // 4:
            yield (
                f"'doc_stride' is {self.stride}, but must be at most a quarter of training.max_length "
                f"({self.training.max_length}), since half of a window may be the question"
            )

    @property
    def stride(self) -> int:
        """How many tokens two neighbouring windows share."""
        return self.training.max_length // 4 if self.doc_stride is None else self.doc_stride

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """The question, the context, and the answers."""
        from pave_lightning.tasks.rows import ColumnForm

        shown = dict.fromkeys((self.question, self.context), ColumnForm.TEXT)
        return {**shown, self.answer[0]: ColumnForm.ANY_TEXTS, self.answer[1]: ColumnForm.ANY_LABELS}

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The answers' texts, and where they begin."""
        return tuple(self.answer)

    @property
    def shown_by(self) -> dict[str, Any]:
        """The columns of questions and contexts, and how contexts are divided."""
        windows = {"max_length": self.training.max_length, "stride": self.stride}
        return {"question": self.question, "context": self.context, **windows}

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The columns of the answers, and what may be answered."""
        allowed = {"unanswerable": self.unanswerable, "max_answer_length": self.max_answer_length}
        return {"kind": self.kind, "answer": self.answer, **allowed}

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """What is wrong with questions, contexts and answers, and answers that do not stand where they are said to."""
        from pave_lightning.tasks.checks import text_problems

        wrong = [
            found
            for name in (self.question, self.context)
            if name in rows.columns
            for found in text_problems(rows, name)
        ]
        yield from wrong
        if all(name in rows.columns for name in self.answer):
            answers = self._answers(rows)
            told = list(answers.problems(unanswerable=self.unanswerable))
            yield from told
            if not wrong and not told and self.context in rows.columns:
                yield from answers.place_problems(rows.columns[self.context].to_pylist())

    def _answers(self, rows: Rows) -> AnswerColumns:
        from pave_lightning.tasks.answers import AnswerColumns

        return AnswerColumns(rows, *self.answer)

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """Questions, contexts, and lists of answers' texts and places."""
        import pyarrow as pa

        found = self._answers(rows)
        answers = (
            pa.array(found.texts, pa.list_(pa.large_string())),
            pa.array(found.starts, pa.list_(pa.int64())),
        )
        shown = {name: rows.columns[name] for name in (self.question, self.context)}
        return pa.table({**shown, **dict(zip(self.answer, answers, strict=True))})

    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """A number for each row's first answer, the same for the same text; shape ``(n,)``."""
        return _numbered(rows.column(self.answer[0]).to_pylist())

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer; see `load_tokenizer`."""
        from pave_lightning.tasks.tokenizers import load_tokenizer

        return load_tokenizer(folder, base)

    def processor_problem(self, processor: PreTrainedTokenizerBase) -> str | None:
        """Why rows could not be padded, tokens not be found in the context, or windows hold nothing of it."""
        if not processor.is_fast:
            return (
                f"the tokenizer {type(processor).__name__} does not tell where in the text a token stands; use a fast "
                "one (tokenizer.json)"
            )
        if self._most_of_question(processor) < self.stride + 1:
            return (
                f"training.max_length {self.training.max_length} leaves no room for a question and {self.stride + 1} "
                "tokens of the context; raise it, or lower doc_stride"
            )
        return padding_problem(processor)

    def _most_of_question(self, processor: PreTrainedTokenizerBase) -> int:
        """How many tokens of a question are read: half of what a sequence holds."""
        most: int = self.training.max_length - processor.num_special_tokens_to_add(pair=True)
        return most // 2

    def processor_fingerprint(self, processor: PreTrainedTokenizerBase) -> str:
        """See `tokenizer_fingerprint`."""
        return tokenizer_fingerprint(processor)

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Windows of tokens, where each token stands in the context, and where in each window the answer stands.

        A question that would leave less than half of a window to the context is cut.
        """
        contexts, texts, starts = rows[self.context], rows[self.answer[0]], rows[self.answer[1]]
        questions = cut_texts(processor, rows[self.question], self._most_of_question(processor))
        tokens = tokenise(
            processor,
            questions,
            contexts,
            max_length=self.training.max_length,
            truncation="only_second",
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        row_of, offsets = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
        windows: dict[str, list[Any]] = {**dict(tokens), BEGINS: [], ENDS: [], FIRST: [], LAST: []}
        for window, row in enumerate(row_of):
            ids = tokens[TOKENS][window]
            begins, ends = places_in_context(
                offsets[window], tokens.sequence_ids(window), stands_for_none(ids, processor)
            )
            windows[BEGINS].append(begins)
            windows[ENDS].append(ends)
            span = (starts[row][0], starts[row][0] + len(texts[row][0])) if texts[row] else (0, 0)
            first, last = tokens_of(span, begins, ends)
            windows[FIRST].append(first)
            windows[LAST].append(last)
        found = nested(windows, _counts(row_of, len(contexts)))
        lengths = [sum(map(len, masks)) for masks in found[MASK]]
        return {**found, CONTEXT: contexts, LABELS: [own or [""] for own in texts], "length": lengths}

    def scored_labels(self, encoded: pa.Table) -> npt.NDArray[np.int64]:
        """A number for each row's first answer, the same for the same text; shape ``(n,)``."""
        return _numbered(encoded.column(LABELS).to_pylist())

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens and places."""
        import pyarrow as pa

        places, ends = pa.list_(pa.list_(pa.int32())), pa.list_(pa.int32())
        texts = {CONTEXT: pa.large_string(), LABELS: pa.list_(pa.large_string())}
        return {**nested_types(), BEGINS: places, ENDS: places, FIRST: ends, LAST: ends, **texts}

    def findings(
        self, encoded: pa.Table, processor: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[str]]:
        """Windows of which the tokenizer leaves nothing, or nothing that it knows; answers that no window has whole."""
        problems, remarks = sequence_findings(encoded, processor, places)
        told = zip(*(encoded.column(name).to_pylist() for name in (LABELS, ENDS, LAST)), strict=True)
        lost = [
            place
            for place, (own, ends, last) in zip(places.tolist(), told, strict=True)
            if own != [""] and not any(of_window[token] for of_window, token in zip(ends, last, strict=True))
        ]
        if lost:
            remarks.append(
                f"{len(lost)} answers, first in row {lost[0]} (counted from 0), lie whole in no window of the "
                f"tokenizer {tokenizer_name(processor)}, so nothing is learned from them; raise doc_stride or "
                "training.max_length"
            )
        return problems, remarks

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads windows to the longest one; texts become code points."""
        from pave_lightning.tasks.coded_texts import coded_lists, coded_texts

        of_rows = {CONTEXT: coded_texts, LABELS: coded_lists}
        return SequenceBatches(processor, padding, others={BEGINS: -1, ENDS: -1}, of_rows=of_rows)

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Windows of tokens drawn uniformly from the vocabulary, each of which may be the answer."""
        rows, drawn = random_sequences(processor, count, 1, self.training.max_length, seed)
        for name, shift in ((BEGINS, 0), (ENDS, 1)):
            rows[name] = [
                [
                    [place + shift if place in range(words.start, words.stop) else -1 for place in range(len(ids))]
                    for ids, words in zip(own, places, strict=True)
                ]
                for own, places in zip(rows[TOKENS], drawn, strict=True)
            ]
        return rows

    def singles(self, batch: Batch) -> Iterator[Batch]:
        """The windows one by one: each is taught its own first and last token."""
        return single_examples(batch, OF_ROWS, apart=True)

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """Two logits for each token: whether the answer begins, and whether it ends with it."""
        return 2

    @property
    def head_config(self) -> dict[str, Any]:
        """Two outputs a token."""
        return {"num_labels": 2}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All windows, without places and texts."""
        return {name: value for name, value in batch.items() if name not in OWN}

    def read_positions(self, batch: Batch) -> Tensor:
        """The tokens of contexts, and those that stand for no answer."""
        return batch[BEGINS] >= 0

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Both logits of each token that is read, shape ``(tokens, 2)``."""
        return self._logits(model, batch)[self.read_positions(batch)]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        import torch

        said = model(**self.inputs(batch))
        return torch.stack([said.start_logits, said.end_logits], dim=-1)

    def targets(self, batch: Batch) -> Tensor:
        """For each token that is read whether the answer begins and ends with it, and its window: ``(tokens, 3)``."""
        import torch

        self.expect_labels(batch)
        read = self.read_positions(batch)
        places = torch.arange(read.shape[1], device=read.device)
        windows = torch.arange(len(read), device=read.device)[:, None].expand_as(read)
        right = [(places == batch[name][:, None]).long() for name in (FIRST, LAST)]
        return torch.stack([*right, windows], dim=-1)[read]

    def aims(self, targets: Tensor) -> Tensor:
        """1 for the tokens that answers begin and end with, 0 for others."""
        return targets[:, :2].double()

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over the tokens of a window, the mean over windows and over first and last tokens."""
        windows, values = targets[:, 2], outputs.float()
        losses = [
            by_example(values[:, which], windows).logsumexp(dim=1) - values[targets[:, which].bool(), which]
            for which in (0, 1)
        ]
        return (losses[0].mean() + losses[1].mean()) / 2

    def likelihood_directions(self, outputs: Tensor) -> Tensor:
        """First and last token are drawn by the softmax of their logits over the window's tokens.

        There are two directions for each token, of which all but a few add nothing worth a backward pass.
        """
        rows = super().likelihood_directions(outputs)
        sizes = rows.double().square().sum(dim=(1, 2))
        return rows[sizes > NEGLIGIBLE * sizes.sum()]

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """The text of the best span of each row, over its windows; none where batches have no texts."""
        from pave_lightning.tasks.coded_texts import decoded_lists, decoded_texts

        logits, read = self._logits(model, batch).float(), self.read_positions(batch)
        owners = batch[EXAMPLE_OF]
        broken = by_example((~logits.isfinite() & read[..., None]).flatten(1).any(dim=1).float(), owners)
        count = broken.gt(0).any(dim=1).sum()
        if CONTEXT not in batch:
            return Predictions([], None, count)
        spans = best_spans(
            logits, batch[BEGINS], batch[ENDS], owners, most=self.max_answer_length, may_be_none=self.unanswerable
        )
        values = [
            text[begin:end].strip() for text, (begin, end) in zip(decoded_texts(batch[CONTEXT]), spans, strict=True)
        ]
        return Predictions(values, decoded_lists(batch[LABELS]) if LABELS in batch else None, count)

    def build_metrics(self) -> MetricCollection:
        """See `build_squad_metrics`."""
        from pave_lightning.tasks.text_metrics import build_squad_metrics

        return build_squad_metrics(self.metrics)

    @property
    def mean_metrics(self) -> tuple[MetricName, ...]:
        """All metrics: means of what single answers score."""
        return tuple(self.metrics)

    def row_scores(self, found: Predictions) -> Tensor:
        """The scores of each answer by itself."""
        import torch

        from pave_lightning.tasks.text_metrics import squad_scores

        rows = squad_scores(found.values, found.targets or ())  # type: ignore[arg-type]
        return torch.tensor([[row[name] for name in self.metrics] for row in rows], dtype=torch.float64)

    def constant_score(self, metric: MetricName, labels: Tensor) -> float:
        """The share of the most frequent answer; of ``token_f1`` its exact matches alone."""
        return int(labels.bincount().max()) / len(labels)

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """Another number of outputs."""
        return head_misfits(self.head_config, config)


def _numbered(answers: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    import numpy as np

    first = np.asarray([own[0] if own else "" for own in answers], dtype=np.str_)
    return np.unique(first, return_inverse=True)[1].astype(np.int64)


def _counts(row_of: Sequence[int], rows: int) -> list[int]:
    """How many windows each row has."""
    import numpy as np

    found: list[int] = np.bincount(row_of, minlength=rows).tolist()
    return found
