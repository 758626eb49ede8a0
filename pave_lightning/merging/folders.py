"""Merged models as Hugging Face folders, and back."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pave_lightning.config import WrittenDtype, bytes_of
from pave_lightning.errors import PaveError, foreign, nearest
from pave_lightning.merging.base import MergeMethod, PerTaskMethod, StaticMethod
from pave_lightning.merging.dealing import own_parameters
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.modulators import Modulator, ModulatorWriter
from pave_lightning.merging.running import merge_per_task, merge_static, within
from pave_lightning.merging.sequential import SequentialMethod
from pave_lightning.statistics.gradients import EXPERT_DIGEST, TaskGradients
from pave_lightning.subspace.linear_fit import LinearFit
from pave_lightning.system.files import read_json, write_tensors
from pave_lightning.system.process_groups import ALONE, ProcessGroup
from pave_lightning.system.totals import Total
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    Parameter,
    ShardWriter,
    TaskVectors,
    is_finite,
    locate_model,
    rounded,
    written_dtype,
)
from pave_lightning.weights.checkpoint import model_digest, stored_tensors
from pave_lightning.weights.configuration import merged_configuration
from pave_lightning.weights.empty_models import empty_model, read_config
from pave_lightning.weights.memory import freed_memory_returned
from pave_lightning.weights.task_vectors import absent_children, own_token_rows
from pave_lightning.weights.ties import tied_names
from pave_lightning.weights.tokenizer_files import has_tokenizer

log = logging.getLogger("pave_lightning")

FACTS_FILE = "pave.json"
# Where weights do not say it.
DEFAULT_SHARD_SIZE = "5GB"
# Rounding that changes more of a merged task vector than this is warned of.
MUCH_ROUNDING = 0.25
HEAD_FILE = "head.safetensors"
# Beside a head whose last layer was fitted to the merged model: the head as its expert has it.
EXPERT_HEAD_FILE = "expert-head.safetensors"
# Beside the head of a task whose expert has more tokens than the base: their rows of the token embedding.
TOKENS_FILE = "tokens.safetensors"
# What a sequential method keeps for adding experts: a folder for each of its tensors, with names as in the model.
KEPT_FOLDER = "sequential"
# In the folder of a recipe's stage `gradients/...`.
GRADIENTS_FILE = "gradients.safetensors"


@dataclass(frozen=True)
class MergeContext:
    """What a merged folder holds besides the merged weights.

    Attributes:
        base_reference: how the base is named, for those who load the folder.
        base: the base's checkpoint; tensors that no expert shares are taken from it.
        experts: each task's checkpoint, for its head.
        architecture: the experts' architecture.
        facts: what else is noted in ``pave.json`` (method, options, scale, ...).
        one_vocabulary: whether all experts have the same rows beyond the base's, and tokenizers that know them, so that
            the merged model has them too; else they are kept with each task.
    """

    base_reference: str
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    architecture: Architecture
    facts: Mapping[str, Any]
    one_vocabulary: bool = False

    @property
    def new_rows(self) -> dict[str, Tensor]:
        """Rows of the merged model's table beyond the base's, by the names of its weight."""
        first = next(iter(self.experts.values()))
        return own_token_rows(self.base, first, self.architecture) if self.one_vocabulary else {}


@freed_memory_returned()
def write_merged(
    folder: Path,
    method: MergeMethod,
    source: TaskVectors,
    scale: float | None,
    context: MergeContext,
    *,
    merged: Mapping[str, Tensor] | None = None,
    evidence: Evidence | None = None,
    dtype: WrittenDtype = "base",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    group: ProcessGroup = ALONE,
) -> None:
    """Merge by one method and write the result as a Hugging Face folder, one parameter at a time.

    All arithmetic is float32 or float64; each weight is rounded once, when it is written. The folder holds the backbone
    (``AutoModel.from_pretrained`` loads it), the base's tokenizer or the settings of its image processor and what it
    has of generation settings and processors, ``heads/TASK`` with each task's head and configuration, where its expert
    has other tokens than the base its tokenizer and the rows of the embedding that the base lacks, for per-task methods
    ``modulators/TASK.safetensors``, for sequential methods that keep tensors ``sequential/NAME``, and ``pave.json``,
    which also names the submodules that the base does not have and ``AutoModel`` therefore draws at random
    (``not_in_the_base``, such as a pooler).

    Args:
        folder: an existing, empty folder.
        method: the method.
        source: plain or purified task vectors.
        scale: what the merged task vector is multiplied with; None for methods without a scale.
        context: what else goes into the folder.
        merged: the merged task vectors of a static method where they are known already.
        evidence: what is known of the tasks' data, for methods that need it.
        dtype: in which type the weights are written: each as the base stores it, but at most float32, or one for all.
            What per-task and sequential methods keep beside them stays float32, and heads stay as their experts have
            them.
        max_shard_size: largest size of a file of weights, in bytes or such as ``5GB``.
        group: the processes that share the work, all with the same arguments: each merges its own parameters and writes
            them into files of its own, and the first one writes what there is one of.

    Raises:
        PaveError: there is nothing to merge, the method cannot merge it, or what comes out is not finite, or too large
            for the type in which it is written.
        ValueError: ``max_shard_size`` is no size.
    """
    writer = _RoundingWriter(
        folder,
        source,
        dtype,
        bytes_of(max_shard_size),
        own_names=context.base.own_names,
        new_rows=context.new_rows,
        group=group,
    )
    factor = 1.0 if scale is None else scale
    if isinstance(method, PerTaskMethod):
        _write_per_task(folder, method, source, factor, writer, evidence=evidence, group=group)
    elif isinstance(method, StaticMethod):
        pairs: Iterable[tuple[Parameter, Tensor]]
        if merged is None:
            pairs = merge_static(method, source, evidence, group)
        else:
            pairs = ((parameter, merged[parameter.name]) for parameter in own_parameters(method, source, group))
        for parameter, vector in pairs:
            exact = _finite(method, parameter.name, _added(source, parameter, vector, factor))
            writer.add_merged(parameter.name, exact, vector, factor)
    if group.is_first:
        _write_unmerged(writer, source, context.base)
    writer.close()
    if _takes_experts_later(method, scale):
        _write_kept(folder / KEPT_FOLDER, method, source, group)
    if group.is_first:
        _write_surroundings(folder, method, context, scale, writer)


def _write_per_task(
    folder: Path,
    method: PerTaskMethod,
    source: TaskVectors,
    factor: float,
    writer: _RoundingWriter,
    *,
    evidence: Evidence | None,
    group: ProcessGroup,
) -> None:
    """Merge, and write what is shared and what each task keeps beside it."""
    kept = {task: ModulatorWriter() for task in source.tasks}
    for parameter, modulated in merge_per_task(method, source, evidence, group):
        exact = _finite(method, parameter.name, _added(source, parameter, modulated.shared))
        writer.add_merged(parameter.name, exact, modulated.shared)
        for task, mask in modulated.masks.items():
            kept[task].add_mask(parameter.name, mask)
        for task, factors in modulated.factors.items():
            for side in (factors.left, factors.right):
                _finite(method, f"{parameter.name} for task '{task}'", side)
            kept[task].add_factors(parameter.name, factors)
    (folder / "modulators").mkdir(exist_ok=group.size > 1)
    for task, rescaler in method.rescalers().items():
        _finite(method, f"the factor of task '{task}'", torch.tensor(rescaler))
        kept[task].save(folder / "modulators" / f"{task}.safetensors", factor * rescaler, group)


def _write_unmerged(writer: _RoundingWriter, source: TaskVectors, base: Checkpoint) -> None:
    """Write running statistics, and of the base whatever is not merged."""
    for name, average in source.running_statistics():
        writer.add_merged(name, average)
    done = {parameter.name for parameter in source.parameters} | writer.names
    for name in base:
        if name not in done:
            writer.add_of_base(name, base.tensor(name))


class _RoundingWriter:
    """Writes the weights of a merged model in the type that is asked for, and finds what rounding changes.

    Attributes:
        names: what has been written.
        dtype: the type of most values.
    """

    def __init__(
        self,
        folder: Path,
        source: TaskVectors,
        dtype: WrittenDtype,
        shard_bytes: int,
        *,
        own_names: Mapping[str, str],
        new_rows: Mapping[str, Tensor],
        group: ProcessGroup,
    ) -> None:
        self._new_rows, self._group = new_rows, group
        self.names: set[str] = set()
        self.asked = dtype
        self._own_names = own_names  # as the base's file calls them, so that the base's class loads them
        self._source, self._shards = source, ShardWriter(folder, shard_bytes, group=group)
        self._lost, self._merged = Total(), Total()

    def add_merged(self, name: str, exact: Tensor, vector: Tensor | None = None, factor: float = 1.0) -> None:
        """Round and write a merged weight; ``vector`` is the task vector in it, before it is multiplied."""
        found = rounded(exact, written_dtype(self.asked, self._source.stored_dtype(name)), name)
        if found.dtype != exact.dtype and vector is not None:
            self._lost += float((found.double() - exact.double()).square().sum())
            self._merged += factor**2 * float(vector.double().square().sum())
        self._write(name, found)

    def add_of_base(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the base that is not merged; as it is, or in the one type that is asked for."""
        if self.asked != "base" and tensor.is_floating_point():
            tensor = rounded(tensor, written_dtype(self.asked, tensor.dtype), name)
        self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        self._shards.add(self._own_names.get(name, name), _with_rows(tensor, self._new_rows.get(name)))
        self.names.add(name)

    def close(self) -> None:
        """Write what is pending, and learn what the other processes have rounded."""
        self._shards.close()
        told = self._group.gather([self._lost, self._merged])
        self._lost, self._merged = (sum(numbers, Total()) for numbers in zip(*told, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        elements = self._shards.elements
        return max(elements, key=lambda dtype: (elements[dtype], str(dtype)), default=torch.float32)

    @property
    def rounding(self) -> float | None:
        """Norm of what rounding changes, as a share of the merged task vector's norm; None where nothing is rounded."""
        return math.sqrt(self._lost / self._merged) if self._merged else None


def _added(source: TaskVectors, parameter: Parameter, vector: Tensor, factor: float = 1.0) -> Tensor:
    """Base plus scaled task vector; block by block, so that only the result stands beside the vector."""
    result = torch.empty(parameter.shape)
    for rows in source.blocks(parameter):
        result[within(rows)] = source.base(parameter, rows) + factor * vector[within(rows)]
    return result


def _with_rows(table: Tensor, new: Tensor | None) -> Tensor:
    """A weight with further rows, where there are any."""
    return table if new is None else torch.cat([table, new.to(table)])


def _finite(method: MergeMethod, what: str, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        PaveError: it holds NaN or infinity.
    """
    if not is_finite(tensor):
        raise PaveError(
            f"merge method '{method.name}' makes NaN or infinity of {what}, from weights that are all finite; "
            "try a smaller scale, other options, or another method"
        )
    return tensor


def _takes_experts_later(method: MergeMethod, scale: float | None) -> TypeGuard[SequentialMethod]:
    return isinstance(method, SequentialMethod) and method.has_merged and scale != 0


def _write_kept(folder: Path, method: SequentialMethod, source: TaskVectors, group: ProcessGroup) -> None:
    writers = {}
    for name in method.keeps:
        (folder / name).mkdir(parents=True, exist_ok=group.size > 1)
        writers[name] = ShardWriter(folder / name, group=group)
    for parameter in own_parameters(method, source, group) if writers else ():
        for name, tensor in method.kept(parameter, source).items():
            writers[name].add(parameter.name, tensor)
    for writer in writers.values():
        writer.close()


def load_kept(folder: Path, names: Iterable[str], prefix: str) -> dict[str, Checkpoint]:
    """What a sequential method has kept beside a merged model, read lazily.

    Args:
        folder: a merged folder as `write_merged` left it.
        names: what the method keeps.
        prefix: the architecture's backbone prefix.

    Raises:
        PaveError: something of it is missing or broken.
    """
    try:
        return {name: Checkpoint(folder / KEPT_FOLDER / name, prefix) for name in names}
    except PaveError as error:
        raise PaveError(f"what was kept for adding experts cannot be read: {error}; merge all experts again") from error


def load_gradients(place: Path, expert: Path | None = None) -> TaskGradients:
    """A task's gradients: their file, or the folder of the stage in which a recipe left it.

    Args:
        place: the file or the folder.
        expert: folder of the expert that they must have been taken of, where they say of which.

    Raises:
        PaveError: there are none, or they are another expert's.
    """
    found = TaskGradients.load(place / GRADIENTS_FILE if place.is_dir() else place)
    if expert is not None and found.metadata.get(EXPERT_DIGEST) not in (None, model_digest(expert)):
        raise PaveError(f"the gradients at {place} were taken of another expert than {expert}; take them of this one")
    return found


def _write_surroundings(
    folder: Path, method: MergeMethod, context: MergeContext, scale: float | None, written: _RoundingWriter
) -> None:
    write_surroundings(folder, context, written.dtype)
    facts = {"method": method.name, "form": method.form, "base": context.base_reference, **context.facts}
    drawn = _drawn_by_transformers(context.base)
    if drawn:
        facts["not_in_the_base"] = drawn
    if written.asked != "base":
        facts["dtype"] = written.asked
    if written.rounding is not None:
        facts["rounding"] = written.rounding
        short = str(written.dtype).removeprefix("torch.")
        if written.rounding > MUCH_ROUNDING:
            log.warning(
                "  rounding to %s changes the merged task vector by %.0f %% of its norm; write.dtype: float32 keeps it",
                short,
                100 * written.rounding,
            )
        else:
            log.info("  rounding to %s changes %.2g of the merged task vector (norms)", short, written.rounding)
    if _takes_experts_later(method, scale):
        facts |= {"sequential": method.state(scale), "base_digest": model_digest(context.base.folder)}
    write_facts(folder, facts)


def _drawn_by_transformers(base: Checkpoint) -> list[str]:
    """Submodules that the base's files lack, so that ``AutoModel`` draws them at random, such as a pooler."""
    bare = Architecture.of_folder(base.folder, "AutoModel")
    found = bare.checkpoint(base.folder).backbone
    there = {name.partition(".")[0] for stored in found for name in (stored, bare.stored_names.get(stored, stored))}
    return sorted({name.partition(".")[0] for name in bare.parameters} - there)


def write_surroundings(folder: Path, context: MergeContext, dtype: torch.dtype = torch.float32) -> None:
    """Write what stands beside the weights of a backbone: configuration, processors, and the heads of the tasks.

    What the base has of generation settings, processors and chat templates is copied as it is.

    Args:
        folder: an existing folder.
        context: whose heads; its facts are not written.
        dtype: the type of most of the weights.
    """
    # Here, so that who only loads a merged model need not load Lightning.
    from pave_lightning.tasks.image_processors import copy_image_processor
    from pave_lightning.tasks.tokenizers import load_tokenizer, padding_id, text_config

    first = next(iter(context.experts.values())).folder
    base = context.base.folder
    config = read_config(base)
    of_base = Architecture.of_folder(first if config.model_type == read_config(first).model_type else base)
    config.architectures = [of_base.backbone_class]
    config.dtype = str(dtype).removeprefix("torch.")
    for name, rows in context.new_rows.items():
        text_config(config).vocab_size = context.base.backbone[name].shape[0] + len(rows)
    config.save_pretrained(folder)
    # Whoever merges weights alone needs no tokenizer.
    read_with = first if context.one_vocabulary else base
    texts = context.architecture.token_embeddings or context.architecture.frozen
    reads = texts and (has_tokenizer(read_with) or has_tokenizer(base))
    tokenizer = load_tokenizer(read_with, base) if reads else None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_image_processor(base, base, folder)
    _carry_along(base, folder)
    for task, expert in context.experts.items():
        private = absent_children(context.base, expert)
        prefix = Architecture.of_folder(expert.folder).start
        head = expert.head_tensors()
        head |= {prefix + name: expert.tensor(name) for name in expert if name.partition(".")[0] in private}
        target = folder / "heads" / task
        target.mkdir(parents=True)
        write_tensors(target / HEAD_FILE, {name: tensor.contiguous() for name, tensor in head.items()})
        own_rows = own_token_rows(context.base, expert, context.architecture)
        if own_rows and not context.one_vocabulary:
            write_tensors(target / TOKENS_FILE, {name: tensor.contiguous() for name, tensor in own_rows.items()})
        own_config = merged_configuration(base, expert.folder)
        if tokenizer is not None:
            own_tokenizer = load_tokenizer(expert.folder, base)
            text_config(own_config).pad_token_id = own_config.pad_token_id = padding_id(own_config, own_tokenizer)
            if own_tokenizer.get_vocab() != tokenizer.get_vocab():
                own_tokenizer.save_pretrained(target)
        copy_image_processor(expert.folder, base, target)
        own_config.architectures = own_config.architectures or [context.architecture.model_class]
        own_config.save_pretrained(target)


def _carry_along(base: Path, folder: Path) -> None:
    """Copy what a base has beside weights, configuration and tokenizer that its users need."""
    from transformers import utils

    for name in (
        utils.GENERATION_CONFIG_NAME,
        utils.FEATURE_EXTRACTOR_NAME,  # of image processors too
        utils.VIDEO_PROCESSOR_NAME,
        utils.PROCESSOR_NAME,
        utils.CHAT_TEMPLATE_FILE,
        utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    ):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note what a model is: method, form, base, and more."""
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2))


def merged_facts(folder: Path) -> dict[str, Any]:
    """What `write_merged` noted of a merged model: method, form, base, and more.

    Raises:
        PaveError: the folder is no merged model.
    """
    try:
        facts = read_json(folder / FACTS_FILE, "merge again")
    except PaveError as error:
        raise PaveError(f"{folder} is no merged model: it has no readable {FACTS_FILE} ({error})") from error
    if not all(isinstance(facts.get(key), str) for key in ("method", "form", "base")):
        raise PaveError(f"{folder} is no merged model: its {FACTS_FILE} names no method, form and base")
    return facts


def _kept(file: Path) -> dict[str, Tensor]:
    """What a merged folder keeps for one task."""
    return {name: Checkpoint.read(tensor) for name, tensor in stored_tensors(file, "merge again").items()}


def write_fitted_heads(
    folder: Path, architecture: Architecture, fits: Mapping[str, tuple[str, LinearFit]], facts: Mapping[str, Any]
) -> None:
    """Give the tasks of a merged folder heads that were fitted to it; their experts' heads stay beside them.

    Args:
        folder: a merged folder as `write_merged` left it.
        architecture: the experts' architecture.
        fits: for each task that has one the name of its head's last layer, and the fit.
        facts: how they were fitted, noted under ``heads`` in ``pave.json``.
    """
    for task, (layer, fit) in fits.items():
        file, kept = (folder / "heads" / task / name for name in (HEAD_FILE, EXPERT_HEAD_FILE))
        file.rename(kept)
        head = _kept(kept)
        write_tensors(file, head | _stored_layer(head, architecture, layer, fit))
    noted = {**facts, "layers": {task: layer for task, (layer, _) in fits.items()}}
    write_facts(folder, {**merged_facts(folder), "heads": noted})


def _stored_layer(
    head: Mapping[str, Tensor], architecture: Architecture, layer: str, fit: LinearFit
) -> dict[str, Tensor]:
    """A fitted layer under the names that a head's file has for it; its bias also where there was none."""
    names = architecture.stored_names
    weight = next(name for name in head if names.get(name, name) == f"{layer}.weight")
    bias = f"{weight.removesuffix('weight')}bias"
    return {weight: fit.weight.float().contiguous(), bias: fit.bias.float().contiguous()}


def load_fitted_heads(folder: Path, architecture: Architecture) -> dict[str, LinearFit]:
    """The fitted last layers in a merged folder, by task; float64, with float32's digits."""
    found = {}
    for task, layer in merged_facts(folder).get("heads", {}).get("layers", {}).items():
        head = {architecture.stored_names.get(name, name): value for name, value in _kept_head(folder, task).items()}
        found[task] = LinearFit(head[f"{layer}.weight"].double(), head[f"{layer}.bias"].double())
    return found


def _kept_head(folder: Path, task: str, file: str = HEAD_FILE) -> dict[str, Tensor]:
    return _kept(folder / "heads" / task / file)


def load_merged(folder: str | Path, task: str, base: str | None = None, *, expert_head: bool = False) -> nn.Module:
    """A merged model with one task's head, ready to use, in eval mode.

    Args:
        folder: a merged folder as `write_merged` left it.
        task: the task whose head is used, and for per-task models what else is kept for it.
        base: the base model, for per-task models only; the one named in the folder where nothing is given.
        expert_head: whether the task's head is that of its expert, where one was fitted to the merged model.

    Returns:
        A Hugging Face model, float32. It reads the tokens of the tokenizer in
        ``heads/TASK``, where the task has one of its own, or else of that in the folder.

    Raises:
        PaveError: the folder is no merged model, or has no such task.
    """
    folder = Path(folder)
    facts = merged_facts(folder)
    per_task = facts["form"] == PerTaskMethod.form
    kept = folder / "heads"
    tasks = sorted(child.name for child in kept.iterdir()) if kept.is_dir() else []
    if task not in tasks:
        raise PaveError(f"{folder} has no head for task '{task}': {nearest(task, tasks)}")
    model = empty_model(kept / task, device="cpu").float()
    architecture = Architecture.of_folder(kept / task)
    own_names = architecture.checkpoint(folder).own_names
    # Tied tensors are as they are stored: a head that the file has beside an embedding is one of its own.
    checkpoint = Checkpoint(folder, architecture.prefix, called={own: name for name, own in own_names.items()})
    state = {name: checkpoint.tensor(name).float() for name in checkpoint if checkpoint.backbone[name].is_floating}
    if per_task:
        modulator = Modulator(folder / "modulators" / f"{task}.safetensors")
        origin = architecture.checkpoint(locate_model(base or facts["base"], role="base"))
        for name in modulator:
            if name not in origin.backbone or name not in state:
                raise PaveError(f"{folder}: what is kept for '{task}' names the weight {name}, which is not there")
            start = origin.tensor(name)
            shape = state[name][: len(start)].shape if name in architecture.token_embeddings else state[name].shape
            if start.shape != shape:
                raise PaveError(f"{folder}: the weight {name} has another shape than that of the base")
            state[name] = modulator.weight(name, start, state[name])
    as_expert = expert_head and (kept / task / EXPERT_HEAD_FILE).exists()
    head = _kept_head(folder, task, EXPERT_HEAD_FILE if as_expert else HEAD_FILE)
    own_rows = _kept(kept / task / TOKENS_FILE) if (kept / task / TOKENS_FILE).exists() else {}
    for name in architecture.token_embeddings:
        if name in state:  # the merged rows, and what the task has beyond them; fewer where its expert had fewer
            rows = torch.cat([state[name], own_rows[name].float()]) if name in own_rows else state[name]
            state[name] = rows[: architecture.vocabulary]
    lacking = _fill(model, architecture, state, head, folder)
    if lacking:
        raise PaveError(
            f"{folder} lacks {len(lacking)} weights, among them {lacking[0]}, or holds them under other names than the "
            "model knows; merge again"
        )
    return model.eval()


def _fill(
    model: nn.Module,
    architecture: Architecture,
    backbone: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    folder: Path,
) -> list[str]:
    """Put stored tensors into a model; the names of parameters that none of them fills."""
    names, start = architecture.stored_names, architecture.start
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    given: set[str] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in backbone.items():
        place = architecture.places.get(f"{start}{name}")
        if place is None:
            whole[f"{start}{names.get(name, name)}"] = tensor
        else:
            place.copy_into(parameters, tensor)
            given |= {piece.parameter for piece in place.pieces}
    whole |= {names.get(name, name): tensor for name, tensor in head.items()}
    for path, layer in model.named_modules():
        # What is fitted has an intercept, also where the expert's layer had none.
        if isinstance(layer, nn.Linear) and f"{path}.bias" in whole and "bias" not in dict(layer.named_parameters()):
            layer.bias = nn.Parameter(whole[f"{path}.bias"])
    for alias, own in tied_names(model).items():
        if alias in whole and own in whole and not torch.equal(whole[alias], whole[own]):  # as transformers has it
            owner, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(whole[alias])))
    with foreign(f"{folder} does not fit its own config.json", "merge again"):
        missing, _ = model.load_state_dict(whole, strict=False)
    return [name for name in missing if name in parameters and name not in given]
