"""Causal language models: a response that goes on from a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pave_lightning.errors import PaveError
from pave_lightning.tasks.kinds.generative import MASK, TOKENS, GenerativeTask, generated_batches, left_padded
from pave_lightning.tasks.kinds.prompts import Tokens
from pave_lightning.tasks.kinds.tokens import PaddedBatches, random_tokens
from pave_lightning.tasks.task import Batch, task_kind

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pave_lightning.tasks.profiles import Profile, Suggestion

# Marks the tokens of the response, of which the loss is taken.
RESPONSE = "response_mask"


@task_kind
class CausalLM(GenerativeTask):
    """A text that goes on from a prompt; cross-entropy of the response's tokens.

    Capture counts all tokens, those of the prompt as well: the same weights read both, and what they make of the prompt
    is what the response is written from.
    """

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"

    kind: Literal["causal_lm"] = "causal_lm"
    """What is predicted: a text that goes on from a prompt."""
    packing: bool = False
    """Whether rows of a training batch share sequences of up to training.max_length tokens, without seeing each other:
    the same loss with less padding."""

    @classmethod
    def suggested(cls, profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
        """Prompts and responses, where the base is no encoder with a decoder."""
        return None if profile.base.get("is_encoder_decoder") is True else super().suggested(profile, given)

    @property
    def prompt_most(self) -> int:
        """What training.max_length leaves beside the response."""
        return self.training.max_length - self.max_new_tokens

    # ---- examples --------------------------------------------------------------------------------------------------

    def sequences(self, rows: Sequence[Tokens]) -> dict[str, list[Any]]:
        """Prompt and response in one sequence, and which tokens are the response's."""
        return {
            TOKENS: [[*one.prompt, *one.response] for one in rows],
            MASK: [[1] * (len(one.prompt) + len(one.response)) for one in rows],
            RESPONSE: [[0] * len(one.prompt) + [1] * len(one.response) for one in rows],
            "length": [len(one.prompt) + len(one.response) for one in rows],
        }

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens and marks."""
        import pyarrow as pa

        return {**super().stored_types, RESPONSE: pa.list_(pa.int8())}

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads rows to the longest one."""
        return generated_batches(PaddedBatches(processor, padding, others={RESPONSE: 0}), (TOKENS, MASK, RESPONSE))

    def collate_training(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """As `collate`, or packed."""
        from pave_lightning.tasks.packing import packed

        if not self.packing:
            return self.collate(processor, padding)
        filling = {TOKENS: int(processor.pad_token_id) if padding is None else padding, MASK: 0, RESPONSE: 0}

        def pack(rows: Sequence[Mapping[str, Any]]) -> Batch:
            return packed(rows, self.training.max_length, filling, TOKENS)

        return generated_batches(pack, (TOKENS, MASK, RESPONSE))

    def random_examples(self, processor: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, list[Any]]:
        """Sequences of tokens drawn uniformly from the vocabulary, all but the first of the response's."""
        rows = random_tokens(processor, count, self.training.max_length, seed)[0]
        return {**rows, RESPONSE: [[0] + [1] * (length - 1) for length in rows["length"]]}

    # ---- models ----------------------------------------------------------------------------------------------------

    def base_problem(self, config: Any) -> str | None:
        """An encoder that is no decoder, one beside a decoder, or an architecture whose rows cannot be packed."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        if config.is_encoder_decoder:
            return "has an encoder and a decoder, and a causal model only the latter; set kind: seq2seq"
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            return "reads words that come later, so it cannot go on from a prompt; use a decoder, such as a Llama"
        built = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        return _packing_problem(built) if self.packing and built is not None else None

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens and their mask."""
        return {TOKENS: batch[TOKENS], MASK: batch[MASK]}

    def written_positions(self, batch: Batch) -> Tensor:
        """All real tokens."""
        return batch[MASK].bool()

    def read_positions(self, batch: Batch) -> Tensor:
        """The tokens in front of those of responses, whose logits say what comes next."""
        import torch

        response = batch[RESPONSE].bool()
        return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of all tokens."""
        found: Tensor = model(**self._inputs(model, batch)).logits
        return found

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits from which responses are written, shape ``(tokens, vocabulary)``."""
        read, given = self.read_positions(batch), self._inputs(model, batch)
        if "logits_to_keep" in _parameters(_inner(model)):
            # The vocabulary is large: no logits where no row is read.
            columns = read.any(dim=0).nonzero()[:, 0]
            if len(columns):
                return model(**given, logits_to_keep=columns).logits[read[:, columns]]  # type: ignore[no-any-return]
        return model(**given).logits[read]  # type: ignore[no-any-return]

    def targets(self, batch: Batch) -> Tensor:
        """The tokens of responses, shape ``(tokens,)``."""
        self.expect_labels(batch)
        return batch[TOKENS][:, 1:][self.read_positions(batch)[:, :-1]]

    def prompts(self, batch: Batch, padding: int) -> dict[str, Tensor]:
        """The prompts, padded on the left, where generation goes on from them."""
        lengths = (batch[MASK] - batch[RESPONSE].to(batch[MASK].dtype)).sum(dim=1)
        tokens, mask = left_padded(batch[TOKENS], lengths, padding)
        return {TOKENS: tokens, MASK: mask}

    def _inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        from pave_lightning.tasks.packing import SEGMENTS, attention_within, positions_within

        if SEGMENTS not in batch:
            return {**self.inputs(batch), "use_cache": False}
        if problem := _packing_problem(_inner(model)):
            raise PaveError(f"task '{self.name}': its {type(_inner(model)).__name__} {problem}")
        seen = attention_within(batch[SEGMENTS])
        config: Any = model.config
        if config._attn_implementation != "sdpa":  # others add the mask to their scores
            dtype = next(model.parameters()).dtype
            import torch

            seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return {
            TOKENS: batch[TOKENS],
            MASK: seen,
            "position_ids": positions_within(batch[SEGMENTS]),
            "use_cache": False,
        }


def _inner(model: nn.Module) -> Any:
    """A model, or the one that peft has wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the forward pass of a model, or of a class of models, takes."""
    return inspect.signature(model.forward).parameters


def _packing_problem(model: Any) -> str | None:
    """Why rows cannot share a sequence of a model, or of a class of models; None where they can."""
    if {"position_ids", "attention_mask"} <= _parameters(model).keys():
        return None
    return "cannot be told where in a sequence another row begins, so rows cannot be packed; set packing: false"
