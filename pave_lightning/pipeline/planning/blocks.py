"""Whether a backbone can be walked through block by block, asked of a small copy of it before there are experts.

The copy is a model of the base's own configuration with random weights, few layers and few attention heads, so that
the check that a merge makes (`BlockStack.check`) is made in full, values included, in about a second and without the
base's weights. Heads keep their size and layers their pattern, as rotary embeddings, masks and windows depend on them.
A configuration that cannot be made smaller that way is tried with fewer changes, where it is small enough.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.merging import method_named
from pave_lightning.merging.blocks import MODEL_FAILURES, BlockStack
from pave_lightning.merging.passes import misnamed
from pave_lightning.pipeline.providers import providers_of
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.kinds.tokens import MASK, TOKENS
from pave_lightning.weights.backbones import backbone_of
from pave_lightning.weights.empty_models import empty_model, read_config
from pave_lightning.weights.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A copy with more parameters than this is not made: a plan takes seconds and little memory.
LARGEST_COPY = 60_000_000
# What the copy has, where the model has more.
HEADS, LAYERS, VOCABULARY, INNER_WIDTH = 2, 2, 256, 256
# Lengths of the examples that are tried, in tokens.
LENGTHS = (5, 9, 2)
# How configurations end names of what is as wide as the hidden states, and what they call the inner width of a block.
HIDDEN_ENDINGS = ("_size", "_dim", "_model", "_embd", "dim")
INNER_NAMES = ("intermediate_size", "ffn", "inner", "d_ff", "hidden_dim")


def block_problem(
    folder: Path, auto_model: str, model_inputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
) -> str | None:
    """Why the backbone of a model folder cannot be walked through block by block; None where it can.

    Reads ``config.json`` alone. A refusal of a copy is believed when less changed copies are refused as well.

    Args:
        folder: folder of the model.
        auto_model: as `empty_model` takes it.
        model_inputs: what such a model is given where its backbone is given these inputs, see `Task.model_inputs`.

    Raises:
        PaveError: the configuration gives no such model.
    """
    backbone = backbone_of(empty_model(folder, auto_model))
    try:
        stack = BlockStack(backbone)
    except PaveError as refusal:
        return str(refusal)
    problem = stack.refusal("it is too large to be tried before training, however few layers it is given")
    for values in smaller(read_config(folder)):
        try:
            copied = _copy(values, auto_model)
            if copied is None:
                continue
            batches = list(_batches(copied))
            added = {name for batch in batches for name in _added_by_classifier(copied, batch, model_inputs(batch))}
        except (PaveError, *MODEL_FAILURES) as error:
            problem = stack.refusal(f"a small copy of it cannot be run ({' '.join(str(error).split())})")
            continue
        if added:
            what = f"{type(copied).__name__} gives it {min(added)} as well"
            return str(stack.refusal(f"{what}, which is not among what a task's examples hold"))
        try:
            for batch in batches:
                BlockStack(backbone_of(copied)).check(batch)
        except PaveError as refusal:
            problem = refusal
        else:
            return None
    return str(problem)


def naming_problems(recipe: Recipe, folder: Path, names: Collection[str]) -> Iterator[str]:
    """Why methods that run a model cannot put weights of these names, as checkpoints store them, into its backbone."""
    running = [step.name for step in recipe.merge if _runs_the_model(step.method)]
    problem = misnamed(backbone_of(empty_model(folder, recipe.tasks[0].auto_model)), names) if running else None
    if problem is not None:
        steps = ", ".join(f"'{name}'" for name in running)
        yield f"merge step{'s' if len(running) > 1 else ''} {steps}: {problem}"


def smaller(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """A configuration with few layers and heads, with few layers, and as it is; all with few words."""
    for shrinks in ((_few_words, _shallow, _narrow), (_few_words, _shallow), (_few_words,)):
        values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        for part, own in _parts(config, values):
            for shrink in shrinks:
                own.update(shrink(part, own))
        if values.get("pad_token_id") is None:  # batches are padded with some token
            values["pad_token_id"] = 0
        values.pop("auto_map", None)
        yield values


def _parts(config: PreTrainedConfig, values: dict[str, Any]) -> Iterator[tuple[PreTrainedConfig, dict[str, Any]]]:
    """A configuration and those it holds, for text and images say, each with its values."""
    yield config, values
    for name, inner in values.items():
        part = getattr(config, name, None)
        if hasattr(part, "model_type") and isinstance(inner, dict):
            yield from _parts(part, inner)


def _named(config: PreTrainedConfig, name: str) -> str:
    """What a family calls a setting."""
    return str((config.attribute_map or {}).get(name, name))


def _few_words(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """A short vocabulary, in which all special tokens lie."""
    name = _named(config, "vocab_size")
    words = values.get(name)
    if not isinstance(words, int):
        return {}
    words = min(words, VOCABULARY)
    ids = {key: index for key, index in values.items() if key.endswith("_token_id") and index is not None}
    within = {
        key: [min(each, words - 1) for each in index] if isinstance(index, list) else min(index, words - 1)
        for key, index in ids.items()
    }
    return {**within, name: words}


def _shallow(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The first layers of each kind; lists with an element a layer are cut accordingly."""
    depth = values.get(_named(config, "num_hidden_layers"))
    if not isinstance(depth, int):
        return {}
    kinds = values.get("layer_types") or [None] * depth
    last_new = max(kinds.index(kind) for kind in set(kinds))
    kept = min(depth, max(LAYERS, last_new + 1))
    lists = {name: value[:kept] for name, value in values.items() if isinstance(value, list) and len(value) == depth}
    return {**lists, _named(config, "num_hidden_layers"): kept}


