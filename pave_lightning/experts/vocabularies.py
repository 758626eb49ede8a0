"""What a recipe may say of vocabularies that differ."""

from __future__ import annotations

from typing import Literal, TypeAlias

# Tokens of a merged model: the base's alone, or those of all experts.
Common: TypeAlias = Literal["base_rows", "union"]
Vocabulary: TypeAlias = Literal["error", "base_rows", "union"]
