"""What kinds of task share whose model writes a text: prompts and responses, and scores of what is written."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pave_lightning.tasks.heads import Misfit, Predictions
from pave_lightning.tasks.kinds.prompts import (
    Exchange,
    Side,
    Tokens,
    chat_ends,
    chat_exchange,
    chat_problem,
    generation_ends,
    tokens_of,
)
from pave_lightning.tasks.kinds.tokens import (
    MASK,
    TOKENS,
    padding_problem,
    token_findings,
    token_types,
    tokenizer_fingerprint,
    tokenizer_name,
)
from pave_lightning.tasks.options import LOWER_IS_BETTER, MetricName
from pave_lightning.tasks.task import Batch, Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor, nn
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.labels import Reading
    from pave_lightning.tasks.profiles import Profile, Suggestion
    from pave_lightning.tasks.rows import ColumnForm, Rows

LABELS = "labels"
# Usual names of columns, in lower case.
PROMPTS = ("prompt", "instruction", "question", "input", "source", "article", "document", "query", "dialogue")
RESPONSES = ("response", "output", "completion", "answer", "target", "summary", "highlights", "translation")
# How many tokens of a row's prompt and of its response are left out.
PROMPT_CUT, RESPONSE_CUT = "prompt_cut", "response_cut"
# Directions that estimate the Fisher information of an example where there are too many outputs for all of them.
DRAWS = 4


class GenerativeTask(Task):
    """A task whose model answers a prompt with a text; cross-entropy of the response's tokens.

    There is no head: what scores tokens is as much the model's own as its embeddings are, so the whole model is merged.
    Prompts and responses are tokenised each by itself, so that a model is asked what it was trained on. A prompt has at
    most ``training.max_length`` tokens less those that may be written, where both stand in one sequence.
    """

    fitting_metrics: ClassVar[tuple[MetricName, ...]] = (
        "exact_match",
        "contains",
        "token_f1",
        "perplexity",
        "bleu",
        "chrf",
        "rouge_1",
        "rouge_2",
        "rouge_l",
        "word_error_rate",
        "character_error_rate",
        "edit_distance",
    )
    default_metrics: ClassVar[tuple[MetricName, ...]] = ("exact_match",)
    has_head: ClassVar[bool] = False

    prompt: str = "prompt"
    """The column that holds the prompt."""
    response: str = "response"
    """The column that holds the right response."""
    messages: str | None = None
    """The column that holds chats instead: lists of objects with role and content, of which the last one is the
    assistant's, the response. The tokenizer's chat template makes one text of them."""
    chat: bool = False
    """Whether prompts and responses are written as a chat, by the tokenizer's chat template."""
    system: str | None = None
    """The message with which chats of the columns prompt and response begin."""
    separator: str = "\n"
    """What stands between prompt and response where they are no chat."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The most tokens of a response, the one that ends it included; longer ones are cut, and generation ends there."""
    stop: list[str] = Field(default=[], validate_default=False)
    """Texts that end what is generated; what begins with one of them is left out. The token that ends a text, and the
    one that ends a message of a chat, do so anyway."""
    prompt_cut: Side = "left"
    """Where prompts that are too long are cut: left keeps their end."""
    ignore: list[Literal["case", "punctuation"]] = Field(default=[], validate_default=False)
    """What makes no difference to exact_match and contains, besides blanks."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """Chats; or a prompt and a response that is a text of its own in most rows."""
        from pave_lightning.tasks.profiles import Holds, Suggestion

        usual = ("messages", "conversation", "conversations")
        chats = profile.column(str(given["messages"])) if "messages" in given else profile.named(usual)
        if chats is not None and chats.holds is Holds.LISTS_OF_OBJECTS and {"role", "content"} <= chats.keys:
            return Suggestion({"messages": chats.name}, 75)
        prompt = profile.column(str(given["prompt"])) if "prompt" in given else profile.named(PROMPTS, Holds.TEXTS)
        known = profile.named(RESPONSES, Holds.TEXTS)
        response = profile.column(str(given["response"])) if "response" in given else known
        if prompt is None or response is None or prompt is response or (response.repeats and "response" not in given):
            return None
        return Suggestion({"prompt": prompt.name, "response": response.name}, 35)

    def contradictions(self) -> Iterator[str]:
        """Columns, lengths and metrics that do not go together."""
        if self.messages is None and self.prompt == self.response:
            yield f"'prompt' and 'response' both name the column '{self.prompt}'"
        if self.messages is not None and self.system is not None:
            yield "'system' is for prompts and responses; put it among the messages"
        if self.system is not None and not self.chat:
            yield "'system' only concerns chats; set chat: true"
        if any(not one for one in self.stop):
            yield "'stop' must not hold an empty text, which would end every response before it begins"
        if self.primary_metric in LOWER_IS_BETTER:
            yield (
                f"the primary metric '{self.primary_metric}' is better the lower it is, but checkpoints and scales are "
                "chosen by the highest score; name another one, such as exact_match"
            )
        if self.prompt_most < 1:
            yield (
                f"'max_new_tokens' is {self.max_new_tokens}, which leaves nothing of training.max_length "
                f"({self.training.max_length}) to the prompt; lower it, or raise training.max_length"
            )

    @property
    @abstractmethod
    def prompt_most(self) -> int:
        """The most tokens of a prompt."""

    @property
    def is_chat(self) -> bool:
        """Whether texts are written by a chat template."""
        return self.chat or self.messages is not None

    # ---- rows ------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, ColumnForm]:
        """Prompt and response, or roles and contents of messages."""
        from pave_lightning.tasks.rows import ColumnForm

        if self.messages is None:
            return dict.fromkeys((self.prompt, self.response), ColumnForm.TEXT)
        return dict.fromkeys(self._message_columns, ColumnForm.TEXTS)

    @property
    def _message_columns(self) -> tuple[str, str]:
        return f"{self.messages}.role", f"{self.messages}.content"

    @property
    def shown_by(self) -> dict[str, Any]:
        """What decides which tokens prompts and responses are, and where they are cut."""
        text = {"prompt": self.prompt, "separator": self.separator, "chat": self.chat, "system": self.system}
        lengths = [self.prompt_most, self.max_new_tokens, self.prompt_cut]
        return {**({"messages": self.messages} if self.messages else text), "lengths": lengths}

    @property
    def labelled_by(self) -> dict[str, Any]:
        """The column of the responses, and what counts of what is written."""
        of = {"messages": self.messages} if self.messages else {"response": self.response}
        return {"kind": self.kind, **of, "stop": self.stop, "ignore": self.ignore}

    def problems(self, rows: Rows, reading: Reading | None) -> Iterator[str]:
        """Texts that are missing or empty, and messages that are no chat with a response."""
        from pave_lightning.tasks.checks import blank_problems, text_problems
        from pave_lightning.tasks.messages import message_problems

        if self.messages is not None:
            if all(name in rows.columns for name in self._message_columns):
                yield from message_problems(rows, *self._message_columns)
            return
        for name in (self.prompt, self.response):
            if name in rows.columns:
                wrong = text_problems(rows, name)
                yield from wrong or blank_problems(rows, name)

    def usable(self, rows: Rows, reading: Reading | None) -> pa.Table:
        """The texts as they are."""
        import pyarrow as pa

        return pa.table({name: rows.columns[name] for name in self.columns})

    def answers(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """A number for each row's response, the same for the same text; shape ``(n,)``."""
        column = rows.column(self.label_columns[0]).to_pylist()
        return _numbered(column if self.messages is None else [contents[-1] for contents in column])

    # ---- examples --------------------------------------------------------------------------------------------------

    def load_processor(self, folder: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer; see `load_tokenizer`."""
        from pave_lightning.tasks.tokenizers import load_tokenizer

        return load_tokenizer(folder, base)

    def processor_problem(self, processor: PreTrainedTokenizerBase) -> str | None:
        """Why rows could not be padded, responses not end, or chats not be written."""
        if processor.eos_token_id is None:
            return (
                f"the tokenizer {tokenizer_name(processor)} has no end-of-text token, so no response would ever end; "
                "set 'eos_token' in its tokenizer_config.json"
            )
        return padding_problem(processor) or (chat_problem(processor) if self.is_chat else None)

    def processor_fingerprint(self, processor: PreTrainedTokenizerBase) -> str:
        """See `tokenizer_fingerprint`; the chat template and the end-of-text token decide as well."""
        further = [processor.eos_token_id, str(processor.chat_template) if self.is_chat else None]
        content = json.dumps([tokenizer_fingerprint(processor), *further])
        return hashlib.sha256(content.encode()).hexdigest()

    def exchanges(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> list[Exchange]:
        """What a model is asked and what it is to answer, as texts."""
        if self.messages is not None:
            told = zip(*(rows[name] for name in self._message_columns), strict=True)
            chats = [[{"role": role, "content": content} for role, content in zip(*both, strict=True)] for both in told]
            return [chat_exchange(processor, chat) for chat in chats]
        pairs = list(zip(rows[self.prompt], rows[self.response], strict=True))
        if not self.chat:
            return [Exchange(f"{prompt}{self.separator}", response) for prompt, response in pairs]
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [
            chat_exchange(
                processor, [*start, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            )
            for prompt, response in pairs
        ]

    def tokenised(
        self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase, *, encoder: bool
    ) -> list[Tokens]:
        """Prompts and responses as tokens; see `tokens_of`."""
        return list(
            tokens_of(
                processor,
                self.exchanges(rows, processor),
                prompt_most=self.prompt_most,
                response_most=self.max_new_tokens,
                side=self.prompt_cut,
                encoder=encoder,
            )
        )

    def encode(self, rows: Mapping[str, list[Any]], processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Tokens of prompts and responses, right responses as texts, lengths, and how much is cut."""
        found = self.tokenised(rows, processor, encoder=self.peft_type == "SEQ_2_SEQ_LM")
        told = rows[self.label_columns[0]]
        return {
            **self.sequences(found),
            LABELS: [[text if self.messages is None else text[-1]] for text in told],
            PROMPT_CUT: [one.prompt_cut for one in found],
            RESPONSE_CUT: [one.response_cut for one in found],
        }

    @abstractmethod
    def sequences(self, rows: Sequence[Tokens]) -> dict[str, list[Any]]:
        """Tokens as a model is given them, with their masks and their ``length``."""

    def scored_labels(self, encoded: pa.Table) -> npt.NDArray[np.int64]:
        """A number for each row's response, the same for the same text; shape ``(n,)``."""
        return _numbered([own[0] for own in encoded.column(LABELS).to_pylist()])

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens."""
        import pyarrow as pa

        return {**token_types(), LABELS: pa.list_(pa.large_string())}

    def findings(
        self, encoded: pa.Table, processor: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[str]]:
        """Rows of which the tokenizer leaves nothing, or nothing that it knows; texts that are cut."""
        problems, remarks = token_findings(encoded, processor, places)
        told = {
            PROMPT_CUT: (
                f"prompts have more than {self.prompt_most} tokens and are cut on the {self.prompt_cut}",
                "training.max_length",
            ),
            RESPONSE_CUT: (
                f"responses have more than {self.max_new_tokens} tokens and are cut, so that no model is taught to end "
                "them",
                "max_new_tokens",
            ),
        }
        for name, (what, key) in told.items():
            cut = encoded.column(name).to_numpy() > 0
            if cut.any():
                remarks.append(
                    f"{int(cut.sum())} {what}, first in row {places[cut][0]} (counted from 0); raise {key} to keep them"
                )
        return problems, remarks

    # ---- models ----------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """0: one logit a token of the vocabulary, which only the model knows."""
        return 0

    def private_names(self, model: nn.Module) -> set[str]:
        """None: what scores tokens is merged."""
        return set()

    @abstractmethod
    def prompts(self, batch: Batch, padding: int) -> dict[str, Tensor]:
        """The prompts of a batch alone, as a model goes on from them.

        Args:
            batch: a batch.
            padding: the token that fills up rows.
        """

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of all tokens of a batch, shape ``(n, length, vocabulary)``."""

    def output_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, the mean over tokens of responses."""
        from torch.nn import functional

        return functional.cross_entropy(outputs.float(), targets)

    def likelihood_directions(self, outputs: Tensor) -> Tensor:
        """Each token is drawn by the softmax of its logits.

        Exact for few outputs; else an estimate without bias by a few draws, see `drawn_directions`.
        """
        from pave_lightning.tasks.likelihood import categorical_directions, drawn_directions

        if outputs.numel() <= len(outputs) + DRAWS:
            return categorical_directions(outputs)
        return drawn_directions(outputs, DRAWS)

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """Nothing: tokens pass through the model, which writes no text; see `respond`."""
        from pave_lightning.tasks.metrics import non_finite_rows

        logits, real = self.logits(model, batch), self.written_positions(batch)
        return Predictions([], None, non_finite_rows(logits.masked_fill(~real[..., None], 0)))

    @abstractmethod
    def written_positions(self, batch: Batch) -> Tensor:
        """Which of the positions of `logits` hold data, bool of shape ``(n, length)``."""

    def respond(self, model: nn.Module, batch: Batch, processor: PreTrainedTokenizerBase) -> Predictions:
        """What a model writes, token by token the likeliest; the losses of the right tokens where they are measured."""
        from torch.nn import functional

        from pave_lightning.tasks.coded_texts import decoded_lists
        from pave_lightning.tasks.decoding import write

        written = write(
            model,
            self.prompts(batch, int(processor.pad_token_id)),
            processor,
            most=self.max_new_tokens,
            ends=self.ends(processor),
            stop=self.stop,
        )
        further: dict[str, Tensor] = {}
        if LABELS in batch and "perplexity" in self.metrics:
            losses = functional.cross_entropy(self.outputs(model, batch).float(), self.targets(batch), reduction="none")
            further = {"losses": losses}
        targets = decoded_lists(batch[LABELS]) if LABELS in batch else None
        return Predictions(written.texts, targets, written.broken.sum(), further=further)

    def ends(self, processor: PreTrainedTokenizerBase) -> Collection[int]:
        """The tokens that end a response: by the tokenizer, its chat template, and the settings that lie beside it."""
        chat = chat_ends(processor) if self.is_chat else ()
        return {int(processor.eos_token_id), *chat, *generation_ends(Path(str(processor.name_or_path)))}

    def build_metrics(self) -> MetricCollection:
        """See `build_generation_metrics`."""
        from pave_lightning.tasks.generated_metrics import build_generation_metrics

        return build_generation_metrics(self.metrics, self.ignore)

    def constant_score(self, metric: MetricName, labels: Tensor) -> float:
        """The share of the most frequent response; NaN for metrics that are better the lower they are."""
        if metric in LOWER_IS_BETTER:
            return float("nan")
        return int(labels.bincount().max()) / len(labels)

    def misfits(self, config: Any, written: Mapping[str, Any]) -> Iterator[Misfit]:
        """None: without a head there is none that does not fit."""
        return iter(())


def generated_batches(
    padded: Callable[[Sequence[Mapping[str, Any]]], Batch], keys: Collection[str]
) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """Batches of sequences, with the right texts as code points.

    Args:
        padded: makes a batch of what is named.
        keys: what of rows it is given.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        from pave_lightning.tasks.coded_texts import coded_lists

        batch = dict(padded([{name: row[name] for name in keys if name in row} for row in rows]))
        if LABELS in rows[0]:
            batch[LABELS] = coded_lists([row[LABELS] for row in rows])
        return batch

    return collate


def left_padded(tokens: Tensor, lengths: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The first tokens of rows, moved to the right ends, and their mask.

    Args:
        tokens: shape ``(n, L)``, filled up on the right.
        lengths: how many are kept of each, int64 of shape ``(n,)``.
        padding: what fills up on the left.

    Returns:
        Both int64 of shape ``(n, longest)``.
    """
    import torch

    longest = int(lengths.max())
    places = torch.arange(longest, device=tokens.device) - (longest - lengths)[:, None]
    mask = places >= 0
    moved = tokens.gather(1, places.clamp(min=0)).masked_fill(~mask, padding)
    return moved, mask.long()


def _numbered(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    import numpy as np

    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


__all__ = ["MASK", "TOKENS", "GenerativeTask", "generated_batches", "left_padded"]
