"""How merged models are written."""

from __future__ import annotations

from pave_lightning.config import FileSize, Section, WrittenDtype


class Write(Section):
    """How merged models are written. All arithmetic is float32 or float64; each weight is rounded once, at the end."""

    dtype: WrittenDtype = "base"
    """Type of the weights. base: each as the base stores it, but at most float32; or one for all of them: float32,
    bfloat16 or float16. Scores, those of a scale search too, are of the weights as they are written. A value that is
    too large for the type is refused."""
    max_shard_size: FileSize = "5GB"
    """Largest size of a file of weights: a number of bytes, or one with a unit, such as 500MB. A larger model is
    written as several files with an index, which every loader of Hugging Face checkpoints reads."""
