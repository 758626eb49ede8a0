"""Checkpoints of a training that may be resumed; what cannot be used is found before Lightning opens it."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from pave_lightning.system.files import DAMAGED, set_aside
from pave_lightning.system.processes import is_rank_zero

log = logging.getLogger("pave_lightning")

BEST, LAST = "best.ckpt", "last.ckpt"
# What Lightning needs to go on.
NEEDED = ("state_dict", "epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
FILLED = ("state_dict", "loops", "optimizer_states", "lr_schedulers")


class MovableCheckpoint(ModelCheckpoint):
    """Keeps what it knows of the best checkpoint when the whole folder was moved or copied."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the paths for those of this folder, whatever its name was."""
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[key] = moved(state.get(key, ""))
        state["best_k_models"] = {moved(path): score for path, score in state.get("best_k_models", {}).items()}
        super().load_state_dict(state)


def unusable_checkpoint(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Why training cannot go on from the checkpoints in a folder; empty where it can, or where there are none.

    Args:
        folder: where training keeps ``last.ckpt`` and ``best.ckpt``.
        weights: the state of the module that is trained.
    """
    last, best = folder / LAST, folder / BEST
    if not last.exists():
        return ""
    problem = damage_of(last, weights)
    if problem:
        return f"the last checkpoint is damaged ({problem})"
    if not best.exists():
        known = torch.load(last, map_location="cpu", weights_only=True)["callbacks"].values()
        lost = any(isinstance(state, dict) and Path(state.get("best_model_path", "")).name == BEST for state in known)
        return "the best checkpoint is missing" if lost else ""
    problem = damage_of(best, weights)
    return f"the best checkpoint is damaged ({problem})" if problem else ""


def damage_of(file: Path, weights: Mapping[str, Tensor], *, resumable: bool = True) -> str:
    """What is wrong with a checkpoint's bytes or content; empty where nothing is.

    Every byte is read: the checksums of the archive cover the tensors, and the rest is what the module expects.

    Args:
        file: the checkpoint.
        weights: what the module expects; only shapes are looked at.
        resumable: whether training is to go on from it, so that more than the weights has to be there.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"checksum of {Path(broken).name}"
        found = torch.load(file, map_location="cpu", weights_only=True)
    # torch raises errors of many kinds here; its advice to load pickles unsafely is none of ours.
    except Exception as error:
        return type(error).__name__
    needed, filled = (NEEDED, FILLED) if resumable else (FILLED[:1], FILLED[:1])
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    # Lightning goes on without a word where the state of the optimiser is empty.
    missing += [key for key in filled if not missing and not found[key]]
    if missing:
        return f"no {missing[0]}"
    shapes = {name: getattr(value, "shape", None) for name, value in dict(found["state_dict"]).items()}
    expected = {name: value.shape for name, value in weights.items()}
    return "" if shapes == expected else "other weights than the model's"


def start_anew(task: str, folder: Path, problem: str) -> None:
    """Set the checkpoints of a training aside and tell why; only the first of several processes does."""
    if is_rank_zero() and folder.is_dir():
        kept = set_aside(folder)
        log.warning("%s: %s; training starts anew, and what was there is kept as %s", task, problem, kept)


def clear_away(folder: Path) -> None:
    """Remove the checkpoints of a task's finished training, but for those that were set aside as damaged."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if DAMAGED not in entry.name:
            shutil.rmtree(entry, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
