"""Which padding mask belongs to what a module is given: the batch's own, or that of a decoder beside an encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pave_lightning.callbacks.sampling import RowSampler

# What a decoder is told by: its forward pass takes the states of an encoder beside words of its own.
ENCODER_STATES = "encoder_hidden_states"
WORDS = "input_ids"
# Labels of positions that no loss is taken at.
IGNORED = -100


PartOf = Callable[[nn.Module, Tensor], str]
"""Gives the part of the model whose padding mask an input of a module has; empty for the batch's own mask."""


def whole(module: nn.Module, inputs: Tensor) -> str:
    """One mask for the whole model, whatever the inputs, shape ``(..., d_in)``, of whichever module."""
    return ""


class DecoderPadding:
    """Finds out how the words of decoders are padded, from what each decoder is given in its forward pass.

    A decoder's words are of another length than the encoder's, or are the encoder's shifted by one place. Modules
    inside a decoder see its words; but the projections of the encoder's states, which they are given as they are, see
    the encoder's. Call `begin_batch` before each forward pass and `remove` when done.

    Args:
        backbone: the module in which decoders are sought, itself included.
        sampler: is told of each decoder's mask.
    """

    def __init__(self, backbone: nn.Module, sampler: RowSampler) -> None:
        self._sampler = sampler
        self._decoder_of: dict[int, str] = {}
        self._states: dict[str, Tensor] = {}
        self._batch: Mapping[str, Any] = {}
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for path, module in backbone.named_modules():
            signature = inspect.signature(module.forward)
            if {ENCODER_STATES, WORDS} <= set(signature.parameters):
                name = path or type(module).__name__
                self._decoder_of.update(dict.fromkeys(map(id, module.modules()), name))
                hook = partial(self._enter, name, signature)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def begin_batch(self, batch: Any, mask: Tensor | None) -> None:
        """Take a batch and its padding mask, shape ``(B, L)``; None when all rows count."""
        self.end_batch()
        self._batch = batch if isinstance(batch, Mapping) else {}
        self._mask = mask

    def end_batch(self) -> None:
        """Let go of the batch."""
        self._states.clear()
        self._batch, self._mask = {}, None

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_batch()

    def part(self, module: nn.Module, inputs: Tensor) -> str:
        """The decoder whose words the rows of an input, ``(..., d_in)``, are; empty where they are the batch's own."""
        name = self._decoder_of.get(id(module), "")
        return "" if name not in self._states or inputs is self._states[name] else name

    @torch.no_grad()
    def _enter(
        self,
        name: str,
        signature: inspect.Signature,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        states, words = given.get(ENCODER_STATES), given.get(WORDS)
        self._states.pop(name, None)
        if not isinstance(states, Tensor):
            return  # it runs without an encoder, on the batch's own words
        own = given.get("attention_mask")
        mask = own if isinstance(own, Tensor) and own.ndim == 2 else self._derived(module, words)
        if mask is not None:
            self._states[name] = states
            self._sampler.add_mask(name, mask)

    def _derived(self, module: nn.Module, words: Any) -> Tensor | None:
        """The mask of a decoder's words where nobody gives one; None where nothing is known of them."""
        if self._mask is None or not isinstance(words, Tensor) or words.ndim != 2:
            return None
        source = self._batch.get(WORDS)
        if isinstance(source, Tensor) and torch.equal(source[:, :-1], words[:, 1:]):
            return shifted(self._mask)
        labels = self._batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape == words.shape and not labels.is_floating_point():
            real = labels != IGNORED
            if not bool(real.all()):
                return real
        padding = getattr(getattr(module, "config", None), "pad_token_id", None)
        real = torch.ones_like(words, dtype=torch.bool) if padding is None else words != padding
        real[:, :1] = True  # where decoding starts, with the padding token in some models
        return real


class ConvolvedPadding:
    """Carries padding masks through convolutions along the sequence, which make it shorter.

    Such as those of waveforms and spectra to the positions that speech encoders make of them: a position is data where
    the convolution of the example alone would have it too. Call `begin_batch` before each forward pass and `remove`
    when done.

    Args:
        backbone: the module in which convolutions with one spatial axis are sought.
        sampler: is told of the mask behind each.
    """

    def __init__(self, backbone: nn.Module, sampler: RowSampler) -> None:
        self._sampler = sampler
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter)
            for module in backbone.modules()
            if isinstance(module, nn.Conv1d)
        ]

    def begin_batch(self, mask: Tensor | None) -> None:
        """Take a batch's padding mask, shape ``(B, L)``; None when all rows count."""
        self._masks = {} if mask is None else {tuple(mask.shape): mask}

    def end_batch(self) -> None:
        """Let go of the batch."""
        self._masks = {}

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_batch()

    @torch.no_grad()
    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0] if args else None
        if not isinstance(module, nn.Conv1d) or not isinstance(inputs, Tensor) or inputs.ndim != 3:
            return
        mask = self._masks.get((inputs.shape[0], inputs.shape[2]))
        found = None if mask is None else convolved(mask, module)
        if found is not None and tuple(found.shape) not in self._masks:
            self._masks[tuple(found.shape)] = found
            self._sampler.add_mask(f"behind a convolution to {found.shape[1]}", found)


def convolved(mask: Tensor, layer: nn.Conv1d) -> Tensor | None:
    """The padding mask of what a convolution makes of a padded sequence.

    Args:
        mask: shape ``(B, L)``, true or non-zero where a position is real.
        layer: the convolution.

    Returns:
        Shape ``(B, L_out)``, true where the patch reaches no further beyond the real positions than the convolution's
        own padding does beyond a sequence; None where the layer has no output.

    Example:
        >>> convolved(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), nn.Conv1d(1, 1, 3, stride=2)).int()
        tensor([[1, 1],
                [1, 0]], dtype=torch.int32)
    """
    (kernel,), (stride,), (dilation,) = layer.kernel_size, layer.stride, layer.dilation
    reach = dilation * (kernel - 1)
    if layer.padding == "valid":
        before = after = 0
    elif layer.padding == "same":
        before, after = reach // 2, reach - reach // 2
    else:
        before = after = int(layer.padding[0])
    real = (mask != 0).float()[:, None]
    # As if each example were padded by itself: in front of its first and behind its last real position.
    padded = nn.functional.pad(real, (before, after))
    wide = nn.functional.max_pool1d(nn.functional.pad(padded, (after, before)), before + after + 1, stride=1)
    if wide.shape[2] <= reach:
        return None
    inside = -nn.functional.max_pool1d(-wide, kernel, stride=stride, dilation=dilation)
    return inside[:, 0] > 0


def shifted(mask: Tensor) -> Tensor:
    """The padding mask of words that are shifted one place to the right, behind a token with which decoding starts.

    Shifting an example that is not padded drops its last word. Of one that is padded the last word is still there, in
    a place that the example alone would not have, so that place is no data either.

    Args:
        mask: shape ``(B, L)``, true or non-zero where a word is real.
    """
    real = mask.bool()
    moved = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
    places = torch.arange(real.shape[1], device=real.device)
    behind_the_last = (places * real).amax(dim=1, keepdim=True) + 1
    return moved & (places != behind_the_last) & real.any(dim=1, keepdim=True)
