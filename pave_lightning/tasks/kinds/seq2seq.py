"""Sequence-to-sequence models: a response that a decoder writes to a prompt that an encoder reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pave_lightning.tasks.kinds.generative import MASK, TOKENS, GenerativeTask, generated_batches
from pave_lightning.tasks.kinds.prompts import Tokens
from pave_lightning.tasks.kinds.tokens import PaddedBatches, random_tokens
from pave_lightning.tasks.task import Batch, task_kind

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.profiles import Profile, Suggestion

# The response and its mask, padded by themselves.
RESPONSE, RESPONSE_MASK = "response_ids", "response_mask"
# What takes no part in losses, by transformers' convention.
IGNORED = -100


@task_kind
class Seq2Seq(GenerativeTask):
    """A text that a decoder writes to a prompt that an encoder reads; cross-entropy of the response's tokens.

    Capture counts the prompt's tokens in the encoder, and in the decoder those that it writes from.
    """

    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"

    kind: Literal["seq2seq"] = "seq2seq"
    """What is predicted: a text that a decoder writes to a prompt that an encoder reads."""
    separator: str = ""
    """What ends prompts that are no chat."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """Prompts and responses, where the base is an encoder with a decoder."""
        return (
            None
            if profile.base.get("is_encoder_decoder") is not True and given.get("kind") is None
            else super().suggested(profile, given)
        )

    @property
    def prompt_most(self) -> int:
        """All of training.max_length: the decoder has sequences of its own."""
        return self.training.max_length

    # ---- examples --------------------------------------------------------------------------------------------------

    def sequences(self, rows: Sequence[Tokens]) -> dict[str, list[Any]]:
        """Prompts and responses, each by itself."""
        return {
            TOKENS: [one.prompt for one in rows],
            MASK: [[1] * len(one.prompt) for one in rows],
            RESPONSE: [one.response for one in rows],
            "length": [len(one.prompt) for one in rows],
        }

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens."""
        types = super().stored_types
        return {**types, RESPONSE: types[TOKENS]}

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads prompts and responses to the longest one each."""
        pad = PaddedBatches(processor, padding)

        def both(rows: Sequence[Mapping[str, Any]]) -> Batch:
            batch = dict(pad([{TOKENS: row[TOKENS], MASK: row[MASK]} for row in rows]))
            if RESPONSE in rows[0]:
                written = pad([{TOKENS: row[RESPONSE], MASK: [1] * len(row[RESPONSE])} for row in rows])
                batch |= {RESPONSE: written[TOKENS], RESPONSE_MASK: written[MASK]}
            return batch

        return generated_batches(both, (TOKENS, MASK, RESPONSE))

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Sequences of tokens drawn uniformly from the vocabulary, as prompts and as responses."""
        rows = random_tokens(processor, count, self.training.max_length, seed)[0]
        written = random_tokens(processor, count, max(self.max_new_tokens, 4), seed + 1)[0]
        return {**rows, RESPONSE: written[TOKENS]}

    # ---- models ----------------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The prompt, and the response, which the model shifts by one place itself."""
        labels = batch[RESPONSE].masked_fill(batch[RESPONSE_MASK] == 0, IGNORED)
        prompt = {TOKENS: batch[TOKENS], MASK: batch[MASK]}
        return {**prompt, "labels": labels, "decoder_attention_mask": batch[RESPONSE_MASK]}

    def written_positions(self, batch: Batch) -> Tensor:
        """The tokens of responses."""
        return batch[RESPONSE_MASK].bool()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the response's tokens."""
        found: Tensor = model(**self.inputs(batch), use_cache=False).logits
        return found

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of all tokens of responses, shape ``(tokens, vocabulary)``."""
        return self.logits(model, batch)[self.written_positions(batch)]

    def targets(self, batch: Batch) -> Tensor:
        """The tokens of responses, shape ``(tokens,)``."""
        self.expect_labels(batch)
        return batch[RESPONSE][self.written_positions(batch)]

    def prompts(self, batch: Batch, padding: int) -> dict[str, Tensor]:
        """The prompts as they are."""
        return {TOKENS: batch[TOKENS], MASK: batch[MASK]}

    def singles(self, batch: Batch) -> Any:
        """The examples one by one, prompt and response without padding."""
        for index in range(len(batch[TOKENS])):
            prompt, response = batch[MASK][index].bool(), batch[RESPONSE_MASK][index].bool()
            masks = {**dict.fromkeys((TOKENS, MASK), prompt), **dict.fromkeys((RESPONSE, RESPONSE_MASK), response)}
            yield {
                name: tensor[index : index + 1, masks[name]] if name in masks else tensor[index : index + 1]
                for name, tensor in batch.items()
            }
