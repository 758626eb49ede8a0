"""DARE: drop elements of the task vectors at random, rescale the rest, then merge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties, merge_trimmed, trim_thresholds
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.sequential import summed
from pave_lightning.weights import DerivedTaskVectors, Parameter, TaskVectors
from pave_lightning.weights.task_vectors import BLOCK_ELEMENTS

# One step of the Philox counter gives four words of 64 bits, which are eight draws.
DRAWS_A_STEP = 8


class DareOptions(MethodOptions):
    """Options of DARE."""

    drop_rate: float = Field(default=0.5, ge=0, lt=1)
    """Probability with which an element of a task vector is dropped. The published code searches 0.1, 0.3, 0.5, 0.7 and
    0.9; the default is the middle one."""
    rescale: Literal["keep_probability", "l1"] = "keep_probability"
    """How what is left is rescaled: by 1 / (1 - drop_rate) (the paper), or so that the sum of magnitudes of each tensor
    is what it was (mergekit), which whole tensors must be read for."""
    seed: int | None = None
    """Seed of the random masks; 0 where nothing is said."""


class DareTiesOptions(DareOptions):
    """Options of DARE followed by TIES."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each dropped and rescaled task vector's elements, zeros counted, that survives the trim of TIES; 1 trims
    nothing, as mergekit's method of this name does not."""
    merge: Literal["mean", "sum"] = "mean"
    """What becomes of the elements that have the elected sign: their mean, as in TIES, or their sum, as in mergekit."""


