"""With which seed merge methods and transforms draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def with_seed(kind: type[BaseModel], options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Options of a class, with the recipe's seed where there is an option for one and none is given."""
    draws = "seed" in kind.model_fields
    return {**options, "seed": seed} if draws and options.get("seed") is None else dict(options)
