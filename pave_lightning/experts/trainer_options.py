"""What a recipe may ask of Lightning's trainer; plain options are known, and Lightning is asked about all others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from pave_lightning.experts.strategies import FULLY_SHARDED, shards, shards_weights

# What concerns the machine, not the training; only these matter for capture and evaluation.
MACHINE_OPTIONS = ("accelerator", "devices", "strategy", "num_nodes", "enable_progress_bar")
# Options and values that Lightning takes on every machine; to ask it takes seconds, most of them to load it.
PLAIN: dict[str, Callable[[Any], bool]] = {
    "accelerator": lambda value: value in ("auto", "cpu"),
    "devices": lambda value: value == "auto" or (type(value) is int and value == 1),
    "strategy": lambda value: value == "auto",
    "precision": lambda value: value in ("32-true", "32", "bf16-mixed", "bf16-true"),
    "enable_progress_bar": lambda value: isinstance(value, bool),
    "max_epochs": lambda value: type(value) is int and value > 0,
    "log_every_n_steps": lambda value: type(value) is int and value > 0,
    "gradient_clip_val": lambda value: type(value) in (int, float) and 0 < value < float("inf"),
}
# Variables by which Lightning finds a cluster, which has a say in what the trainer takes.
CLUSTERS = ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "LSB_JOBID", "KUBERNETES_PORT", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE")


def trainer_problems(options: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with options meant for ``lightning.Trainer``: unknown or reserved keys, impossible values.

    Args:
        options: the options.
        where: what to call their place.
    """
    if is_plain(options):
        return []
    from pave_lightning.experts.trainers import refused_options

    return refused_options(options, where)


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether Lightning is known to take options as they are."""
    taken = all(key in PLAIN and PLAIN[key](value) for key, value in options.items())
    return taken and not is_distributed(options) and not any(name in os.environ for name in CLUSTERS)


def process_count(options: Mapping[str, Any]) -> int:
    """How many processes train together with these options, which `trainer_problems` has nothing against."""
    return _processes(json.dumps(machine_options(options), sort_keys=True)) if is_distributed(options) else 1


def is_distributed(options: Mapping[str, Any]) -> bool:
    """Whether a trainer with these options starts, or is one of, several processes."""
    devices = options.get("devices", "auto")
    several = devices not in (1, "1", "auto", [0], "0")
    if devices == "auto" and options.get("accelerator", "auto") in ("auto", "gpu", "cuda"):
        several = torch.cuda.device_count() > 1
    return several or options.get("num_nodes", 1) != 1 or shards(options)


@lru_cache(maxsize=64)
def _processes(options: str) -> int:
    from pave_lightning.experts.trainers import processes_started

    return processes_started(json.loads(options))


def machine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer options that say where to run, without those that say how to train.

    A strategy that is made for training is replaced by what divides the weights as it does, where nothing is trained.

    Example:
        >>> machine_options({"strategy": "deepspeed_stage_2", "devices": 4, "max_epochs": 3})
        {'strategy': 'auto', 'devices': 4}
    """
    found = {key: value for key, value in options.items() if key in MACHINE_OPTIONS}
    if shards(options):
        found["strategy"] = FULLY_SHARDED if shards_weights(options) else "auto"
    return found