def uniform_draws(count: int, *, task: str, parameter: str, seed: int | None = None, start: int = 0) -> Tensor:
    """One uniform random number for each element of a task vector.

    The draws come from a counter-based generator (Philox 4x64) whose key is a hash of seed, task and parameter and
    whose counter is the element's position. So they depend on nothing else: neither on how a tensor is cut into blocks,
    nor on the other tasks, nor on the platform.

    Args:
        count: how many elements, in the order of the flattened parameter.
        task: name of the task.
        parameter: name of the parameter.
        seed: seed of all draws; None means 0.
        start: position of the first element in the flattened parameter.

    Returns:
        Shape ``(count,)``, float64: multiples of 2^-32 in [0, 1).
    """
    name = json.dumps([seed or 0, task, parameter])
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    skipped = start % DRAWS_A_STEP
    generator = np.random.Philox(key=key)
    generator.advance(start // DRAWS_A_STEP)
    words = generator.random_raw((skipped + count + 1) // 2)
    draws = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return torch.from_numpy(draws * 2.0**-32)


def kept_elements(
    count: int, drop_rate: float, *, task: str, parameter: str, seed: int | None = None, start: int = 0
) -> Tensor:
    """Which elements of a task vector DARE keeps; see `uniform_draws` for what the mask depends on.

    Args:
        count: how many elements, in the order of the flattened parameter.
        drop_rate: probability with which an element is dropped, in [0, 1).
        task: name of the task.
        parameter: name of the parameter.
        seed: seed of all masks; None means 0.
        start: position of the first element in the flattened parameter.

    Returns:
        Bool tensor of shape ``(count,)``: False with probability ``drop_rate``, to within 2^-32.
    """
    draws = uniform_draws(count, task=task, parameter=parameter, seed=seed, start=start)
    return draws >= round(drop_rate * 2**32) * 2.0**-32


def drop_and_rescale(vector: Tensor, options: DareOptions, *, task: str, parameter: str, start: int = 0) -> Tensor:
    r"""DARE's form of one task vector, :math:`m \odot \tau / (1 - p)`, which has the expectation :math:`\tau`.

    Args:
        vector: the task vector of one parameter, or a block of its rows, float32; the whole parameter where the sum of
            magnitudes is to be restored.
        options: drop rate, rescaling and seed.
        task: name of the task.
        parameter: name of the parameter.
        start: position of the vector's first element in the flattened parameter.

    Returns:
        float32, of the vector's shape; zero where nothing is kept.
    """
    kept = kept_elements(
        vector.numel(), options.drop_rate, task=task, parameter=parameter, seed=options.seed, start=start
    )
    left = torch.where(kept.view(vector.shape).to(vector.device), vector, 0.0)
    if options.rescale == "keep_probability":
        return left / (1 - options.drop_rate)
    remaining = float(left.abs().sum(dtype=torch.float64))
    return left * (float(vector.abs().sum(dtype=torch.float64)) / remaining) if remaining > 0 else left


def dropped(parameter: Parameter, vectors: Mapping[str, Tensor], options: DareOptions) -> dict[str, Tensor]:
    """DARE's form of all tasks' vectors of one parameter, or of a block of its rows; see `drop_and_rescale`."""
    start = parameter.first_element
    return {
        task: drop_and_rescale(vector, options, task=task, parameter=parameter.name, start=start)
        for task, vector in vectors.items()
    }


class DroppedTaskVectors(DerivedTaskVectors):
    """Task vectors after drop and rescale: a source in, a source out.

    Args:
        source: any task vectors.
        options: drop rate, rescaling and seed.
    """

    def __init__(self, source: TaskVectors, options: DareOptions) -> None:
        super().__init__(source)
        self.options = options

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """Base plus the dropped and rescaled task vector (float32)."""
        return self.source.base(parameter, rows) + self.vector(task, parameter, rows)

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The dropped and rescaled task vector (float32)."""
        if self.options.rescale == "l1" and rows is not None:
            return self.vector(task, parameter)[rows]
        vector = self.source.vector(task, parameter, rows, base)
        start = parameter.block(rows).first_element
        return drop_and_rescale(vector, self.options, task=task, parameter=parameter.name, start=start)

    def blocks(self, parameter: Parameter, elements: int = BLOCK_ELEMENTS) -> Iterator[slice | None]:
        """Blocks of rows; whole parameters where rescaling needs them."""
        return iter([None]) if self.options.rescale == "l1" else super().blocks(parameter, elements)


@merge_method("dare")
class Dare(StaticMethod[DareOptions]):
    r"""Drop each element of each task vector with probability p, rescale the rest by 1/(1-p), add up.

    :math:`W = W_0 + \lambda \sum_t m_t \odot \tau_t / (1 - p)` with independent :math:`m_t \sim` Bernoulli(1 - p) for
    every element. The expectation over masks is Task Arithmetic with the same scale, and p = 0 is Task Arithmetic.
    Random: report the seed. Works where task vectors are small; a high p needs redundant ones.

    Cost: one draw and one addition a weight and task.

    Source: Yu et al., *Language Models are Super Mario*, ICML 2024 (arXiv 2311.03099), followed by Task Arithmetic with
    that method's default scale. Departures: masks come from a counter-based generator (see `uniform_draws`), and
    rescaling cannot be switched off. The rescaling of mergekit, which restores each tensor's sum of magnitudes, is an
    option; its result has no expectation in closed form.
    """

    summary = "drop elements at random, rescale the rest, add up"
    source = "Yu et al. 2024, arXiv 2311.03099"
    elementwise = True
    single_precision = True
    default_scale = TaskArithmetic.default_scale
    Options = DareOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Unless a whole tensor's magnitudes are needed for its rescaling."""
        return self.options.rescale != "l1"

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Drop, rescale and add up."""
        return summed(list(dropped(parameter, vectors, self.options).values()))


@merge_method("dare_ties")
class DareTies(StaticMethod[DareTiesOptions]):
    """Drop each element of each task vector with probability p, rescale the rest by 1/(1-p), then TIES.

    TIES trims, elects signs and averages as it always does (see `Ties`), on what is left of the task vectors; where
    fewer elements than its density are left, nothing more is trimmed. Cost: that of `Dare` and `Ties`, with three
    draws for each element.

    mergekit's ``dare_ties`` is ``{density: 1, merge: sum, rescale: l1}`` with its density as 1 - ``drop_rate`` and
    scale 1.

    Source: Yu et al., *Language Models are Super Mario*, ICML 2024 (arXiv 2311.03099), with TIES by Yadav et al.,
    NeurIPS 2023 (arXiv 2306.01708).
    """

    summary = "drop elements at random, rescale the rest, then TIES"
    source = "Yu et al. 2024, arXiv 2311.03099"
    elementwise = True
    single_precision = True
    whole_model_pass = True
    default_scale = Ties.default_scale
    Options = DareTiesOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Unless a whole tensor's magnitudes are needed for its rescaling."""
        return self.options.rescale != "l1"

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's trim threshold over what is left of its task vector."""
        left = DroppedTaskVectors(vectors, self.options)
        self.thresholds = yield from trim_thresholds(self.states, left, self.options.density)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Drop, rescale, trim, elect and merge."""
        return merge_trimmed(dropped(parameter, vectors, self.options), self.thresholds, self.options.merge)
