"""The one interface of the merge stage: a source of task vectors, read one parameter at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError, Problems, counted, listed, naming
from pave_lightning.subspace import is_finite
from pave_lightning.weights.adapter_base import other_base
from pave_lightning.weights.adapter_models import write_with_adapter
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, Adapter, adapter_folder, misfit
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.buffers import averaged, buffer_problems
from pave_lightning.weights.checkpoint import FLOATING, Checkpoint
from pave_lightning.weights.coverage import unmergeable
from pave_lightning.weights.inferred_base import inferred_base
from pave_lightning.weights.locate import locate_model, named_adapter
from pave_lightning.weights.parameters import Parameter
from pave_lightning.weights.ties import tie_problems
from pave_lightning.weights.untied import with_heads_apart

# 0.8 MB in float32: below 1 MB the C library reuses memory, above it the system clears all pages of every block anew.
BLOCK_ELEMENTS = 200_000


class TaskVectors(ABC):
    """Base and expert weights of several tasks, parameter by parameter; never two whole models in memory.

    Tensors have the parameter's shape, or that of some of its rows, and are float32.

    Attributes:
        tasks: names of the tasks, in order.
        parameters: the floating-point parameters that base and experts share, in the order of the base.

    Example:
        >>> from pave_lightning.weights.parameters import ParameterKind
        >>> class InMemory(TaskVectors):
        ...     tasks, parameters = ("movie", "news"), (Parameter("w", ParameterKind.OTHER, (2,)),)
        ...     def base(self, parameter, rows=None):
        ...         return torch.tensor([1.0, 1.0])
        ...     def expert(self, task, parameter, rows=None):
        ...         return torch.tensor([2.0, 1.0] if task == "movie" else [1.0, 0.0])
        >>> source = InMemory()
        >>> source.vector("news", source.parameters[0])
        tensor([ 0., -1.])
    """

    tasks: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @abstractmethod
    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor (float32, of the parameter's shape), or the given rows of its first axis."""

    @abstractmethod
    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The fine-tuned tensor of a task (float32, of the parameter's shape), or the given rows of its first axis."""

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The task vector: fine-tuned minus base (float32).

        Args:
            task: the task.
            parameter: the parameter.
            rows: rows of its first axis; all of them where none are named.
            base: what :meth:`base` gives of them, where that is at hand, so that it need not be read again.
        """
        return self.expert(task, parameter, rows) - (self.base(parameter, rows) if base is None else base)

    def read(self, parameter: Parameter, rows: slice | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`base` and, for each task, :meth:`vector` give of one parameter, with the base read once."""
        base = self.base(parameter, rows)
        return base, {task: self.vector(task, parameter, rows, base) for task in self.tasks}

    def walk(
        self, parameters: Iterable[Parameter] | None = None
    ) -> Iterator[tuple[Parameter, slice | None, dict[str, Tensor]]]:
        """All tasks' vectors, block by block of `blocks`, with the parameter and the rows that they are of.

        Parameter by parameter, not task by task: a source may compute all tasks' weights of a layer together.

        Args:
            parameters: which ones; all of them where None.
        """
        for parameter in self.parameters if parameters is None else parameters:
            for rows in self.blocks(parameter):
                yield parameter, rows, self.read(parameter, rows)[1]

    def work(self, parameter: Parameter) -> float:
        """About what reading all tasks' vectors of a parameter takes, in elements that are read and added."""
        return float(len(self.tasks) * parameter.elements)

    def is_zero(self, task: str, parameter: Parameter) -> bool:
        """Whether a task leaves a parameter as it is in the base."""
        return not any(bool(self.vector(task, parameter, rows).any()) for rows in self.blocks(parameter))

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """B, ``(d_out, r)``, and A, ``(r, d_in)``, both float64, whose product is the task vector as a matrix.

        None where none are known: for all but the layers of a low-rank adapter.
        """
        return None

    def scaling(self, task: str, parameter: Parameter) -> float:
        """The factor that an adapter multiplies its product with (alpha / r); :meth:`factors` has it in B."""
        return 1.0

    def without_factors(self, task: str) -> str | None:
        """Why no layer of a task has low-rank factors; None where some have."""
        return "these task vectors are no products of adapters"

    def checkpoint(self, task: str) -> Checkpoint | None:
        """What an expert was read from; None where there is no such thing."""
        return None

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which the base stores a parameter or a running statistic, by its name."""
        return torch.float32

    def unmerged(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value (float32) of each parameter that is left out of a merge and stays as it is in the base."""
        yield from ()

    def model(self, weights: Mapping[str, Tensor], task: str | None = None) -> nn.Module:
        """A model with these weights in place of the base's, by the names of parameters and running statistics.

        Args:
            weights: the weights, in the shapes of the parameters.
            task: whose head it has; the base's where None.

        Raises:
            PaveError: these task vectors are not of modules in memory.
        """
        raise PaveError(
            "only task vectors of modules in memory make a module; load_merged(folder, task) loads one from a folder"
        )

    def running_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Name and merged value (float32) of each running statistic, such as the variances of batch norms.

        They are no parameters and have no task vectors: whatever the method and its scale, they are averaged.
        """
        yield from ()

    def blocks(self, parameter: Parameter, elements: int = BLOCK_ELEMENTS) -> Iterator[slice | None]:
        """Slices of rows of at most about ``elements`` values each, so that elementwise methods need little memory."""
        if not parameter.shape or parameter.elements <= elements:
            yield None
            return
        step = max(1, elements * parameter.shape[0] // parameter.elements)
        for start in range(0, parameter.shape[0], step):
            yield slice(start, min(start + step, parameter.shape[0]))


class DerivedTaskVectors(TaskVectors):
    """Task vectors made of others: the same tasks, parameters and base, with other experts.

    Args:
        source: any task vectors.
    """

    def __init__(self, source: TaskVectors) -> None:
        self.source = source
        self.tasks, self.parameters = source.tasks, source.parameters

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor, as it is."""
        return self.source.base(parameter, rows)

    def work(self, parameter: Parameter) -> float:
        """That of the source."""
        return self.source.work(parameter)

    def checkpoint(self, task: str) -> Checkpoint | None:
        """What the expert was read from that this one is made of."""
        return self.source.checkpoint(task)

    def model(self, weights: Mapping[str, Tensor], task: str | None = None) -> nn.Module:
        """What the source makes of these weights."""
        return self.source.model(weights, task)

    def stored_dtype(self, name: str) -> torch.dtype:
        """That of the source."""
        return self.source.stored_dtype(name)

    def unmerged(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the source."""
        return self.source.unmerged()

    def running_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """The averages, as they are."""
        return self.source.running_statistics()


def spectral_work(parameter: Parameter) -> float:
    """About what a decomposition of a parameter takes, in the same unit as `TaskVectors.work`; 0 for what is no matrix.

    Some twenty multiplications for each element and singular value, of which a core does as many in a second as it
    reads and adds 0.04 elements.
    """
    return 0.8 * parameter.elements * min(parameter.matrix_shape) if parameter.is_matrix else 0.0


class PlannedTaskVectors(TaskVectors):
    """Task vectors of experts that are not there yet: names, shapes and ranks, but no values.

    Asking for values raises `NotImplementedError`. Factors are tensors on the meta device, which have a shape only.

    Args:
        parameters: the parameters that base and experts will share.
        ranks: for each task, in order, the rank of its adapter in each adapted layer, or why it has no adapter.
    """

    def __init__(self, parameters: Iterable[Parameter], ranks: Mapping[str, Mapping[str, int] | str]) -> None:
        self.tasks, self.parameters = tuple(ranks), tuple(parameters)
        self._ranks = dict(ranks)

    def of(self, parameters: Iterable[Parameter]) -> PlannedTaskVectors:
        """Those of some of the parameters."""
        return PlannedTaskVectors(parameters, self._ranks)

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """Not known."""
        raise NotImplementedError(f"{parameter.name}: only names and shapes are known while planning")

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """Not known."""
        return self.base(parameter, rows)

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """B and A of a layer that will be adapted, without values; None for all other parameters."""
        ranks = self._ranks[task]
        if isinstance(ranks, str) or not parameter.is_matrix or parameter.layer not in ranks:
            return None
        rank, (height, width) = ranks[parameter.layer], parameter.matrix_shape
        shapes = (height, rank), (rank, width)
        left, right = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes)
        return left, right

    def without_factors(self, task: str) -> str | None:
        """Why a task's expert will have no adapter; None where it will have one."""
        ranks = self._ranks[task]
        return ranks if isinstance(ranks, str) else None


class ExpertTaskVectors(TaskVectors):
    """Task vectors of expert checkpoints of one base.

    Where an expert's folder holds the low-rank adapter that was merged into its weights, the task vectors of the
    adapted layers are the exact products of the factors, and not the difference of two rounded weights.

    Args:
        base: the base's checkpoint.
        experts: each task's checkpoint.
        architecture: the experts' architecture, which says what kind each parameter is.
        counts: how many experts a checkpoint stands for, where it is a merged model; else one.

    Attributes:
        architecture: the architecture.

    Raises:
        PaveError: base and experts differ in layer names or shapes, or an adapter is not that of its expert; all
            differences are listed, up to 20.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        architecture: Architecture,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        problems = Problems("the experts do not fit the base:")
        problems.extend(f"base: {problem}" for problem in (*tie_problems(base), *unmergeable(base, architecture)))
        for task, expert in experts.items():
            problems.extend(differences(task, base, expert, architecture))
        problems.raise_if_any()
        shared = set.intersection(*(set(expert.backbone) for expert in experts.values())) if experts else set()
        self._base, self._experts = base, dict(experts)
        self.architecture = architecture
        self.tasks = tuple(experts)
        self.parameters = tuple(
            replace(architecture.describe(name, stored.shape), shape=stored.shape)
            for name, stored in sorted(base.backbone.items())
            if name in shared and stored.is_floating and architecture.merges(name)
        )
        self._statistics = tuple(
            name
            for name, stored in sorted(base.backbone.items())
            if name in shared and stored.is_floating and architecture.averages(name)
        )
        self._counts = dict(counts or {})
        self._adapters: dict[str, Adapter] = {}
        self._held: dict[str, tuple[str, tuple[Tensor, Tensor]]] = {}
        for task, expert in experts.items():
            folder = adapter_folder(expert.folder)
            if folder is not None:
                self._adapters[task] = Adapter(folder, architecture.prefix)
                problems.extend(f"task '{task}': {problem}" for problem in self._adapter_problems(task, architecture))
        problems.raise_if_any()
        # What is removed with the task vectors.
        self.temporary: tuple[TemporaryDirectory[str], ...] = ()

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor (float32)."""
        return self._finite(self._base, parameter, rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The fine-tuned tensor as it is stored (float32), with the base's rows where the numbers of tokens differ."""
        expert = self._experts[task]
        stored = expert.backbone[parameter.name].shape
        if stored == parameter.shape:
            return self._finite(expert, parameter, rows)
        start, stop, _ = (rows or slice(None)).indices(parameter.shape[0])
        own = self._finite(expert, parameter, slice(min(start, stored[0]), min(stop, stored[0])))
        # About tokens that an expert has not it says nothing new.
        return (
            own if len(own) == stop - start else torch.cat([own, self.base(parameter, slice(start + len(own), stop))])
        )

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The task vector (float32): the product of the adapter's factors, or fine-tuned minus base."""
        pair = self.factors(task, parameter)
        if pair is None:
            # In place: what was read is nobody else's.
            return self.expert(task, parameter, rows).sub_(self.base(parameter, rows) if base is None else base)
        left, right = pair
        if parameter.input_axis == 0:
            return (right.T if rows is None else right.T[rows]).mm(left.T).float()
        product = (left if rows is None else left[rows]).mm(right)
        return product.reshape(-1, *parameter.shape[1:]).float()

    def checkpoint(self, task: str) -> Checkpoint | None:
        """The expert's checkpoint."""
        return self._experts[task]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which the base's file holds it."""
        return FLOATING[self._base.backbone[name].dtype]

    def running_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """The average over the experts of each running statistic (float32)."""
        experts = [(expert, self._counts.get(task, 1)) for task, expert in self._experts.items()]
        for name in self._statistics:
            yield name, averaged(experts, name)

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """B and A of an adapted layer (float64), None for all other parameters."""
        if not self._adapts(task, parameter):
            return None
        # The blocks of one parameter follow each other, and each would open the adapter's file again.
        name, found = self._held.get(task, (None, None))
        if found is None or name != parameter.name:
            found = self._adapters[task].factors(parameter.layer)
            self._held[task] = parameter.name, found
        return found

    def scaling(self, task: str, parameter: Parameter) -> float:
        """The factor of an adapted layer's product, 1 for all other parameters."""
        adapted = self._adapts(task, parameter)
        return self._adapters[task].layers[parameter.layer].scaling if adapted else 1.0

    def without_factors(self, task: str) -> str | None:
        """Why no layer of an expert has low-rank factors; None where some have."""
        adapter = self._adapters.get(task)
        if adapter is None:
            return f"{self._experts[task].folder} holds no adapter (looked for {ADAPTER_FOLDER}/{ADAPTER_CONFIG})"
        if adapter.refusal is None and not any(self._adapts(task, parameter) for parameter in self.parameters):
            return "its adapter is for no layer that the experts share with the base"
        return adapter.refusal

    def _adapts(self, task: str, parameter: Parameter) -> bool:
        return parameter.is_matrix and task in self._adapters and parameter.layer in self._adapters[task].layers

    def _adapter_problems(self, task: str, architecture: Architecture) -> Iterator[str]:
        """What shows that an adapter is not the one that was merged into its expert's weights."""
        adapter, expert = self._adapters[task], self._experts[task]
        adapted = {parameter.layer: parameter for parameter in self.parameters if self._adapts(task, parameter)}
        known = {parameter.layer for parameter in self.parameters}
        known |= {name.rpartition(".")[0] for name in architecture.head}
        private = absent_children(self._base, expert)
        for layer, found in adapter.layers.items():
            problem = misfit(found, adapted[layer]) if layer in adapted else None
            if problem is not None:
                yield f"{adapter.folder}: {problem}"
            elif layer not in known and layer.partition(".")[0] not in private:
                yield f"{adapter.folder}: the adapter has a layer {layer}, which the base has not"
        # One layer tells whether adapter and weights are of one run; to read them all would double the work.
        parameter = next((p for p in adapted.values() if misfit(adapter.layers[p.layer], p) is None), None)
        if parameter is not None and not self._is_merged(task, parameter):
            yield (
                f"{adapter.folder} is not the adapter of these weights: base plus B A is not what {expert.folder} "
                f"holds of {parameter.name}; put the right adapter there, or take this one away"
            )

    def _is_merged(self, task: str, parameter: Parameter) -> bool:
        """Whether the stored weight is base plus product, to within rounding in the coarsest format involved."""
        left, right = self._adapters[task].factors(parameter.layer)
        base = parameter.as_matrix(self.base(parameter)).double()
        weight = parameter.as_matrix(self.expert(task, parameter)).double()
        layer = self._adapters[task].layers[parameter.layer]
        stored = (self._base.backbone[parameter.name], self._experts[task].backbone[parameter.name])
        formats = [FLOATING[tensor.dtype] for tensor in (*stored, layer.left, layer.right) if tensor.is_floating]
        eps = max(torch.finfo(dtype).eps for dtype in formats)
        rounding = 8 * eps * (base.abs() + left.abs() @ right.abs())
        return bool(((weight - base - left @ right).abs() <= rounding).all())

    @staticmethod
    def _finite(checkpoint: Checkpoint, parameter: Parameter, rows: slice | None) -> Tensor:
        tensor = checkpoint.tensor(parameter.name, rows).float()
        if not is_finite(tensor):
            raise PaveError(f"{checkpoint.folder}: the weight {parameter.name} holds NaN or infinity")
        return tensor


def absent_modules(base: Checkpoint, architecture: Architecture, names: Iterable[str]) -> set[str]:
    """As `absent_children`, for names of a model in memory, which files may call otherwise (the layers of ViT).

    Args:
        base: the base's checkpoint.
        architecture: says how files call the model's weights.
        names: of weights of the backbone as the model has them.
    """
    of_base = {architecture.stored_names.get(name, name).partition(".")[0] for name in base.backbone}
    of_base |= {
        piece.parameter.partition(".")[0]
        for stored, place in architecture.stored_places.items()
        if stored in base.backbone
        for piece in place.pieces
    }
    return {name.partition(".")[0] for name in names} - of_base


def absent_children(base: Checkpoint, expert: Iterable[str]) -> set[str]:
    """Direct submodules of the backbone that the base has no tensor of at all, such as a pooler that was never trained.

    They start at random in every expert, so they belong to the head and are not merged.

    Args:
        base: the base's checkpoint.
        expert: names of the expert's backbone tensors; a checkpoint is one.
    """
    of_base = {name.partition(".")[0] for name in base.backbone}
    return {name.partition(".")[0] for name in expert} - of_base


def own_token_rows(base: Checkpoint, expert: Checkpoint, architecture: Architecture) -> dict[str, Tensor]:
    """The rows of the token embedding that an expert has beyond the base's, by the names of its weight.

    They belong to the expert alone, as its head does; shape ``(k, d)``, as they are stored.
    """
    found = {}
    for name in architecture.token_embeddings:
        if name in base.backbone and name in expert.backbone:
            rows, own = base.backbone[name].shape[0], expert.backbone[name].shape[0]
            if own > rows:
                found[name] = expert.tensor(name, slice(rows, own))
    return found


def _is_known(name: str, architecture: Architecture) -> bool:
    """Whether a module of the model has a weight or a buffer that checkpoints store under this name."""
    return architecture.knows(name) or name in architecture.buffers


def differences(
    task: str, base: Checkpoint, expert: Checkpoint, architecture: Architecture, *, matched: Collection[str] = ()
) -> list[str]:
    """What keeps an expert from being merged with others of that base: names and shapes, from the headers alone.

    Index buffers and other tensors that the architecture ignores may differ: not every release of transformers stores
    them. Values are read of two kinds only: buffers that must be the base's, and tied tensors that are stored twice.
    The token embedding may have more rows or fewer, see `own_token_rows`.

    Args:
        task: the expert's task.
        base: the base.
        expert: the expert.
        architecture: their architecture.
        matched: names of further tables whose rows are yet to be matched by token, which may differ in their number.
    """
    tables = {*architecture.token_embeddings, *matched}
    found = [f"task '{task}': {problem}" for problem in (*tie_problems(expert), *unmergeable(expert, architecture))]
    found += [f"task '{task}': {problem}" for problem in buffer_problems(base, expert, architecture.buffers)]
    private = absent_children(base, expert)
    of_expert = {name.partition(".")[0] for name in expert.backbone}
    strays: dict[str, list[str]] = {"expert": [], "base": []}
    for name, stored in expert.backbone.items():
        if name.partition(".")[0] in private or not stored.is_floating or not architecture.compares(name):
            continue
        if name not in base.backbone and not _is_known(name, architecture):
            strays["expert"].append(name)
        elif name not in base.backbone:
            found.append(f"task '{task}': {name} {list(stored.shape)} is in the expert, but not in the base")
        elif stored.shape != base.backbone[name].shape and not (
            name in tables and stored.shape[1:] == base.backbone[name].shape[1:]
        ):
            found.append(
                f"task '{task}': {name} is {list(stored.shape)} in the expert, "
                f"{list(base.backbone[name].shape)} in the base"
            )
    for name, stored in base.backbone.items():
        # A child that the expert lacks altogether (a pooler its architecture drops) stays as it is in the base.
        matters = stored.is_floating and architecture.compares(name) and name.partition(".")[0] in of_expert
        if architecture.inner and not architecture.knows(name) and not architecture.averages(name):
            matters = False  # the pooler of a base whose experts are language models
        if name not in expert.backbone and matters and not _is_known(name, architecture):
            strays["base"].append(name)
        elif name not in expert.backbone and matters:
            found.append(f"task '{task}': {name} {list(stored.shape)} is in the base, but not in the expert")
    strays["base"] = _without_options(strays["base"], base, architecture)
    model = architecture.backbone_class or architecture.model_class
    for names, whose in ((strays["expert"], f"task '{task}': the expert's"), (strays["base"], "base: its")):
        if names:  # of the base in the same words for every task, so that it is told once
            found.append(
                f"{whose} files hold {counted(len(names), 'weight')} that no module of a {model} has "
                f"({listed(names, 3)}), and the {'experts lack' if whose.startswith('base') else 'base lacks'}; "
                "if config.json is right, load the model with transformers, which passes over them, and save it again"
            )
    return found


def _without_options(strays: list[str], base: Checkpoint, architecture: Architecture) -> list[str]:
    """Stray weights of a base, without those that its own class has beside others of a module that experts have too.

    Such as the mask token of a base that was trained to fill masked patches: it stays as it is in the base.
    """
    owners = {name.rpartition(".")[0] for name in architecture.parameters}
    if not any(name.rpartition(".")[0] in owners for name in strays):
        return strays
    try:
        own = Architecture.of_folder(base.folder)
    except PaveError:  # a base without a class of its own
        return strays
    start = f"{architecture.prefix}." if architecture.prefix and not own.prefix else ""
    return [name for name in strays if name.rpartition(".")[0] not in owners or not own.knows(start + name)]


def checkpoint_vectors(
    base: str | None = None, experts: Mapping[str, str] | None = None, *, accept: Collection[str] = ()
) -> ExpertTaskVectors:
    """Task vectors of fine-tuned checkpoints, read lazily.

    Of models with heads for tasks the backbones are compared. Language models, whose heads score tokens, are compared
    whole: their heads count as what they are, weights of their own or, where all checkpoints tie them, the embedding.

    An expert that is a peft adapter is merged into the base first, by peft itself, one after the other; the weights
    (float32) are kept in a temporary folder for as long as the task vectors are. Its head is left out.

    Args:
        base: folder, hub id, or ``package:NAME/FOLDER`` of the base model; by default the one that the experts'
            adapters name.
        experts: the same for each task's fine-tuned checkpoint or adapter.
        accept: what may differ although it is refused otherwise: ``base``, for adapters that name another base.

    Raises:
        PaveError: a model is missing, no adapter or several different ones name the base, or the experts do not fit
            the base (all differences are listed).
    """
    folders = {task: locate_model(name, role=f"expert of '{task}'") for task, name in (experts or {}).items()}
    if not folders:
        raise PaveError("no experts are given")
    folders = {task: named_adapter(folder, role=f"expert of '{task}'") for task, folder in folders.items()}
    adapters = {task: folder for task, folder in folders.items() if (folder / ADAPTER_CONFIG).is_file()}
    reference = base if base is not None else inferred_base(folders)
    base_folder = locate_model(reference, role="base")
    kept = {}
    for task, adapter in adapters.items():
        other = None if "base" in accept else other_base(adapter, str(reference), base_folder)
        if other is not None:
            raise PaveError(f"expert of '{task}': {other}; name the adapter's own base, or accept 'base'")
        place = kept[task] = TemporaryDirectory(prefix="pave-expert-")
        with naming(f"expert of '{task}'"):
            write_with_adapter(base_folder, adapter, Path(place.name))
        folders[task] = Path(place.name)
    architecture = Architecture.of_folder(next(iter(folders.values())))
    architecture = with_heads_apart(architecture, [base_folder, *folders.values()])
    base_checkpoint = architecture.checkpoint(base_folder)
    checkpoints = {task: architecture.checkpoint(folder) for task, folder in folders.items()}
    vectors = ExpertTaskVectors(base_checkpoint, checkpoints, architecture)
    vectors.temporary = tuple(kept.values())
    return vectors
