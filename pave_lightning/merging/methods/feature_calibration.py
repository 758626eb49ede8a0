"""FeatCal: walk through a merged model and re-solve each layer so that it puts out what the experts put out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pave_lightning.layers import is_linear, is_scaled, normalised
from pave_lightning.merging.base import MethodOptions
from pave_lightning.merging.blocks import BlockStack, Entry, Watched, watched
from pave_lightning.merging.blockwise import BlockwiseMethod
from pave_lightning.merging.evidence import Need
from pave_lightning.merging.passes import load_parameters
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import AnchoredRidge
from pave_lightning.weights import Parameter, TaskVectors

# How far a norm's output may be from scale times normalised input plus shift, relative to its largest value.
NORM_AGREEMENT = 1e-3


class FeatureCalibrationOptions(MethodOptions):
    """Options of FeatCal."""

    extrapolation: float = Field(default=2.0, ge=0)
    """How far along the anchor's merged task vector the ridge pulls: 1 is the anchor itself, 0 the base."""
    teacher_share: float = Field(default=0.3, ge=0, le=1)
    """How much of the expert's own features stands in the inputs whose outputs are aimed at; the rest is what the
    merged model itself has there."""
    ridge: float = Field(default=0.05, gt=0)
    """Weight of the pull towards the anchor, relative to one task's inputs."""
    norms: bool = True
    """Whether the scales and shifts of norms are solved for as well."""
    biases: bool = True
    """Whether the biases of linear layers are solved for as well."""
    unread_tokens: float = Field(default=0.01, ge=0, le=1)
    """Weight, in the last block, of tokens that no head reads. Heads read the first token, or the last one where no
    token sees the ones behind it. What the block itself is given (for its keys and values) counts in full.
    Set 1 for a head that pools over all tokens."""
    unread_in: Literal["last", "all"] = "last"
    """Where tokens that no head reads have that weight: in the last block, or in all of them."""
    affine: bool = False
    """Whether weight and bias of a layer are solved for together, as one affine map; the source solves for the weight
    first. Only where biases are solved for."""
    sweeps: int = Field(default=1, ge=1)
    """How often each block is solved before the walk goes on; the layers of a block see each other's new weights from
    the second time on."""
    examples: int = Field(default=256, ge=1)
    """Unlabelled training examples a task."""


@dataclass
class _Inputs:
    """Second moments of one layer's inputs over one task: the merged model's own, and with those aimed at."""

    own: Tensor
    aimed: Tensor
    own_mean: Tensor
    aimed_mean: Tensor
    rows: float = 0.0

    def augmented(self) -> tuple[Tensor, Tensor]:
        """Both moments, as means, of inputs with a last element of one, for which a bias is a column of the weight."""
        one = torch.ones(1, dtype=torch.float64)
        own_mean, aimed_mean = self.own_mean / self.rows, self.aimed_mean / self.rows
        own = torch.cat([torch.cat([self.own / self.rows, own_mean[:, None]], 1), torch.cat([own_mean, one])[None]])
        last = torch.cat([aimed_mean, one])[None]
        return own, torch.cat([torch.cat([self.aimed / self.rows, own_mean[:, None]], 1), last])

    @classmethod
    def zeros(cls, width: int) -> _Inputs:
        square, line = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        return cls(square, square.clone(), line, line.clone())

    def add(self, own: Tensor, aimed: Tensor, weights: Tensor) -> None:
        """Add rows with their weights, shape ``(n, 1)``."""
        weighted = own * weights
        self.own += (weighted.T @ own).double().cpu()
        self.aimed += (weighted.T @ aimed).double().cpu()
        self.own_mean += weighted.sum(dim=0).double().cpu()
        self.aimed_mean += (aimed * weights).sum(dim=0).double().cpu()
        self.rows += float(weights.sum())


@dataclass
class _Normal:
    """What one linear layer is solved from, added up over the tasks."""

    weights: AnchoredRidge
    shift: Tensor
    mean: Tensor
    share: float = 0.0


@dataclass
class _Squares:
    """First and second moments of what one norm's scale multiplies, over one task."""

    squares: Tensor
    mean: Tensor
    rows: float = 0.0


