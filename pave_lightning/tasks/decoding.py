"""Texts that language models write: greedy, in batches, bounded, cut at stop strings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from pave_lightning.tasks.kinds.tokens import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What of a model's own way to generate says which tokens texts begin and end with; the rest (sampling, beams,
# penalties, lengths) would make scores a matter of chance or of files beside the weights.
OF_TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        texts: one a prompt, without special tokens and without what begins with a stop string.
        tokens: int64 of shape ``(n, longest)``: the new tokens, filled up behind their ends.
        broken: bool of shape ``(n,)``: prompts of which some logits were NaN.
    """

    texts: list[str]
    tokens: Tensor
    broken: Tensor


@torch.no_grad()
def write(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    ends: Collection[int] = (),
    stop: Sequence[str] = (),
) -> Written:
    """Let a language model go on from prompts, always with the likeliest token.

    What the model's own ``generation_config`` says of sampling, beams, penalties and lengths is left aside.

    Args:
        model: a causal or sequence-to-sequence model of transformers, or a peft model around one.
        inputs: ``input_ids`` and ``attention_mask`` of shape ``(n, L)``; those of causal models are padded on the left.
        tokenizer: what they were encoded with.
        most: the most new tokens; generation ends there whatever the model says.
        ends: tokens that end a text, besides those that the model names.
        stop: texts that end a text; what begins with the first of them that is written is cut off.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    encodes = bool(inner.config.is_encoder_decoder)
    given = 1 if encodes else inputs[TOKENS].shape[1]
    watch = _Watch()
    stopping = [_StopAtTexts(tokenizer, stop, given)] if stop else []
    # None lets transformers look, which it does at the model as a whole only.
    waits = any(getattr(module, "_is_fsdp_managed_module", False) for module in inner.modules()) or None
    with _plainly(inner, tokenizer, most, ends):
        tokens = inner.generate(
            **inputs, logits_processor=[watch], stopping_criteria=stopping, synced_gpus=waits and _world_size() > 1
        )[:, given:]
    broken = watch.broken if watch.broken is not None else torch.zeros(len(tokens), dtype=torch.bool)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Written([cut_at(text, stop) for text in texts], tokens, broken)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cut_at(text: str, stop: Sequence[str]) -> str:
    r"""A text up to the first place where one of some texts stands.

    Example:
        >>> cut_at("four\nQ: 1 + 1", ["Q:", "\n"])
        'four'
    """
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(places)] if places else text


class _plainly:  # noqa: N801
    """Within, a model generates greedily, without anything that its own way of generating adds."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, most: int, ends: Collection[int]) -> None:
        self._model, self._before = model, model.generation_config
        named = {name: getattr(self._before, name, None) for name in OF_TOKENS}
        config = model.config.get_text_config()
        found = {*ends, *_numbers(config.eos_token_id), *_numbers(getattr(self._before, "eos_token_id", None))}
        self._plain = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=most,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(found) or None,
            **named,
        )

    def __enter__(self) -> None:
        self._model.generation_config = self._plain

    def __exit__(self, *_: object) -> None:
        self._model.generation_config = self._before


def _numbers(value: Any) -> list[int]:
    """A token, several of them, or none, as a list."""
    return [] if value is None else [int(one) for one in value] if isinstance(value, list | tuple) else [int(value)]


class _Watch(LogitsProcessor):  # type: ignore[misc]
    """Notes which rows got logits that are NaN, of which a token would be chosen all the same."""

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, tokens: Any, scores: Any) -> Any:
        # A NaN anywhere makes the sum NaN; so does infinity beside its opposite, which no processor makes.
        found = scores.sum(dim=-1).isnan()
        self.broken = found if self.broken is None else self.broken | found
        return scores


class _StopAtTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose new tokens spell one of some texts.

    Only the last tokens are read: every token spells at least one byte, but for special ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], given: int) -> None:
        self._tokenizer, self._stop, self._given = tokenizer, list(stop), given
        self._reach = max(len(one.encode()) for one in stop) + 4
        self._done: Tensor | None = None

    def __call__(self, tokens: Any, scores: Any, **kwargs: Any) -> Any:
        tail = tokens[:, max(self._given, tokens.shape[1] - self._reach) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = torch.tensor([any(one in text for one in self._stop) for text in texts], device=tokens.device)
        self._done = found if self._done is None else self._done | found
        return self._done
