"""Captures what the linear layers of an expert look at, in a validation pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from pave_lightning.callbacks.adapters import has_adapters, merged_adapters, without_wrappers
from pave_lightning.callbacks.experts import ExpertObserver
from pave_lightning.callbacks.norms import NormObserver, norm_layers
from pave_lightning.callbacks.observation import LinearObserver, matrix_layers
from pave_lightning.callbacks.padding import ConvolvedPadding, DecoderPadding
from pave_lightning.callbacks.sampling import RowSampler
from pave_lightning.callbacks.used_weights import UsedWeights
from pave_lightning.errors import PaveError, nearest
from pave_lightning.statistics import NOT_REACHED, Moments, TaskStatistics

# A batch and the dotted name of a layer, empty for the batch itself -> which positions are data.
MaskOf = Callable[[Any, str], Tensor | None]
# Why a layer that was not called has no moment.
OTHERWISE_USED = "its weight is used otherwise than as one matrix that multiplies what the layer is given"


class PaveCallback(L.Callback):
    """Measures the second moments of all linear layers during ``trainer.validate``.

    These are the statistics by which PAVE purifies an expert's task vector (An, Yang, Torr, Ghanem, "Purifying Task
    Vectors in Knowledge-Aware Subspace for Model Merging", arXiv 2510.14697). Any LightningModule will do: the callback
    needs nothing of it but that its forward pass goes through modules of the kinds below.

    Captured are `torch.nn.Linear`, transformers' `Conv1D`, the fused projection of `torch.nn.MultiheadAttention` where
    query, key and value are the same tensor (under the name of the attention module), and on demand convolutions
    without groups. Layers that hold the same weight have one moment, under the name of the first; so has a
    layer that is called several times.

    What is captured for each layer is its input covariance ``C = X^T X / n``, or, where that is smaller, the cross
    moment ``A = W C = Y^T X / n`` with the outputs ``Y`` less their bias; where a layer has counted fewer rows than it
    is wide, the rows themselves (see `LayerMoment`). Layers that are given the same tensor object (query, key and
    value) share one covariance for as long as that holds: one that is later given another tensor, or is called more or
    less often, goes on with a copy of the sums. Of mixtures of experts, whose weights are one parameter with three
    axes, each expert has a moment of the rows that reach it, under the name of the parameter and the expert's number
    (``mlp.experts.down_proj.3``). Products are float32, sums compensated (see `CompensatedSum`), whatever the Trainer's
    precision. Memory is that of the moments and does not grow with the data.

    Rows are rows of a layer's input (tokens), not of a file. Where the batch holds a mask of shape ``(B, L)``, rows of
    padded positions are dropped from inputs of shape ``(B, L, d_in)``, ``(L, B, d_in)`` and ``(B * L, d_in)``. Inputs
    of any other leading shape, such as ``(B, d_in)`` after pooling, count in full, and so does everything when there is
    no mask.

    A decoder beside an encoder, told by a forward pass that takes ``encoder_hidden_states`` and ``input_ids``, has a
    mask of its own: the ``attention_mask`` that it is given. Where it is given none, its words are masked as the
    batch's ``input_ids`` are that they were shifted from, or else by ``labels`` of -100, or by the padding token. Its
    projections of the encoder's states have the encoder's mask. What follows a decoder is told by its shape.

    Behind a convolution along the sequence (of waveforms or spectra, whose mask has the length that they had before it)
    a position counts where the convolution of the example alone would have it too.

    Of these rows each layer counts ``rows`` at most, a uniform sample of every batch: what is left to count is spread
    evenly over the batches ahead, of all dataloaders, and over the processes. When the number of batches is unknown,
    each batch counts 1/32 of what is left. Layers that look at the same tokens count the same ones. The sample depends
    on ``seed``, the batch's number and the process only. A layer that is called k times in a batch spreads its part
    over the calls; the first batch, in which k is not known yet, counts k times its part. How many rows there were is
    kept with the statistics (`TaskStatistics.seen`).

    In a model that peft has wrapped, adapters are merged into the weights for the time of the pass, and layers have the
    names that they have without them.

    On demand the pass also takes, for each LayerNorm and RMSNorm, the mean squares of the normalised activations that
    its scale multiplies (`TaskStatistics.norms`), over rows that are chosen like those of the layers. They are computed
    from the norm's input in float32; norms of another form, such as batch norms, and norms that were not reached are
    listed in ``unreached_norms``.

    The callback acts in ``trainer.validate`` only, not in the validation within ``fit``. Each pass begins anew; several
    validation dataloaders are added up. Over several processes the sums are reduced before they are divided, and every
    process holds the result.

    Limits:
        * Over several processes the sampler must not repeat examples to pad: pass ``use_distributed_sampler=False`` to
          the Trainer and give each process its own part of the data.
        * The mask is the batch's own, or that of a decoder: a module that reorders the batch, cuts it up or adds tokens
          is not told apart. In models whose tensors are ``(L, B, d_in)`` the mask is
          read the wrong way round in batches with ``L == B``, except for `torch.nn.MultiheadAttention`.
        * Where a strategy divides the weights (FSDP, ``ModelParallelStrategy``, DeepSpeed), all processes must
          run the same number of batches: fill up with examples of weight 0 (``weight_key``). Merge adapters of peft
          before the weights are divided. Tensor parallelism, which divides what a layer is given, is not supported.
          With FSDP1 and DeepSpeed neither norms nor mixtures of experts are captured.
        * Of a layer that is not called (``out_proj`` of `torch.nn.MultiheadAttention`, ``dt_proj`` of Mamba) the
          products with its whole weight are found where they are functions of torch; what a kernel of its own does
          with it, or a product with divided weights, is not seen, and such a layer is listed in ``unreached``.
        * Compiled modules and the fast path of `torch.nn.TransformerEncoder` run uncompiled during the pass. Statistics
          are not part of checkpoints.

    Args:
        path: file to save the statistics to at the end of the pass, by rank zero.
        backbone: dotted name of the submodule whose layers are captured; layer names are relative to it. None takes the
            whole LightningModule.
        moments: ``"smallest"`` takes the cross moment for layers with ``d_in > d_out`` and the input covariance for all
            others; ``"input"`` always takes the covariance, which some merge methods need; ``"output"`` takes
            ``O = Y^T Y / n`` for layers with ``d_in > d_out``, all that the root metric needs of them.
        mask_key: key of the padding mask in batches that are mappings: true or non-zero where a token is real, as the
            ``attention_mask`` of tokenizers, not as the ``key_padding_mask`` of ``torch.nn.MultiheadAttention``.
        mask: which positions of what a layer is given are data, from the batch and the layer's name, as the mask above
            or None for all; in place of ``mask_key`` where layers differ, or batches are something else. One of another
            batch size than the layer's input is refused.
        metadata: strings to be kept with the statistics.
        share_inputs: whether layers with the same input share one covariance; False gives each layer its own.
        rows: how many rows of a layer's input (tokens) are counted at most over the whole pass and all processes; None
            counts all.
        seed: what the sample of rows depends on.
        convolutions: whether to capture convolutions without groups, as matrix products: a row is a patch of the
            (padded) input, laid out as one output channel's kernel is. Those whose outputs are not that product, since
            a subclass pads otherwise or changes its kernels, are listed in ``unreached``.
        keep_rows: whether a layer that has counted fewer rows than it is wide keeps the rows; otherwise it always gets
            its moment. Rows are what the expert made of single tokens: switch this off for statistics that leave the
            place where private data must stay.
        norms: whether to capture norms, which some merge methods need.
        weight_key: key of the weights of a batch's examples, shape ``(B,)``, in batches that are mappings and have it:
            examples of weight 0 are not counted, all others once.

    Raises:
        ValueError: ``moments`` is none of the above, or ``rows`` is below 1.

    Example:
        >>> callback = PaveCallback(backbone="model.bert")
        >>> trainer = L.Trainer(callbacks=[callback])
        >>> trainer.validate(expert, dataloader)  # doctest: +SKIP
        >>> callback.statistics["encoder.layer.0.attention.self.query"].matrix.shape  # doctest: +SKIP
        torch.Size([768, 768])
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        backbone: str | None = None,
        moments: Moments = "smallest",
        mask_key: str = "attention_mask",
        mask: MaskOf | None = None,
        metadata: Mapping[str, str] | None = None,
        share_inputs: bool = True,
        rows: int | None = 8192,
        seed: int = 0,
        convolutions: bool = False,
        keep_rows: bool = True,
        norms: bool = False,
        weight_key: str = "example_weight",
    ) -> None:
        if moments not in get_args(Moments):
            raise ValueError(f"moments must be one of {', '.join(get_args(Moments))}, found '{moments}'")
        if rows is not None and rows < 1:
            raise ValueError(
                "rows, the most rows of a layer's input (tokens) to count, must be at least 1, or None for all, found "
                f"{rows}"
            )
        self.path = None if path is None else Path(path)
        self.backbone = backbone
        self.moments: Moments = moments
        self.mask_key = mask_key
        self.mask = mask
        self.metadata = dict(metadata or {})
        self.share_inputs = share_inputs
        self.rows = rows
        self.seed = seed
        self.convolutions = convolutions
        self.keep_rows = keep_rows
        self.norms = norms
        self.weight_key = weight_key
        self.unreached: list[str] = []
        self.unreached_norms: list[str] = []
        self._statistics: TaskStatistics | None = None
        self._observer: LinearObserver | None = None
        self._norm_observer: NormObserver | None = None
        self._experts: ExpertObserver | None = None
        self._used: UsedWeights | None = None
        self._padding: DecoderPadding | None = None
        self._convolved: ConvolvedPadding | None = None
        self._layers: dict[str, list[nn.Module]] = {}
        self._norms: dict[str, list[nn.Module]] = {}
        self._sampler: RowSampler | None = None
        self._parts: dict[nn.Module, str] = {}
        self._sizes: dict[nn.Module, tuple[str, tuple[int, ...], int]] = {}
        self._examples = 0
        self._switches = ExitStack()

    @property
    def statistics(self) -> TaskStatistics:
        """What the last pass has captured.

        Layers that no process has reached are absent; their names are in ``unreached``, here and of the statistics,
        whose `why_unreached` gives the reason.

        Raises:
            PaveError: no pass has been completed.
        """
        if self._statistics is None:
            raise PaveError(
                "nothing has been captured: run trainer.validate(...) with this callback in the Trainer's callbacks"
            )
        return self._statistics

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new pass: find the layers and hook into them."""
        if not _is_capturing(trainer):
            return
        self._stop()
        self._statistics, self._examples, self.unreached, self.unreached_norms = None, 0, [], []
        _warn_of_repeated_examples(trainer)
        pl_module.eval()
        backbone = self._find_backbone(pl_module)
        layers = without_wrappers(matrix_layers(backbone, convolutions=self.convolutions), backbone)
        if not layers:
            found = len(matrix_layers(backbone, convolutions=True))
            raise PaveError(
                f"found no linear layers below {self.backbone or type(pl_module).__name__}: there is nothing to capture"
                + (f"; it has {found} convolutions, which convolutions=True captures" if found else "")
            )
        if _is_divided(backbone) and has_adapters(backbone):
            raise PaveError(
                "adapters cannot be merged into weights of which each process holds a part: merge them before "
                "(merge_and_unload), or capture with whole weights (strategy ddp, or a single device)"
            )
        self._switches.enter_context(merged_adapters(backbone))
        if "torch._dynamo" in sys.modules:
            # Code that was compiled before the hooks were registered would pass them over in silence.
            self._switches.enter_context(torch.compiler.set_stance("force_eager"))
        # The fast path of attention calls no modules, and hands on nested tensors, which its slow path refuses.
        self._switches.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._layers = layers
        sampler = self._sampler = RowSampler(
            self.rows,
            sum(trainer.num_val_batches) - sum(map(_stand_ins, _val_loaders(trainer))),
            seed=self.seed,
            rank=trainer.global_rank,
            processes=trainer.world_size,
        )
        self._padding = DecoderPadding(backbone, sampler)
        self._switches.callback(self._padding.remove)
        self._convolved = ConvolvedPadding(backbone, sampler)
        self._switches.callback(self._convolved.remove)
        self._observer = LinearObserver(
            layers,
            self.moments,
            sampler=sampler,
            part_of=self._part,
            share_inputs=self.share_inputs,
            keep_rows=self.keep_rows,
        )
        self._used = UsedWeights(backbone, layers, self._observer.take)
        self._switches.callback(self._used.remove)
        self._experts = ExpertObserver(backbone, self.moments, sampler, self._part, keep_rows=self.keep_rows)
        self._switches.callback(self._experts.remove)
        norms = without_wrappers(norm_layers(backbone), backbone) if self.norms else {}
        self._norms = norms
        self._norm_observer = NormObserver(norms, sampler, self._part)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the padding mask of the batch and count its examples."""
        if self._observer is None:
            return
        mask, weights = self._mask_of(batch, ""), self._weights_of(batch)
        self._observer.begin_batch(mask, batch_idx, dataloader_idx, weights)
        if self._padding is not None:
            self._padding.begin_batch(batch, mask)
        if self._convolved is not None:
            self._convolved.begin_batch(mask)
        self._tell_parts(batch, mask)
        if self._norm_observer is not None:
            self._norm_observer.begin_batch()
        if self._experts is not None:
            self._experts.begin_batch()
        if self._used is not None:
            self._used.begin_batch()
        self._examples += _examples_counted(batch, mask, weights)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Let go of the batch."""
        if self._used is not None:
            self._used.end_batch()
        if self._observer is not None:
            self._observer.end_batch()
        if self._padding is not None:
            self._padding.end_batch()
        if self._convolved is not None:
            self._convolved.end_batch()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce over processes, divide, save."""
        if self._observer is None or self._norm_observer is None or self._experts is None or self._used is None:
            return
        observer, norm_observer, experts, used = self._observer, self._norm_observer, self._experts, self._used
        if self._sampler is not None and self._sampler.unmasked is not None and not self._sampler.has_masked:
            rank_zero_warn(
                "PaveCallback: no layer's input has rows (tokens) that fit the padding masks (one had the leading "
                f"shape {self._sampler.unmasked}), so all rows were counted, padding among them; look at "
                f"{'mask_key' if self.mask is None else 'mask'}"
            )
        if experts.has_lost_padding:
            rank_zero_warn(
                "PaveCallback: a mixture of experts hands its tokens on in a way that hides which of them are padding, "
                "so the statistics of its experts count padding too"
            )
        self._stop()
        observer.reduce(pl_module.device)
        experts.reduce(pl_module.device)
        norm_observer.reduce(pl_module.device)
        examples = int(trainer.strategy.reduce(torch.tensor(self._examples, device=pl_module.device), reduce_op="sum"))
        reasons = observer.unreached()
        reasons |= dict.fromkeys(used.otherwise & reasons.keys(), OTHERWISE_USED)
        moments, norms = observer.moments() | dict(experts.moments()), norm_observer.moments()
        unreached = {
            name: reasons.get(name, NOT_REACHED) for name in (*self._layers, *experts.layers) if name not in moments
        }
        self.unreached = list(unreached)
        self._statistics = TaskStatistics(
            moments, examples=examples, metadata=self.metadata, norms=norms, unreached=unreached
        )
        self.unreached_norms = [name for name in self._norms if name not in norms]
        if self.path is not None:
            if trainer.is_global_zero:
                self._statistics.save(self.path)
            trainer.strategy.barrier("pave_callback.save")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._stop()

    def _stop(self) -> None:
        if self._observer is not None:
            self._observer.remove()
            self._observer = None
        if self._norm_observer is not None:
            self._norm_observer.remove()
            self._norm_observer = None
        self._switches.close()
        self._padding = self._convolved = self._sampler = self._experts = self._used = None
        self._parts.clear()
        self._sizes.clear()

    def _find_backbone(self, pl_module: L.LightningModule) -> nn.Module:
        if self.backbone is None:
            return pl_module
        try:
            found = pl_module.get_submodule(self.backbone)
        except AttributeError:
            names = [name for name, _ in pl_module.named_modules() if name]
            raise PaveError(
                f"{type(pl_module).__name__} has no submodule '{self.backbone}' to capture: "
                f"{nearest(self.backbone, names)}"
            ) from None
        original = getattr(found, "_orig_mod", found)
        return original if isinstance(original, nn.Module) else found

    def _tell_parts(self, batch: Any, mask: Tensor | None) -> None:
        """Let layers that have masks of their own be counted by these; layers with one mask may share a moment."""
        self._parts.clear()
        self._sizes.clear()
        if self.mask is None or self._sampler is None:
            return
        layers = {**self._layers, **self._norms}
        # All at once, so that no mask takes the place, and so the identity, of another.
        masks = {name: self._mask_of(batch, name) for name in layers}
        examples = _count_examples(batch)
        for name, own in masks.items():
            if own is not None and len(own) != examples:
                self._sizes.update(dict.fromkeys(layers[name], (name, tuple(own.shape), examples)))
        if all(own is mask for own in masks.values()):
            return
        parts: dict[int, str] = {}
        for name, own in masks.items():
            if own is not None and own is mask:
                continue
            part = parts.setdefault(id(own), f"mask {len(parts)}")
            self._sampler.add_mask(part, own)
            self._parts.update(dict.fromkeys(layers[name], part))

    def _part(self, module: nn.Module, inputs: Tensor) -> str:
        """The part of the model whose mask the rows of an input have."""
        if module in self._sizes:
            _refuse_other_batch(inputs, *self._sizes[module])
        if module in self._parts or self._padding is None:
            return self._parts.get(module, "")
        return self._padding.part(module, inputs)

    def _weights_of(self, batch: Any) -> Tensor | None:
        """The weights of a batch's examples; None where it has none, or they are all the same and not zero.

        Raises:
            PaveError: they are no tensor of shape ``(B,)``, or some examples of a batch without a mask do not count.
        """
        weights = batch.get(self.weight_key) if isinstance(batch, Mapping) else None
        if weights is None:
            return None
        if not isinstance(weights, Tensor) or weights.ndim != 1:
            found = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise PaveError(
                f"batch['{self.weight_key}'] must be a tensor of shape (batch,), found {found}: name the weights of "
                "examples with weight_key"
            )
        if bool((weights != 0).all()):
            return None
        if bool(weights.any()) and self._mask_of(batch, "") is None:
            raise PaveError(
                f"batch['{self.weight_key}'] is zero for some examples of a batch that has no mask, so their rows "
                "cannot be told apart: give a mask, or put examples of weight 0 into batches of their own"
            )
        return weights

    def _mask_of(self, batch: Any, layer: str) -> Tensor | None:
        """The mask of what a layer is given; that of the batch for no layer."""
        if self.mask is not None:
            mask = self.mask(batch, layer)
        else:
            mask = batch.get(self.mask_key) if isinstance(batch, Mapping) else None
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise PaveError(
                f"batch['{self.mask_key}'] must be a tensor of shape (batch, length), found {found}: "
                "name the padding mask with mask_key"
                if self.mask is None
                else f"mask: must give a tensor of shape (batch, length) or None, found {found} for '{layer}'"
            )
        return mask


