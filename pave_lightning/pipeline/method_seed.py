"""With which seed a merge method draws."""

from __future__ import annotations

from typing import Any

from pave_lightning.merging import method_named


def with_seed(method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The options of a merge method, with the recipe's seed where the method draws at random and no seed is given."""
    draws = "seed" in method_named(method).Options.model_fields
    return {**options, "seed": seed} if draws and options.get("seed") is None else options
