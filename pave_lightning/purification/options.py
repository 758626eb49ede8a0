"""Options of purification."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from pave_lightning.config import Section
from pave_lightning.errors import shortened


def _ratio_form(value: Any) -> str:
    return "auto" if isinstance(value, str) else "number"


# The names of devices.
DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]{1,4})?)$"
# Ratios that rho: auto tries; 1 leaves the experts as they are.
AUTO_RATIOS = (0.875, 0.9375, 0.97, 0.984, 0.992, 1.0)
Rho = Annotated[
    Annotated[float, Field(gt=0, le=1), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_ratio_form),
]


class Purify(Section):
    """PAVE: keep of every fine-tuned weight the output directions that its own task excites (arXiv 2510.14697)."""

    rho: Rho = 0.97
    """Preserved rank ratio: the share of all tasks' components that are kept; or auto: the ratio, out of 0.875, 0.9375,
    0.97, 0.984, 0.992 and 1, whose merged model scores best on the validation split. 1 is no purification, so on that
    data auto is never below plain."""
    task_rho: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={}, exclude_if=lambda value: not value)
    """Ratios of single tasks, by name, in place of rho: tasks of equal ratios share one budget. With rho: auto these
    stay as they are."""
    scope: Literal["layer", "model", "global"] = "layer"
    """What shares one budget of ranks. layer: the tasks of one layer (the paper); model: as layer, then one ratio for
    each task, all the ranks that it keeps over all full ranks (the published scripts); global: all layers and tasks."""
    metric: Literal["covariance", "root", "identity"] = "covariance"
    """What ranks the directions: W C (the paper), W C^(1/2) (the output error), or W alone."""
    statistics: Literal["own", "other_task", "random", "task_vector"] = "own"
    """Whose second moments. own: the task's (the paper); other_task: those of the next task in the recipe's order, and
    random: those of Gaussian noise, the same for every seed of the recipe (both for ablation); task_vector: no data,
    the second moment of the task vector's rows, scaled to a mean of 1 on the diagonal."""
    target: Literal["expert", "delta", "delta_by_expert"] = "expert"
    """What is projected. expert: the fine-tuned weight W_t (the paper); delta: the task vector, on the directions that
    the task vector itself excites (of low rank after LoRA, so that rho must be low to change anything);
    delta_by_expert: the task vector, without the directions that the expert excites least."""
    allocation: Literal["spectral", "even"] = "spectral"
    """spectral: the weakest normalised components of all tasks go first; even: every task keeps the share rho."""
    stopping_share: float = Field(default=1.5, gt=0)
    """With spectral allocation no task loses more than this multiple of the even share."""
    nearest_budget: bool = False
    """Where stopping_share puts rho out of reach: take the nearest budget within reach instead of refusing."""
    damping: float = Field(default=0.1, ge=0)
    """Added to the diagonal of the second moment (epsilon in the paper)."""
    tasks: list[str] | None = Field(default=None, min_length=1)
    """Tasks to purify; all of them where nothing is said."""
    exact: bool = False
    """Full singular value decompositions instead of the fast eigenvalue path; for comparison."""

    def __hash__(self) -> int:
        """Of what it says, because the list of tasks has no hash of its own."""
        return hash(self.model_dump_json())

    @property
    def changes_nothing(self) -> bool:
        """Whether every task keeps all of its ranks."""
        return self.rho == 1 and all(rho == 1 for rho in self.task_rho.values())

    def rho_of(self, task: str) -> float | Literal["auto"]:
        """The ratio of a task."""
        return self.task_rho.get(task, self.rho)

    @property
    def reads_statistics(self) -> bool:
        """Whether captured statistics are needed at all."""
        return self.metric != "identity" and self.statistics in ("own", "other_task")

    @property
    def needs_inputs(self) -> str:
        """The choice, as key and value, that needs the second moments of all inputs; empty where none does."""
        if self.statistics == "other_task":
            return "statistics: other_task"
        return "target: delta" if self.target == "delta" else ""

    @property
    def summary(self) -> str:
        """What differs from other purifications, in a few words."""
        ratio = self.rho if isinstance(self.rho, str) else f"{self.rho:g}"
        words = [f"rho {ratio}", self.metric, f"{self.allocation} allocation", f"scope {self.scope}"]
        words += [f"rho {rho:g} for {task}" for task, rho in self.task_rho.items()]
        words += [] if self.statistics == "own" else [f"statistics {self.statistics}"]
        words += [] if self.target == "expert" else [f"target {self.target}"]
        return ", ".join(words)


def ratios(options: Purify) -> list[Purify]:
    """The purifications that are made: several where the ratio is chosen on validation data, none of ratios of 1."""
    tried = AUTO_RATIOS if options.rho == "auto" else (options.rho,)
    found = [options.model_copy(update={"rho": rho}) for rho in tried]
    return [one for one in found if not one.changes_nothing]


def _known_device(name: str) -> str:
    """The name of a device.

    Raises:
        ValueError: it is none.
    """
    if re.search(DEVICE, name) is None:
        raise ValueError(f"expected auto, cpu, mps, cuda, or one card such as cuda:0; found '{shortened(name)}'")
    return name


class Compute(Section):
    """How purification and merging use the machine; the results do not depend on it beyond rounding."""

    processes: int = Field(default=1, ge=1)
    """Processes that share a merge, each with its own parameters. The merged weights are the same bit for bit whatever
    their number, if each has the same number of threads. Methods that cannot be divided run in one."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each of them. Results may differ in their last bits with another number, so where one is set, it
    counts as an input of merged models. Default: the processor cores, divided among the processes."""
    workers: int | None = Field(default=None, ge=1)
    """Threads of each process that purify at once, each one task of a layer. Default: threads."""
    device: Annotated[str, AfterValidator(_known_device), Field(json_schema_extra={"pattern": DEVICE})] = "cpu"
    """Where purification and those merge methods compute that can: cpu; cuda, of several processes each on a card of
    its own where there are as many, or cuda:0, cuda:1, ... for one card; mps for methods that need no float64, all else
    stays on the CPU; auto: cuda where there is one, else cpu. On the CPU purification solves for the eigenvectors of
    the weakest directions alone, on a card for all of them."""

    def device_of(self, rank: int = 0) -> str:
        """The device of one of several processes, as PyTorch calls it."""
        if self.device not in ("auto", "cuda"):
            return self.device
        import torch

        cards = torch.cuda.device_count()
        return "cpu" if self.device == "auto" and not cards else f"cuda:{rank % max(1, cards)}"

    def threads_of_each(self, processes: int) -> int | None:
        """How many threads each of so many processes may use; None for as many as one process alone does."""
        if self.threads is not None or processes == 1:
            return self.threads
        import torch

        return max(1, torch.get_num_threads() // processes)
