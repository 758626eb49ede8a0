"""Lightning trainers as a recipe asks for them."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from pave_lightning.errors import Interrupted, PaveError, nearest, reason
from pave_lightning.experts.progress import PassingProgressBar

OWNED = {
    "logger": "the recipe's tracking section decides it",
    "callbacks": "the stages bring their own; use the Python API for others",
    "default_root_dir": "everything is kept in the run folder",
    "use_distributed_sampler": "the data module's samplers are exact",
    "reload_dataloaders_every_n_epochs": "the data module decides it",
    "enable_checkpointing": "resuming and the choice of the best checkpoint need it",
    "enable_model_summary": "it is off",
    "barebones": "it switches off what fine-tuning needs",
}
# What concerns the machine, not the training; only these matter for capture and evaluation.
MACHINE_OPTIONS = ("accelerator", "devices", "strategy", "num_nodes", "enable_progress_bar")


def trainer_problems(options: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with options meant for ``lightning.Trainer``: unknown or reserved keys, impossible values."""
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    found = []
    for key in options:
        if key not in known:
            found.append(f"{where}.{key}: lightning.Trainer has no such option; {nearest(key, known)}")
        elif key in OWNED:
            found.append(f"{where}.{key} cannot be set in a recipe: {OWNED[key]}")
    if not found:
        try:
            with quiet_lightning():
                L.Trainer(**{**options, "logger": False, "enable_checkpointing": False, "enable_model_summary": False})
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            found.append(f"{where}: lightning.Trainer refuses these options: {reason(error)}")
    return found


def is_distributed(options: Mapping[str, Any]) -> bool:
    """Whether a trainer with these options starts, or is one of, several processes."""
    devices = options.get("devices", "auto")
    several = devices not in (1, "1", "auto", [0], "0")
    if devices == "auto" and options.get("accelerator", "auto") in ("auto", "gpu", "cuda"):
        several = torch.cuda.device_count() > 1
    return several or options.get("num_nodes", 1) != 1


def build_trainer(
    options: Mapping[str, Any],
    *,
    root: Path,
    logger: Logger | None = None,
    callbacks: Sequence[Callback] = (),
    **ours: Any,
) -> L.Trainer:
    """A trainer with the recipe's options and what a stage needs of its own.

    Raises:
        PaveError: Lightning refuses the options.
    """
    settings = {
        "enable_progress_bar": sys.stderr.isatty(),
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        "logger": logger if logger is not None else False,
        "callbacks": list(callbacks),
        **options,
        **ours,
    }
    if settings["enable_progress_bar"]:
        settings["callbacks"].append(PassingProgressBar())
    try:
        return L.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise PaveError(f"trainer: {reason(error)}") from error


def machine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer options that say where to run, without those that say how to train."""
    return {key: value for key, value in options.items() if key in MACHINE_OPTIONS}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices about hardware, workers and loggers out of the user's sight; warnings of ours stay."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*isinstance.*treespec.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def honest_interrupts() -> Iterator[None]:
    """Turn Lightning's own exits on Ctrl-C and SIGTERM, whose codes claim success, into `Interrupted`.

    Lightning ignores further Ctrl-C from the first one on, and to the end if an error keeps it from tidying up.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException as error:
        raise Interrupted(143) from error
    except SystemExit as error:
        raise Interrupted(130) from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)
