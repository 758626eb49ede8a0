"""Options of the capture pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pave_lightning.config import Section


class Capture(Section):
    """The final validation pass in which the second moments of the experts' layer inputs are measured."""

    examples: int = Field(default=512, ge=1)
    """Examples of the task's training split that are shown to the trained expert."""
    batch_size: int = Field(default=32, ge=1)
    """Examples a forward pass."""
    source: Literal["train", "random_tokens"] = "train"
    """train: examples of the task's training split; random_tokens: no data at all, sequences of tokens drawn uniformly
    from the vocabulary, as long as the base reads (max_length)."""
    rows: int | None = Field(default=8192, ge=1)
    """Most rows of a layer's input (tokens) that are counted, a seeded uniform sample of those of every batch; null
    counts all. Rows of a file are not meant: how many of these are shown is said by examples."""
    moments: Literal["smallest", "input", "output"] = "smallest"
    """smallest: where a layer narrows (d_in > d_out) the cross moment W C, which is all that purification needs and
    cheaper; input: the second moment C of the input for every layer (needed by target delta); output: the second moment
    of the output where a layer narrows, which is all that the metric root needs."""
    convolutions: bool = False
    """Also capture convolutions without groups, as products of a matrix with the patches of their input."""
    gradient_examples: int = Field(default=128, ge=1)
    """Examples of the training split whose gradients are taken, one by one, for merge methods that need gradients."""
    norms: bool = False
    """Also capture the mean squares of what the scales of norms multiply, which some merge methods need."""
    precision: str = "32-true"
    """Precision of the pass (a lightning.Trainer precision). Lower ones blur the weakest directions."""