def _is_capturing(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.VALIDATING and not trainer.sanity_checking


def _refuse_other_batch(inputs: Tensor, layer: str, mask: tuple[int, ...], examples: int) -> None:
    """Refuse a mask that belongs to another batch than the input of a layer.

    Args:
        inputs: what the layer is given, shape ``(B, L, d_in)``, ``(L, B, d_in)``, ``(B * L, d_in)`` or another one.
        layer: name of the layer.
        mask: shape of its mask, of another number of examples than the batch has.
        examples: that number.

    Raises:
        PaveError: the input holds the batch's examples one by one, and the mask does not.
    """
    size, length = mask
    leading = tuple(inputs.shape[:-1])
    if leading not in ((size, length), (length, size), (size * length,)) and leading[:1] in (
        (examples,),
        (examples * length,),
    ):
        raise PaveError(
            f"mask: the mask of '{layer}' has the shape {mask}, but the layer is given {tuple(inputs.shape)}, a batch "
            f"of {examples}; give one row for each example of the batch, or None where all positions count"
        )


def _examples_counted(batch: Any, mask: Tensor | None, weights: Tensor | None) -> int:
    """How many examples of a batch are data: none of weight 0, and none that is padding altogether."""
    if mask is None:
        return _count_examples(batch) if weights is None else int(weights.count_nonzero())
    real = mask.any(dim=1)
    return int((real if weights is None else real & (weights != 0)).sum())


def _count_examples(batch: Any) -> int:
    """Length of the first tensor in the batch that has one."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _is_divided(module: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed have divided a module's weights. Who has such a model has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(one, kinds) for one in module.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in module.parameters()
    )


def _val_loaders(trainer: L.Trainer) -> list[Any]:
    loaders = trainer.val_dataloaders
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _stand_ins(loader: Any) -> int:
    """How many batches of a loader are of weight 0, where its sampler of batches tells it."""
    return int(getattr(getattr(loader, "batch_sampler", None), "stand_ins", 0))


def _warn_of_repeated_examples(trainer: L.Trainer) -> None:
    for loader in _val_loaders(trainer):
        sampler = getattr(loader, "sampler", None)
        if trainer.world_size > 1 and isinstance(sampler, DistributedSampler) and not sampler.drop_last:
            repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
            if repeated:
                rank_zero_warn(
                    f"the distributed sampler repeats {repeated} examples, which the captured statistics count twice: "
                    "use Trainer(use_distributed_sampler=False) with a sampler that does not pad"
                )