@dataclass
class _Seen:
    """What one task shows in one block."""

    linear: dict[str, _Inputs] = field(default_factory=dict)
    norms: dict[str, _Squares] = field(default_factory=dict)
    unpaired: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Weighing:
    """How much the rows of a layer count in one batch: less for tokens that no head reads, behind the attention."""

    hidden: Tensor
    seen: Watched
    read: Tensor
    unread: float

    def of(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Weight of each row of a layer's input, shape ``(n, 1)``."""
        if self.seen.is_given(inputs, self.hidden) or len(rows) != len(self.read):
            return rows.new_ones(len(rows), 1)
        return torch.where(self.read, 1.0, self.unread)


@merge_method("featcal")
class FeatureCalibration(BlockwiseMethod[FeatureCalibrationOptions]):
    r"""Calibrate a merged model, the anchor: solve every layer anew on the features that the merged model really has.

    Block after block in forward order. Student features :math:`x_s` come from the calibrated blocks before, teacher
    features :math:`x_e` from the expert; the layer is to put out what the expert's layer does on
    :math:`x = a x_e + (1 - a) x_s`. With :math:`S_t = E[x_s x_s^T]`, :math:`C_t = E[x_s x^T]`,
    :math:`n_t = \|S_t\|_F` and the extrapolated anchor :math:`A = W_0 + \rho (W_{anchor} - W_0)`:

    .. math:: W^T = \Big[\sum_t S_t / n_t + \lambda I\Big]^{-1} \Big[\sum_t C_t W_t^T / n_t + \lambda A^T\Big]

    Then the bias, :math:`b = [\sum_t (b_t + W_t E[x] - W E[x_s]) / n_t + \lambda A_b] / [\sum_t 1/n_t + \lambda]`, and
    for norms the same with two unknowns a channel. Embeddings and what lies outside of the blocks stay the anchor's.

    Needs an anchor and unlabelled examples; no labels, no gradients. Cost: two forward passes over the examples of all
    tasks and one solve a layer. Held in memory: the hidden states of all examples twice, and one merged model.

    The teachers are the experts as they were fine-tuned; purification acts through the anchor alone.

    Source: FeatCal (arXiv 2605.13030); its published code uses extrapolation 2.2 and teacher share 0.25.
    Departures: any transformer whose blocks follow each other, told by what layers are given and not by their names, so
    that queries, and a norm before them, count all tokens as keys and values do (the source: keys and values only);
    sums over real tokens only; the options ``affine``, ``unread_in`` and ``sweeps`` are ours.
    """

    summary = "re-solve a merged model's layers, block by block, for what the experts' layers put out"
    source = "FeatCal 2026, arXiv 2605.13030"
    held_models = 4  # the anchor, the backbone, weights to be loaded into it, and what was solved
    needs = frozenset({Need.ANCHOR, Need.UNLABELLED_EXAMPLES})
    Options: ClassVar[type[FeatureCalibrationOptions]] = FeatureCalibrationOptions

    @torch.no_grad()
    def prepare(self, vectors: TaskVectors) -> None:
        """Walk through the model and solve every block."""
        self._source, self._solved = vectors, dict[str, Tensor]()
        passes = self.evidence.forward_passes
        stack = passes.stack()
        self._reads_last = stack.reads_last(passes.first())
        teachers = {}
        for task in vectors.tasks:
            load_parameters(stack.backbone, {p.name: self._expert(task, p) for p in vectors.parameters})
            teachers[task] = passes.entries(stack, task)
        load_parameters(stack.backbone, {p.name: self._pull(p, 1.0) for p in vectors.parameters})
        student = {task: passes.entries(stack, task) for task in vectors.tasks}
        for index, block in enumerate(stack.blocks):
            own = stack.own(index, vectors.parameters)
            teacher = copy.deepcopy(block)
            for sweep in range(self.options.sweeps):
                move, unread = sweep == self.options.sweeps - 1, 1.0
                if index == len(stack.blocks) - 1 or self.options.unread_in == "all":
                    unread = float(self.options.unread_tokens)
                found = self._solve(block, teacher, own, student, teachers, move=move, unread=unread)
                load_parameters(block, found)
                self._solved.update({own[name].name: value for name, value in found.items()})
            for entries in student.values():
                stack.advance(index, entries)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """What the walk found; the anchor's task vector for all else."""
        solved = self._solved.get(parameter.name)
        return self.evidence.anchor_vector(parameter) if solved is None else solved.cpu() - base

    # ---- the walk --------------------------------------------------------------------------------------------------

    def _pull(self, parameter: Parameter, times: float | None = None) -> Tensor:
        """The base plus so many times the anchor's task vector; as often as the ridge pulls to, unless told."""
        times = float(self.options.extrapolation) if times is None else times
        return self._source.base(parameter) + times * self.evidence.anchor_vector(parameter)

    def _expert(self, task: str, parameter: Parameter) -> Tensor:
        return self.evidence.forward_passes.experts.expert(task, parameter)

    def _solve(
        self,
        block: nn.Module,
        teacher: nn.Module,
        own: Mapping[str, Parameter],
        student: Mapping[str, list[Entry]],
        teachers: Mapping[str, list[Entry]],
        *,
        move: bool,
        unread: float,
    ) -> dict[str, Tensor]:
        """What one block is solved to; with ``move`` the teachers' hidden states move on behind it."""
        normal: dict[str, _Normal] = {}
        norms: dict[str, Tensor] = {}
        unpaired: set[str] = set()
        for task in self._source.tasks:
            load_parameters(teacher, {name: self._expert(task, parameter) for name, parameter in own.items()})
            seen = self._show(block, teacher, student[task], teachers[task], move=move, unread=unread)
            unpaired |= seen.unpaired
            for name, inputs in seen.linear.items():
                _add_linear(normal, name, inputs, teacher.get_submodule(name), affine=self._is_affine)
            for name, squares in seen.norms.items():
                _add_norm(norms, name, squares, teacher.get_submodule(name))
        paired = {name: sums for name, sums in normal.items() if name not in unpaired}
        return dict(self._linear(paired, own)) | dict(self._norms(norms, own))

    def _show(
        self,
        block: nn.Module,
        teacher: nn.Module,
        student: list[Entry],
        teachers: list[Entry],
        *,
        move: bool,
        unread: float,
    ) -> _Seen:
        """Moments of what the layers of a block see, in the merged model and in the expert."""
        seen, share = _Seen(), self.options.teacher_share
        for mine, theirs in zip(student, teachers, strict=True):
            with watched(block) as own:
                BlockStack.run(block, mine)
            with watched(teacher) as aimed:
                behind = BlockStack.run(teacher, theirs)
            weighing = _Weighing(mine.hidden, own, mine.read_rows(last=self._reads_last)[:, None], unread)
            done: dict[tuple[int, ...], str] = {}
            for name, calls in own.inputs.items():
                module, theirs_too = block.get_submodule(name), aimed.inputs.get(name, [])
                if not is_linear(module):
                    for inputs, output in zip(calls, own.outputs[name], strict=True):
                        rows = mine.rows(inputs)
                        inner = _inner(module, rows, mine.rows(output)) if self.options.norms else None
                        if inner is not None:
                            _add_rows(seen.norms, name, inner, weighing.of(inputs, rows))
                    continue
                if [inputs.shape for inputs in calls] != [inputs.shape for inputs in theirs_too]:
                    seen.unpaired.add(name)  # tokens that are sent to other experts of a mixture, say
                    continue
                # Query, key and value look at one tensor, and share its moments.
                owner = done.setdefault(tuple(map(id, calls)), name)
                if owner != name:
                    seen.linear[name] = seen.linear[owner]
                    continue
                for inputs, theirs_now in zip(calls, theirs_too, strict=True):
                    rows = mine.rows(inputs)
                    moments = seen.linear.setdefault(name, _Inputs.zeros(rows.shape[1]))
                    aim = share * mine.rows(theirs_now) + (1 - share) * rows
                    moments.add(rows, aim, weighing.of(inputs, rows))
            if move:
                theirs.move(behind)
        return seen

    @property
    def _is_affine(self) -> bool:
        return bool(self.options.affine and self.options.biases)

    # ---- the solves ------------------------------------------------------------------------------------------------

    def _linear(self, normal: Mapping[str, _Normal], own: Mapping[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
        ridge = self.options.ridge
        for name, sums in normal.items():
            parameter, bias = own.get(f"{name}.weight"), own.get(f"{name}.bias")
            if parameter is None:
                continue
            pull = parameter.as_matrix(self._pull(parameter))
            if bias is not None and sums.weights.shape[1] > pull.shape[1]:
                both = sums.weights.solve(ridge, torch.cat([pull, self._pull(bias)[:, None]], dim=1))
                yield f"{name}.weight", parameter.from_matrix(both[:, :-1].float())
                yield f"{name}.bias", both[:, -1].float()
                continue
            weight = sums.weights.solve(ridge, pull)
            yield f"{name}.weight", parameter.from_matrix(weight.float())
            if self.options.biases and bias is not None:
                aim = self._pull(bias).double()
                solved = (sums.shift - weight @ sums.mean + ridge * aim) / (sums.share + ridge)
                yield f"{name}.bias", solved.float()

    def _norms(self, norms: Mapping[str, Tensor], own: Mapping[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
        ridge = self.options.ridge
        for name, (squares, mean, count, scaled, shifted) in norms.items():
            scale, shift = own.get(f"{name}.weight"), own.get(f"{name}.bias")
            if scale is None:
                continue
            first, aim = squares + ridge, scaled + ridge * self._pull(scale).double()
            if shift is None:
                yield f"{name}.weight", (aim / first).float()
                continue
            second, other = count + ridge, shifted + ridge * self._pull(shift).double()
            determinant = first * second - mean * mean
            yield f"{name}.weight", ((aim * second - mean * other) / determinant).float()
            yield f"{name}.bias", ((first * other - mean * aim) / determinant).float()


def _add_rows(norms: dict[str, _Squares], name: str, rows: Tensor, weights: Tensor) -> None:
    exact, shares = rows.double(), weights.double()
    zeros = torch.zeros(rows.shape[1], dtype=torch.float64)
    sums = norms.setdefault(name, _Squares(zeros, zeros.clone()))
    sums.squares += (exact.square() * shares).sum(dim=0).cpu()
    sums.mean += (exact * shares).sum(dim=0).cpu()
    sums.rows += float(shares.sum())


def _inner(module: nn.Module, rows: Tensor, outputs: Tensor) -> Tensor | None:
    """What a norm multiplies with its scale; None for norms of another form, which are left as they are."""
    if rows.shape != outputs.shape or rows.shape[-1] != module.get_parameter("weight").numel():
        return None
    inner = normalised(module, rows)
    return inner if is_scaled(module, inner, outputs, tolerance=NORM_AGREEMENT) else None


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as ``(d_out, d_in)``, float64."""
    weight = module.get_parameter("weight").double().cpu()
    return weight if isinstance(module, nn.Linear) else weight.T


def _add_linear(normal: dict[str, _Normal], name: str, inputs: _Inputs, teacher: nn.Module, *, affine: bool) -> None:
    """Add one task's part to a linear layer's sums."""
    weight, bias = _matrix(teacher), getattr(teacher, "bias", None)
    own, aimed = inputs.own / inputs.rows, inputs.aimed / inputs.rows
    share = 1 / max(float(own.norm()), 1e-8)
    if affine and bias is not None:
        own, aimed = inputs.augmented()
        weight = torch.cat([weight, bias.double().cpu()[:, None]], dim=1)
    zeros = torch.zeros(len(weight), dtype=torch.float64)
    ridge = AnchoredRidge((len(weight), len(own)))
    sums = normal.setdefault(name, _Normal(ridge, zeros, torch.zeros_like(inputs.own_mean)))
    sums.weights.add(weight, own, cross=aimed, share=share)
    if affine and bias is not None:
        return
    shift = weight @ (inputs.aimed_mean / inputs.rows)
    sums.shift += share * (shift if bias is None else shift + bias.double().cpu())
    sums.mean += share * inputs.own_mean / inputs.rows
    sums.share += share


def _add_norm(norms: dict[str, Tensor], name: str, sums: _Squares, teacher: nn.Module) -> None:
    """Add one task's part to a norm's equations: squares, means, number of tasks, and both right-hand sides."""
    squares, mean = sums.squares / sums.rows, sums.mean / sums.rows
    scale = teacher.get_parameter("weight").double().cpu()
    bias = getattr(teacher, "bias", None)
    shift = torch.zeros_like(scale) if bias is None else bias.double().cpu()
    part = torch.stack([squares, mean, torch.ones_like(mean), squares * scale + mean * shift, mean * scale + shift])
    norms[name] = norms[name] + part if name in norms else part
