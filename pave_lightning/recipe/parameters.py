"""Which parameters are merged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pave_lightning.config import Section

Patterns = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=100)]


class Parameters(Section):
    """Which of the backbone's parameters are merged; the others stay as they are in the base.

    Patterns match whole names, as `pave plan` and checkpoints show them, without the prefix of the architecture: ``*``
    stands for any characters, dots too, ``?`` for one character, ``[ab]`` for one of these.
    """

    include: Patterns = []
    """Patterns of the parameters that are merged, such as ["encoder.layer.*"]; all of them where nothing is said."""
    exclude: Patterns = []
    """Patterns of parameters that are not, of those that are included, such as ["embeddings.*", "*.LayerNorm.*"]."""
