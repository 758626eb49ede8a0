"""Names and values that MLflow's stores accept, and their limits, which local stores do not enforce."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pave_lightning.credentials import mask_values

PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NAME_LENGTH = 250
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100


def clean_name(text: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    return clean_path(text)[:NAME_LENGTH].rstrip("/") or "_"


def clean_path(text: str) -> str:
    """A relative path that MLflow accepts for an artifact: no odd characters, no empty or dotted parts."""
    parts = re.sub(r"[^\w.\- /]", "_", text, flags=re.ASCII).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def tag_text(text: str) -> str:
    """The value of a tag, without secrets and not too long."""
    return str(mask_values(str(text)))[:TAG_LENGTH]


def flat_params(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of parameters, nested mappings flattened with dots, without secrets and not too long."""
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat_params(value, f"{prefix}{name}.")
        else:
            shown = mask_values(list(value) if isinstance(value, tuple) else value)
            yield clean_name(f"{prefix}{name}"), str(shown)[:PARAM_LENGTH]
