"""What the card of a model, its README.md, says of the model in the front matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = "README.md"


def card_facts(folder: Path) -> dict[str, Any]:
    """The front matter of a model card; empty where there is none or it cannot be read, since it only adds advice."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(folder / CARD)
    except Exception:  # no file, other bytes than text, or YAML that is none, in any of the ways of three libraries
        return {}
    return found if isinstance(found, dict) else {}


def bases_by_card(folder: Path) -> list[str]:
    """The models that a card says a model was made of (``base_model``); several where it was merged of them."""
    named = card_facts(folder).get("base_model")
    listed = named if isinstance(named, list) else [named]
    return [name for name in listed if isinstance(name, str) and name.strip()]
