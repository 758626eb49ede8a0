"""What a model's configuration says about its weights, without loading any."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.weights.backbones import (
    backbone_of,
    bare_class,
    has_language_head,
    heads_beside,
    lies_in,
    unchanged_parts,
)
from pave_lightning.weights.buffers import BufferKind, buffer_kinds
from pave_lightning.weights.checkpoint import Checkpoint
from pave_lightning.weights.embeddings import token_embeddings
from pave_lightning.weights.empty_models import auto_class, configuration_stamp, empty_model, read_config
from pave_lightning.weights.fused import fused_parts
from pave_lightning.weights.matrices import Outputs, Part
from pave_lightning.weights.parameters import Parameter, ParameterKind, kind_of, parameters_of
from pave_lightning.weights.places import Piece, Place, loaded_names, stored_places
from pave_lightning.weights.positions import longest_sequence
from pave_lightning.weights.remembered import remembered
from pave_lightning.weights.ties import tied_names


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
            _architecture(folder, name, json.dumps(changes), configuration_stamp(folder))
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
            backbone_class=bare_class(model.config) if beside else type(backbone).__name__,
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
