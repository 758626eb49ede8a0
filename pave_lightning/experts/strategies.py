"""Which of Lightning's strategies divide over the processes what others hold whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Where nothing is trained this one does for all; DeepSpeed's earlier stages divide what only training has.
FULLY_SHARDED = "fsdp2"
_DIVIDES = re.compile(r"fsdp.*|deepspeed_stage_3.*")
_DIVIDES_IN_TRAINING = re.compile(r"fsdp.*|deepspeed.*")


def shards(options: Mapping[str, Any]) -> bool:
    """Whether a trainer with these options divides weights, gradients or optimiser states over processes."""
    return bool(_DIVIDES_IN_TRAINING.fullmatch(str(options.get("strategy", "auto"))))


def shards_weights(options: Mapping[str, Any]) -> bool:
    """Whether a trainer with these options divides the weights, also where nothing is trained."""
    return bool(_DIVIDES.fullmatch(str(options.get("strategy", "auto"))))
