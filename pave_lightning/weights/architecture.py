"""What a model's configuration says about its weights, without loading any."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pave_lightning.errors import PaveError, foreign, shortened
from pave_lightning.system.files import file_facts, read_json
from pave_lightning.weights.buffers import BufferKind, buffer_kinds
from pave_lightning.weights.checkpoint import Checkpoint
from pave_lightning.weights.embeddings import token_embeddings
from pave_lightning.weights.fused import fused_parts
from pave_lightning.weights.matrices import Outputs, Part
from pave_lightning.weights.parameters import Parameter, ParameterKind, kind_of, parameters_of
from pave_lightning.weights.places import Piece, Place, loaded_names, stored_places
from pave_lightning.weights.positions import longest_sequence
from pave_lightning.weights.quantised import quantisation_problem
from pave_lightning.weights.remembered import remembered
from pave_lightning.weights.ties import tied_names

if TYPE_CHECKING:  # to load the classes of models takes seconds
    from transformers import PretrainedConfig

MOST_LAYERS = 500
MOST_PARTS = 2_000
MOST_LABELS = 100_000
MOST_PARAMETERS = 20_000
LARGEST_SIZE = 2**31 - 1
# Keys that count what a model is built of, and keys of sizes that only look like them.
_LAYERS = re.compile(r"layer|depth(?!wise)|block|stage")
_PARTS = re.compile(r"expert|group|head")
_SIZES = re.compile(r"size|dim|_ids?$|length|position")


# Classes of transformers that build a model of images and of texts, of which tasks change what reads the images.
ONE_SIDED = ("AutoModelForZeroShotImageClassification",)

_TOO_LARGE: set[tuple[Path, tuple[int, ...]]] = set()


@dataclass(frozen=True)
class Weight:
    """One parameter of a whole model, backbone or head.

    Attributes:
        names: its name; several where it is tied.
        shape: its shape.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A model as its configuration gives it: names, shapes and kinds of its weights, none of their values.

    Attributes:
        model_class: name of the class of transformers.
        backbone_class: that of its backbone.
        prefix: name under which the whole model holds its backbone (``bert``, ``roberta``, ...); empty for language
            models, whose head is merged as all else is.
        inner: name under which a language model holds what is below its head, which checkpoints may store without it.
        parameters: the backbone's parameters by name, in the order of the modules.
        weights: all parameters of the whole model, by their names in it.
        state: names of all that the whole model loads and saves, buffers too.
        renamed: names under which checkpoints store tensors of the whole model -> their names in it, where the two
            differ (transformers renames the weights of ViT when it loads and saves them).
        places: names under which checkpoints store tensors that the whole model has joined or divided (the experts of
            Mixtral) -> where they lie in it.
        children: direct submodules of the backbone -> whether they hold embeddings or a stack of blocks.
        private: direct submodules of the backbone that not every model of the tasks has.
        beside: direct submodules and parameters of the whole model that are its head, where the backbone is no
            submodule of its own but all the others (CLIPForImageClassification); else none.
        frozen: direct submodules and parameters of the backbone that no task changes, so that they are neither trained
            nor merged: the text side of models that classify images by texts.
        token_embeddings: names of the weight that has one row a token; several where it is shared, none where there is
            no such table.
        config: the configuration, as plain values and with its defaults.
        obsolete: patterns of tensors that older releases of transformers stored and the model no longer has.
        tied: other names under which checkpoints may store a backbone tensor -> the name that it goes by here.
        aliases: these other names -> what a parameter of that name is, where a checkpoint has untied it.
        copied: names of parameters that some checkpoints tie and others do not -> the one that they are then tied to.
        buffers: kinds of the backbone's buffers, by the names under which checkpoints store them.
        positions: longest sequence in tokens; None where no table of positions limits it.
        main_input: name of what the model reads.
        takes_mask: whether it can be told which positions are padding.
    """

    model_class: str
    prefix: str
    parameters: dict[str, Parameter]
    weights: tuple[Weight, ...] = field(default=(), repr=False)
    state: frozenset[str] = field(default=frozenset(), repr=False)
    children: dict[str, bool] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    main_input: str = ""
    takes_mask: bool = True
    obsolete: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict, repr=False)
    places: dict[str, Place] = field(default_factory=dict, repr=False)
    inner: str = ""
    tied: dict[str, str] = field(default_factory=dict, repr=False)
    aliases: dict[str, Parameter] = field(default_factory=dict, repr=False)
    copied: dict[str, str] = field(default_factory=dict, repr=False)
    buffers: dict[str, BufferKind] = field(default_factory=dict, repr=False)
    token_embeddings: tuple[str, ...] = ()
    positions: int | None = None
    private: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    backbone_class: str = ""

    @classmethod
    def of_folder(cls, folder: Path, *auto_models: str, **changes: Any) -> Architecture:
        """Read ``config.json`` of a model folder; remembered, also for other processes, until the file changes.

        Args:
            folder: folder of a model.
            auto_models: names of classes of transformers that build models with the heads of the tasks, such as
                ``AutoModelForSequenceClassification``; see `empty_model` for none. Of several, what their backbones
                have in common is described.
            changes: values of the configuration in place of those of the file.

        Raises:
            PaveError: the configuration is missing, broken, or of an architecture that has no such form.
        """
        found = [
            _architecture(folder, name, json.dumps(changes), _stamp(folder))
            for name in dict.fromkeys(auto_models or (None,))
        ]
        return found[0] if len(found) == 1 else _in_common(found)

    @classmethod
    def of_model(cls, model: nn.Module) -> Architecture:
        """The architecture of a Hugging Face model; nothing but names, shapes and kinds is looked at."""
        beside, inner = heads_beside(model), str(model.base_model_prefix)
        backbone = model if beside else backbone_of(model)
        is_language_model = has_language_head(model)
        prefix = "" if backbone is model else f"{inner}."
        parts = {name.removeprefix(prefix): found for name, found in fused_parts(model).items()}
        parameters = {name: one for name, one in parameters_of(backbone, parts).items() if not lies_in(name, beside)}
        tied_to = tied_names(backbone)
        untied = {
            name: _as_alias(backbone, name, parameters[own]) for name, own in tied_to.items() if own in parameters
        }
        shapes_of_all = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        renamed, places = {}, {}
        for stored, place in stored_places(model).items():
            first, *more = place.pieces
            if not more and first.fills(shapes_of_all.get(first.parameter, ())):
                renamed[stored] = first.parameter
            else:
                places[stored] = place
        files_call = {
            name.removeprefix(prefix): stored.removeprefix(prefix)
            for stored, name in renamed.items()
            if name.startswith(prefix)
        }
        aliases: dict[int, list[str]] = {}
        shapes: dict[int, tuple[int, ...]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(tensor), []).append(name)
            shapes[id(tensor)] = tuple(tensor.shape)
        config: Any = model.config
        values = config.to_dict()
        return cls(
            model_class=type(model).__name__,
            backbone_class=_bare_class(model.config) if beside else type(backbone).__name__,
            beside=beside,
            prefix="" if is_language_model or beside else inner,
            inner=inner if is_language_model and hasattr(model, inner) else "",
            parameters=parameters,
            weights=tuple(Weight(tuple(names), shapes[key]) for key, names in aliases.items()),
            state=frozenset(model.state_dict()),
            children={name: _is_trunk(child) for name, child in backbone.named_children() if name not in beside},
            config=values,
            main_input=str(model.main_input_name),
            takes_mask="attention_mask" in inspect.signature(model.forward).parameters,
            obsolete=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            renamed=renamed,
            places=places,
            tied={files_call.get(name, name): files_call.get(own, own) for name, own in tied_to.items()},
            aliases=untied,
            buffers={
                files_call.get(name, name): kind
                for name, kind in buffer_kinds(backbone).items()
                if not lies_in(name, beside)
            },
            token_embeddings=tuple(token_embeddings(backbone)),
            positions=longest_sequence(backbone, values),
        )

    @property
    def start(self) -> str:
        """What names of the backbone's weights begin with in the whole model; empty where it is the model itself."""
        return f"{self.prefix}." if self.prefix and self.model_class != self.backbone_class else ""

    @cached_property
    def stored_places(self) -> dict[str, Place]:
        """Names under which checkpoints store what the backbone has joined or divided -> where it lies in the backbone.

        Places are by the names of parameters inside the backbone.
        """
        found = {}
        for stored, place in self.places.items():
            pieces = tuple(replace(one, parameter=one.parameter.removeprefix(self.start)) for one in place.pieces)
            if all(one.parameter in self.parameters for one in pieces):
                found[stored.removeprefix(self.start)] = Place(pieces)
        return found

    def stored_for(self, name: str) -> frozenset[str]:
        """Names under which checkpoints may store a parameter of the backbone, or parts of it, besides its own."""
        return self._stored_for.get(name, frozenset())

    @cached_property
    def _stored_for(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for stored, name in self.stored_names.items():
            found.setdefault(name, set()).add(stored)
        for stored, place in self.stored_places.items():
            for piece in place.pieces:
                found.setdefault(piece.parameter, set()).add(stored)
        return {name: frozenset(names) for name, names in found.items()}

    def knows(self, name: str) -> bool:
        """Whether the backbone has a weight, or some of one, that checkpoints store under this name."""
        return name in self.parameters or name in self.stored_names or name in self.stored_places

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """Names under which checkpoints store parameters of the backbone -> names of these, where the two differ."""
        start = f"{self.prefix}."
        return {
            stored.removeprefix(start): name.removeprefix(start)
            for stored, name in self.renamed.items()
            if name.startswith(start) or name in self.parameters
        }

    @cached_property
    def head(self) -> frozenset[str]:
        """Names of the parameters outside the backbone."""
        start = f"{self.prefix}."
        first = {weight.names[0] for weight in self.weights}
        return frozenset(name for name in first if not name.startswith(start) and name not in self.parameters)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding; None where the model reads no tokens."""
        found = [self.parameters[name] for name in self.token_embeddings if name in self.parameters]
        rows = found[0].shape[0] if found else self.config.get("vocab_size")
        return rows if isinstance(rows, int) else None

    @property
    def intended_positions(self) -> int | None:
        """The longest sequence that the configuration speaks of; None where it names none.

        Only worth a remark: models without a table of positions read longer ones as well.
        """
        known = self.config.get("max_position_embeddings")
        return known if isinstance(known, int) and known > 0 else None

    def describe(self, name: str, shape: tuple[int, ...]) -> Parameter:
        """The parameter of that name; a stored tensor that the model class does not know is of kind other."""
        known = self.parameters.get(name)
        if known is not None:
            return known
        renamed = self.parameters.get(self.stored_names.get(name, ""))
        if renamed is not None:
            return replace(renamed, name=name, module=renamed.layer)
        place = self.stored_places.get(name)
        if place is not None:
            return _placed(name, shape, place, self.parameters)
        return Parameter(name, ParameterKind.OTHER, shape)

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor of that name means nothing to the model (the causal masks of old GPT-2 files)."""
        return name not in self.parameters and any(re.search(pattern, name) for pattern in self.obsolete)

    def averages(self, name: str) -> bool:
        """Whether a stored tensor of that name is a running statistic."""
        return self.buffers.get(name) is BufferKind.STATISTICS

    def merges(self, name: str) -> bool:
        """Whether a stored floating-point tensor of that name is a weight that tasks change, and no buffer."""
        return name not in self.buffers and not self.ignores(name) and not lies_in(name, self.frozen)

    def compares(self, name: str) -> bool:
        """Whether base and experts must both store a floating-point tensor of that name, in one shape."""
        return self.merges(name) or self.averages(name)

    def untied(self, copied: Mapping[str, str]) -> Architecture:
        """The same model with weights apart that it could tie.

        Args:
            copied: names of parameters that checkpoints may tie -> the parameter that they are then tied to.
        """
        names = [name for name in copied if name in self.aliases and name in self.tied]
        return replace(
            self,
            parameters=self.parameters | {name: self.aliases[name] for name in names},
            tied={name: own for name, own in self.tied.items() if name not in names},
            copied={**self.copied, **copied},
        )

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The weights of a model folder of this architecture, in which tied tensors count once."""
        return self._checkpoint(folder, frozenset())

    def base_checkpoint(self, folder: Path) -> Checkpoint:
        """The weights of a base, without the parts of the backbone that not every model of the tasks has."""
        return self._checkpoint(folder, self.private)

    def _checkpoint(self, folder: Path, without: frozenset[str]) -> Checkpoint:
        # Checkpoints may have names of their own for all of it (models of several modalities).
        renamed = {name.partition(".")[0] for name in (*self.renamed, *self.places)}
        outer = (renamed | self.children.keys()) - {self.inner}
        read = partial(
            Checkpoint,
            folder,
            self.prefix,
            self.tied,
            without,
            inner=self.inner,
            outer=outer,
            beside=self.beside,
            copied=self.copied,
        )
        found = read()
        called = self._called(name for name in found.backbone if not (self.knows(name) or name in self.buffers))
        return read(called=called) if called else found

    def _called(self, unknown: Iterable[str]) -> dict[str, str]:
        """Names that a file has for weights of the backbone, where transformers loads them under others -> these."""
        names = tuple(name for name in unknown if not self.ignores(name))
        if not names:
            return {}
        loaded = _loaded_names(self.model_class, json.dumps(self.config, default=str), self.start, names)
        stored = {own: name for name, own in self.stored_names.items()}
        inside = {name: own.removeprefix(self.start) for name, own in loaded.items() if own.startswith(self.start)}
        return {name: stored.get(own, own) for name, own in inside.items() if self.knows(stored.get(own, own))}


@lru_cache(maxsize=64)
def _loaded_names(model_class: str, config: str, start: str, stored: tuple[str, ...]) -> dict[str, str]:
    """What a model calls tensors that a file stores under names without the backbone's prefix."""
    from transformers import AutoConfig

    values = json.loads(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = auto_class(model_class)._from_config(made)
    return {name.removeprefix(start): own for name, own in loaded_names(model, (start + one for one in stored)).items()}


def _as_alias(backbone: nn.Module, name: str, own: Parameter) -> Parameter:
    """What a tied parameter is under another name: a head, where it is an embedding."""
    path, _, attribute = name.rpartition(".")
    kind, axis = kind_of(backbone.get_submodule(path), attribute)
    return replace(own, name=name, kind=kind, input_axis=axis, parts=())


def _placed(name: str, shape: tuple[int, ...], place: Place, parameters: Mapping[str, Parameter]) -> Parameter:
    """A stored tensor as what it is in the model: one expert, some outputs of a fused layer, or layers in a row."""
    owners = [parameters[piece.parameter] for piece in place.pieces]
    first = owners[0]
    if len(owners) > 1:
        if all(owner.is_matrix and owner.input_axis == 1 for owner in owners):
            starts = itertools.accumulate((owner.shape[0] for owner in owners), initial=0)
            parts = tuple(
                Part(owner.layer, Outputs(start, owner.shape[0]), layer=owner.layer)
                for owner, start in zip(owners, starts, strict=False)
            )
            # What a file has fused reads one input: statistics of the first layer are those of all.
            return Parameter(name, first.kind, shape, 1, module=first.layer, parts=parts)
        return Parameter(name, ParameterKind.OTHER if first.input_axis is not None else first.kind, shape)
    if first.input_axis is None:
        return Parameter(name, first.kind, shape)
    found = _expert_or_rows(place.pieces[0], first)
    if found is None:
        return Parameter(name, ParameterKind.OTHER, shape)
    layer, axis, rows = found
    kind = ParameterKind.LINEAR if first.is_stack else first.kind
    return Parameter(name, kind, shape, axis, module=layer, of_layer=rows)


def _expert_or_rows(piece: Piece, owner: Parameter) -> tuple[str, int, Outputs | None] | None:
    """The layer that a stored matrix belongs to, its input axis, and which of the layer's outputs it gives.

    None where it is neither one expert's matrix nor some outputs of a matrix that is not transposed.
    """
    layer, offset = owner.layer, piece.offset
    shape = owner.shape
    if owner.is_stack:
        expert, offset = divmod(piece.offset, shape[1] * shape[2])
        layer, shape = f"{layer}.{expert}", shape[1:]
    if len(shape) != 2 or len(piece.shape) != 2:
        return None
    axis = 1 if owner.input_axis is None else owner.input_axis - owner.is_stack
    if piece.shape == shape and piece.strides == (shape[1], 1) and offset == 0:
        return layer, axis, None
    if piece.shape == shape[::-1] and piece.strides == (1, shape[1]) and offset == 0:
        return layer, 1 - axis, None
    is_rows = piece.shape[1] == shape[1] and piece.strides == (shape[1], 1) and offset % shape[1] == 0
    return (layer, 1, Outputs(offset // shape[1], piece.shape[0])) if is_rows and axis == 1 else None


def _is_trunk(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Embedding | nn.ModuleList) for inner in module.modules())


def _in_common(found: list[Architecture]) -> Architecture:
    """What the backbones of several models of one base have in common; all else as the first has it."""
    first = found[0]
    everywhere = set.intersection(*(set(one.children) for one in found))
    private = frozenset(name for one in found for name in one.children if name not in everywhere)
    parameters = {
        name: one
        for name, one in first.parameters.items()
        if all(name in other.parameters for other in found) and not lies_in(name, private)
    }
    frozen = frozenset[str]().union(*(one.frozen for one in found))
    return replace(first, parameters=parameters, private=private, frozen=frozen)


@lru_cache(maxsize=64)
def _architecture(folder: Path, auto_model: str | None, changes: str, stamp: tuple[int, ...]) -> Architecture:
    config = read_config(folder)  # which refuses what no model has, in the words of the file
    key = [auto_model, changes, config.to_json_string(use_diff=False)]

    def find() -> Architecture:
        model = empty_model(folder, auto_model, **json.loads(changes))
        return replace(Architecture.of_model(model), frozen=unchanged_parts(model, auto_model))

    found = remembered(Architecture, key, find)
    if auto_model is not None and found.beside:
        # Models of tasks exchange their backbones as one submodule.
        raise PaveError(f"{found.model_class} has no backbone named '{found.config.get('model_type')}'")
    return found


def _stamp(folder: Path) -> tuple[int, ...]:
    """What changes when the configuration of a folder does; empty where there is none."""
    try:
        return file_facts(folder / "config.json")
    except OSError:
        return ()


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, by its dotted name, is one of these modules or lies inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def empty_model(folder: Path, auto_model: str | None = None, device: str = "meta", **changes: Any) -> nn.Module:
    """A model of the folder's configuration, untrained; the meta device needs no memory.

    Args:
        folder: folder of a model.
        auto_model: name of the class of transformers that builds it, such as ``AutoModelForSequenceClassification``;
            where none is given, the class that the configuration names, or else the bare model.
        device: where it is made.
        changes: values of the configuration, such as ``num_labels``, in place of those of the file.

    Raises:
        PaveError: the configuration is missing, broken, or of an architecture that has no such form.
    """
    import transformers

    config = read_config(folder, **changes)
    named = next((name for name in config.architectures or () if hasattr(transformers, name)), None)
    what = f"{folder}: its config.json gives no {form_of(auto_model)}"
    with foreign(what), torch.device(device), _counted_parameters(folder):
        if auto_model is None and named is not None:
            model: nn.Module = auto_class(named)._from_config(config)
        else:
            model = auto_class(auto_model or "AutoModel").from_config(config, trust_remote_code=False)
    return model


def unchanged_parts(model: nn.Module, auto_model: str | None) -> frozenset[str]:
    """Direct submodules and parameters of a model that no task changes: all that does not read images, of `ONE_SIDED`.

    Args:
        model: what the class builds; none of its values are looked at.
        auto_model: name of the class of transformers.

    Raises:
        PaveError: the model cannot be given images alone.
    """
    if auto_model not in ONE_SIDED:
        return frozenset()
    reached: set[str] = set()
    children = dict(model.named_children())

    def note(name: str) -> Any:
        return lambda *given: reached.add(name)

    config: Any = model.config
    what = f"{type(model).__name__} cannot be given images alone, of one size and without texts"
    hooks = [child.register_forward_pre_hook(note(name)) for name, child in children.items()]
    device = next(model.parameters()).device
    try:
        with foreign(what), torch.no_grad():
            seen = config.vision_config
            size = seen.image_size if isinstance(seen.image_size, int) else max(seen.image_size)
            pixels = torch.empty(1, getattr(seen, "num_channels", 3), size, size, device=device)
            model.get_image_features(pixel_values=pixels)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    direct = {name for name, _ in model.named_parameters(recurse=False)}
    return frozenset((children.keys() | direct) - reached)


def part_named(module: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """A submodule, or one of a module's own parameters; both can be told not to be trained (``requires_grad_``)."""
    own = dict(module.named_parameters(recurse=False))
    return own[name] if name in own else module.get_submodule(name)


def auto_class(auto_model: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, auto_model)


def form_of(auto_model: str | None) -> str:
    """What a class of transformers builds, in words: ``sequence-classification model``."""
    words = re.findall(r"[A-Z][a-z]*|[A-Z]+(?![a-z])", (auto_model or "").removeprefix("AutoModel").removeprefix("For"))
    return f"{'-'.join(words).lower()} model".lstrip()


def read_config(folder: Path, **changes: Any) -> PretrainedConfig:
    """The configuration of a model folder, which runs no code of the folder.

    Args:
        folder: the folder.
        changes: values to use in place of those of the file.

    Raises:
        PaveError: it is missing or broken, describes a model of impossible size, one that brings its own code, or one
            whose weights are quantised.
    """
    file = folder / "config.json"
    settings = read_json(file)
    for key, value in _numbers(settings):
        if value > _most(key):
            raise PaveError(f"{file}: {shortened(key)} is {value:,}, which no model has; is it broken?")
    named = settings.get("architectures") or []
    if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise PaveError(f"{file}: expected a list of names under architectures, found {shortened(str(named))}")
    quantised = quantisation_problem(folder, settings)
    if quantised is not None:
        raise PaveError(f"{folder}: {quantised}")
    from transformers import AutoConfig

    with foreign(f"{folder}: its config.json gives no model", _own_code(settings)):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
        config.to_dict()
    return config


def _most(key: str) -> int:
    """The largest number that a key of a configuration may hold."""
    if key == "num_labels":
        return MOST_LABELS
    if _SIZES.search(key):
        return LARGEST_SIZE
    return MOST_LAYERS if _LAYERS.search(key) else MOST_PARTS if _PARTS.search(key) else LARGEST_SIZE


def _own_code(settings: Mapping[str, Any]) -> str:
    return "a model that brings code of its own (auto_map) is not supported" if settings.get("auto_map") else ""


def _numbers(settings: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, and the key that it belongs to."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            # What belongs to a class is an index, whatever the class is called.
            yield from () if name in ("label2id", "id2label") else _numbers(value, name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _numbers(value, key)
    elif isinstance(settings, int):
        yield key, settings


@contextmanager
def _counted_parameters(folder: Path) -> Iterator[None]:
    """Break off the building of a model with more parameters than any file that is read here can hold."""
    refusal = f"{folder}: its config.json asks for more than {MOST_PARAMETERS:,} weights; is it broken?"
    if (folder, _stamp(folder)) in _TOO_LARGE:  # to count them again takes seconds
        raise PaveError(refusal)
    count = itertools.count(1)

    def noted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(count) > MOST_PARAMETERS:
            _TOO_LARGE.add((folder, _stamp(folder)))
            raise PaveError(refusal)

    hook = register_module_parameter_registration_hook(noted)
    try:
        yield
    finally:
        hook.remove()


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model below its head; the model itself where it is a bare one or a language model.

    Raises:
        PaveError: it has a head, and no backbone where transformers says.
    """
    backbone = getattr(model, str(model.base_model_prefix), None)
    if has_language_head(model) or (backbone is None and is_bare(model)):
        return model
    if not isinstance(backbone, nn.Module):
        raise PaveError(f"{type(model).__name__} has no backbone named '{model.base_model_prefix}'")
    return backbone


def name_prefix(model: nn.Module) -> str:
    """What names of the backbone's parameters begin with in a model: ``bert.``; nothing in a bare one."""
    return "" if backbone_of(model) is model else f"{model.base_model_prefix}."


def with_backbone(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """A model on another backbone: itself, changed in place; the backbone itself where it is a bare one."""
    if backbone_of(model) is model:
        return backbone
    setattr(model, str(model.base_model_prefix), backbone)
    return model


def has_language_head(model: nn.Module) -> bool:
    """Whether a model's head gives a score for each token, and so is as much the model's own as its embeddings are."""
    reader: Any = getattr(model, "get_output_embeddings", None)
    try:
        return reader is not None and isinstance(reader(), nn.Module)
    except (NotImplementedError, AttributeError):  # models that read no tokens
        return False


def heads_beside(model: nn.Module) -> frozenset[str]:
    """Direct submodules and parameters of a model that are its head, where its backbone is not one of its submodules.

    The backbone is then all that the bare model of the same configuration has too. Empty for all other models.
    """
    if isinstance(getattr(model, str(model.base_model_prefix), None), nn.Module) or has_language_head(model):
        return frozenset()
    bare = _bare_class(getattr(model, "config", None))
    if not bare or type(model).__name__ in _bare_classes(getattr(model, "config", None)):
        return frozenset()
    with torch.device("meta"):
        known = _own_names(auto_class(bare)._from_config(copy.deepcopy(model.config)))
    own = _own_names(model)
    return frozenset(own - known) if own & known else frozenset()


def _own_names(model: nn.Module) -> set[str]:
    """The direct submodules that have parameters, and the parameters beside them."""
    return {name.partition(".")[0] for name, _ in model.named_parameters()}


def is_bare(model: nn.Module) -> bool:
    """Whether a model of transformers is a backbone without a head."""
    return type(model).__name__ in _bare_classes(getattr(model, "config", None))


def _bare_classes(config: Any) -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    known = MODEL_MAPPING_NAMES.get(getattr(config, "model_type", ""), ())
    return (known,) if isinstance(known, str) else tuple(known)


def _bare_class(config: Any) -> str:
    """Name of the class of models without head; empty where there is none."""
    return next(iter(_bare_classes(config)), "")
