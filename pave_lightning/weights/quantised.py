"""Quantised checkpoints, whose weights are codes, not numbers that can be subtracted and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pave_lightning.errors import listed, shortened
from pave_lightning.weights.cards import bases_by_card


def quantisation_problem(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Why a model folder is refused for being quantised, and what to use instead; None where it is not.

    Args:
        folder: the folder.
        settings: what its ``config.json`` says, as read.

    Example:
        >>> told = quantisation_problem(Path(), {"quantization_config": {"quant_method": "gptq", "bits": 4}})
        >>> told[:42]
        'its weights are quantised (gptq, 4 bits; q'
    """
    found = settings.get("quantization_config") or settings.get("compression_config")
    if not isinstance(found, dict):
        return None
    method = shortened(str(found.get("quant_method") or "bitsandbytes"), 40)
    bits = found.get("bits") or next(
        (n for n in (4, 8) if found.get(f"load_in_{n}bit") or found.get(f"_load_in_{n}bit")), None
    )
    size = f", {bits} bits" if isinstance(bits, int) else ""
    named = bases_by_card(folder)
    origin = f" ({listed(named, 3)}, by its card)" if named else ""
    return (
        f"its weights are quantised ({method}{size}; quantization_config in config.json), so they are codes that "
        f"cannot be subtracted and averaged; name the model that it was made of{origin}, or load it where {method} "
        "runs, call model.dequantize() and save it with save_pretrained"
    )