def _narrow(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Few heads of the same size, and a narrow inner layer."""
    heads, width = (values.get(_named(config, name)) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(width, int) or heads <= HEADS or width % heads:
        return {}
    narrow = width // heads * HEADS
    changed: dict[str, Any] = {_named(config, "num_attention_heads"): HEADS}
    groups = values.get(_named(config, "num_key_value_heads"))
    if isinstance(groups, int):
        changed[_named(config, "num_key_value_heads")] = HEADS if groups == heads else 1
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            if value == width and name.endswith(HIDDEN_ENDINGS):
                changed[name] = narrow
            elif any(inner in name for inner in INNER_NAMES):
                changed[name] = min(value, INNER_WIDTH)
    return changed


def _copy(values: dict[str, Any], auto_model: str) -> nn.Module | None:
    """A model of a configuration with random weights, in eval mode; None where it is too large."""
    with tempfile.TemporaryDirectory() as place, quiet_transformers(), torch.random.fork_rng():
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(values))
        if sum(parameter.numel() for parameter in empty_model(folder, auto_model).parameters()) > LARGEST_COPY:
            return None
        torch.manual_seed(0)
        return empty_model(folder, auto_model, device="cpu").float().eval()


def _batches(classifier: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Examples of several lengths, padded on the right and on the left."""
    whole: Any = classifier.config
    config = whole.get_text_config()
    generator, longest = torch.Generator().manual_seed(0), max(LENGTHS)
    special = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    special += [index for found in special if isinstance(found, list) for index in found]
    words = torch.tensor([index for index in range(config.vocab_size) if index not in special])
    ids = words[torch.randint(len(words), (len(LENGTHS), longest), generator=generator)]
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    for real in (mask, mask.flip(1)):
        yield {TOKENS: ids.where(real, torch.tensor(whole.pad_token_id)), MASK: real.long()}


@torch.no_grad()
def _added_by_classifier(classifier: nn.Module, batch: dict[str, Tensor], shaped: dict[str, Tensor]) -> set[str]:
    """Names of tensors that the classifier, given a batch in its own shapes, gives its backbone besides the batch."""
    given: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update({f"argument {index}": value for index, value in enumerate(args)} | kwargs)

    handle = backbone_of(classifier).register_forward_pre_hook(note, with_kwargs=True)
    try:
        classifier(**shaped)
    finally:
        handle.remove()
    own = {(tensor.data_ptr(), tensor.shape) for tensor in batch.values()}
    return {
        name
        for name, value in given.items()
        if isinstance(value, Tensor) and (value.data_ptr(), value.shape) not in own
    }


def _runs_the_model(method: str) -> bool:
    try:
        return any(provider.loads_weights for provider in providers_of(method_named(method).needs))
    except PaveError:  # there is no such method, which is told elsewhere
        return False
