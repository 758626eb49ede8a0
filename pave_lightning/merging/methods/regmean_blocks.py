"""RegMean++: RegMean with inputs that have come through the merged blocks before."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pave_lightning.layers import is_linear
from pave_lightning.merging.base import MethodOptions
from pave_lightning.merging.blocks import BlockStack, Entry, watched
from pave_lightning.merging.blockwise import BlockwiseMethod
from pave_lightning.merging.evidence import Need
from pave_lightning.merging.passes import load_parameters
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import AnchoredRidge
from pave_lightning.weights import Parameter, TaskVectors


class RegMeanBlocksOptions(MethodOptions):
    """Options of RegMean++."""

    nondiagonal: float = Field(default=0.95, ge=0, le=1)
    """What the elements beside the diagonal of each task's moments are multiplied with."""
    ridge: float = Field(default=1e-6, ge=0)
    """Pull towards the mean of the experts, relative to the mean of the summed moments' diagonal; it decides where no
    example says anything."""
    examples: int = Field(default=256, ge=1)
    """Unlabelled training examples a task."""


@merge_method("regmean_plus_plus")
class RegMeanBlocks(BlockwiseMethod[RegMeanBlocksOptions]):
    r"""RegMean, block by block in forward order, on what the merged blocks before hand on.

    For block :math:`l` each task's examples, which have come through the merged blocks before it, are run through the
    task's EXPERT block; with :math:`G_t` the second moments of the inputs of its linear layers, the elements beside
    the diagonal shrunk,

    .. math:: W^T = \Big[\sum_t G_t\Big]^{-1} \sum_t G_t W_t^T .

    All else is the mean of the experts. Then the examples go through the merged block.

    Needs unlabelled examples. Cost: two forward passes over the examples of all tasks and one solve a layer. Held in
    memory: the hidden states of all examples, and one merged model.

    Source: RegMean++ (arXiv 2508.03121), default shrinkage and number of examples of its published code. Departures:
    sums over real tokens only; norms behind the stack are averaged too; a small ridge to the mean instead of none.
    """

    summary = "least squares for each layer's outputs, on inputs that the merged blocks before hand on"
    source = "RegMean++ 2025, arXiv 2508.03121"
    held_models = 3  # the backbone, weights to be loaded into it, and what was solved
    needs = frozenset({Need.UNLABELLED_EXAMPLES})
    default_scale = 1.0
    Options: ClassVar[type[RegMeanBlocksOptions]] = RegMeanBlocksOptions

    @torch.no_grad()
    def prepare(self, vectors: TaskVectors) -> None:
        """Walk through the model and solve every block."""
        self._source, self._solved = vectors, dict[str, Tensor]()
        passes = self.evidence.forward_passes
        stack = passes.stack()
        load_parameters(stack.backbone, {p.name: self._mean(p) for p in vectors.parameters})
        student = {task: passes.entries(stack, task) for task in vectors.tasks}
        for index, block in enumerate(stack.blocks):
            own = stack.own(index, vectors.parameters)
            found = self._block(copy.deepcopy(block), own, student)
            load_parameters(block, found)
            self._solved.update({own[name].name: weight for name, weight in found.items()})
            for entries in student.values():
                stack.advance(index, entries)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """What the walk found; the mean of the task vectors for all else."""
        solved = self._solved.get(parameter.name)
        return torch.stack(list(vectors.values())).mean(dim=0) if solved is None else solved - base

    def _mean(self, parameter: Parameter) -> Tensor:
        return torch.stack([self._source.expert(task, parameter) for task in self._source.tasks]).mean(dim=0)

    def _block(
        self, expert: nn.Module, own: Mapping[str, Parameter], student: Mapping[str, list[Entry]]
    ) -> dict[str, Tensor]:
        """The merged weights of the linear layers of one block."""
        sums: dict[str, AnchoredRidge] = {}
        for task in self._source.tasks:
            weights = {name: self._source.expert(task, parameter) for name, parameter in own.items()}
            load_parameters(expert, weights)
            for name, moment in self._moments(expert, student[task]).items():
                parameter = own.get(f"{name}.weight")
                if parameter is not None:
                    own_sums = sums.setdefault(name, AnchoredRidge(parameter.matrix_shape))
                    own_sums.add(parameter.as_matrix(weights[f"{name}.weight"]), moment)
        found = {}
        for name, total in sums.items():
            parameter = own[f"{name}.weight"]
            mean = parameter.as_matrix(self._mean(parameter))
            weight = total.solve(self.options.ridge * total.mean_square, mean)
            found[f"{name}.weight"] = parameter.from_matrix(weight.float())
        return found

    def _moments(self, expert: nn.Module, entries: list[Entry]) -> dict[str, Tensor]:
        """Second moments of the inputs of an expert block's linear layers, shrunk beside the diagonal."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for entry in entries:
            with watched(expert) as seen:
                BlockStack.run(expert, entry)
            done: dict[int, tuple[Tensor, int]] = {}
            for name, calls in seen.inputs.items():
                if not is_linear(expert.get_submodule(name)):
                    continue
                for inputs in calls:
                    if id(inputs) not in done:  # query, key and value look at one tensor
                        rows = entry.rows(inputs)
                        done[id(inputs)] = (rows.T @ rows).double().cpu(), len(rows)
                    product, count = done[id(inputs)]
                    sums[name], counts[name] = sums.get(name, 0) + product, counts.get(name, 0) + count
        shrunk = {}
        for name, total in sums.items():
            moment = self.options.nondiagonal * total / counts[name]
            moment.diagonal().copy_(total.diagonal() / counts[name])
            shrunk[name] = moment
        return shrunk
