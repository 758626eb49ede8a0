"""The base that experts name themselves: adapters in their configuration, whole models in their card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pave_lightning.errors import PaveError, listed
from pave_lightning.system.references import HubModel, ModelReference
from pave_lightning.weights.adapters import ADAPTER_CONFIG, adapter_settings
from pave_lightning.weights.cards import CARD, bases_by_card, card_facts

# How a card may say that a model was made of others: these are not fine-tuned from one base.
OTHERWISE_MADE = ("merge", "quantized")


def inferred_base(experts: Mapping[str, Path]) -> ModelReference:
    """The one base that all experts name which name any.

    Args:
        experts: the folder of each task's expert, those that exist already.

    Raises:
        PaveError: no expert names a base, one names several, or two name different ones; all are told.
    """
    named = {task: named_base(folder) for task, folder in experts.items()}
    found = {task: base for task, base in named.items() if base is not None}
    if not found:
        looked = listed([f"'{task}' ({folder})" for task, folder in experts.items()], 3) or "no task names one"
        raise PaveError(
            f"no expert says what its base is ({ADAPTER_CONFIG}, or base_model in the front matter of "
            f"{CARD}): {looked}; name the base instead"
        )
    if len({str(base) for base in found.values()}) > 1:
        told = listed([f"'{base}' (task '{task}')" for task, base in found.items()])
        raise PaveError(f"the experts name different bases: {told}; name the base instead")
    return next(iter(found.values()))


def named_base(folder: Path) -> ModelReference | None:
    """The base that an expert names; None where it names none.

    Args:
        folder: folder of an adapter or of a whole model.

    Raises:
        PaveError: its card names several, or its adapter's configuration cannot be read.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        settings = adapter_settings(folder)
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
        if isinstance(base, str) and base.strip():
            return _at(base, revision if isinstance(revision, str) else None)
    bases = bases_by_card(folder)
    if len(bases) > 1 or (bases and card_facts(folder).get("base_model_relation") in OTHERWISE_MADE):
        raise PaveError(
            f"the card of {folder} says that the model was made of {listed(bases, 3)} in another way than "
            "by fine-tuning one of them; name the base instead"
        )
    return bases[0] if bases else None


def _at(base: str, revision: str | None) -> ModelReference:
    """A base at a revision, where that is not the usual one; folders have none."""
    if revision in (None, "", "main") or Path(base).exists():
        return base
    try:
        return HubModel(hub=base, revision=revision)
    except ValueError:
        return base
