"""Lightning trainers as a recipe asks for them."""

from __future__ import annotations

import inspect
import json
import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pave_lightning.errors import Interrupted, PaveError, nearest, reason
from pave_lightning.experts.progress import PassingProgressBar
from pave_lightning.experts.sharding import FullyShardedStrategy
from pave_lightning.experts.strategies import FULLY_SHARDED, shards

OWNED = {
    "logger": "the recipe's tracking section decides it",
    "callbacks": "the stages bring their own; use the Python API for others",
    "default_root_dir": "everything is kept in the run folder",
    "use_distributed_sampler": "the data module's samplers are exact",
    "reload_dataloaders_every_n_epochs": "the data module decides it",
    "plugins": "they are objects, which no recipe can hold",
    "enable_checkpointing": "resuming and the choice of the best checkpoint need it",
    "enable_model_summary": "it is off",
    "barebones": "it switches off what fine-tuning needs",
}
# Options that would lose the weights or wait for ever, the value that does not, and why others do.
REFUSED: dict[str, tuple[Any, str]] = {
    "fast_dev_run": (0, "it keeps no checkpoint, so there would be no expert; use max_steps or limit_train_batches"),
    "num_nodes": (
        1,
        "pave starts its processes on this machine alone, and would wait for the others for ever; use devices",
    ),
}


def refused_options(options: Mapping[str, Any], where: str) -> list[str]:
    """What Lightning has against options that are meant for its trainer, or would lose with them.

    Args:
        options: the options.
        where: what to call their place.
    """
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    found = []
    for key, value in options.items():
        if key not in known:
            found.append(f"{where}.{key}: lightning.Trainer has no such option; {nearest(key, known)}")
        elif key in OWNED:
            found.append(f"{where}.{key} cannot be set in a recipe: {OWNED[key]}")
        elif key in REFUSED and value is not None and value != REFUSED[key][0]:
            found.append(f"{where}.{key}: {REFUSED[key][1]}")
        else:
            found += [f"{where}.{problem}" for problem in _type_problems(key, value)]
    found += [f"{where}.{problem}" for problem in _strategy_problems(options)]
    if not found:
        found += [f"{where}{problem}" for problem in _lightning_problems(json.dumps(options, sort_keys=True))]
    return found


@lru_cache(maxsize=64)
def _lightning_problems(options: str) -> tuple[str, ...]:
    """What Lightning has against options, given as JSON; remembered, as it takes a tenth of a second to ask."""
    given = json.loads(options)
    ours = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    try:
        with quiet_lightning():
            trainer = L.Trainer(**{**for_lightning(given), **ours})
    except Exception as error:  # whatever a value of another type leads to there
        return (f": lightning.Trainer refuses these options: {reason(error)}",)
    return tuple(_unusable(trainer, given))


def _type_problems(key: str, value: Any) -> Iterator[str]:
    """Whether a value is of a type that the option takes, by Lightning's own annotations, which it does not check."""
    expected = get_type_hints(L.Trainer.__init__)[key]
    try:
        TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(value)
    except ValidationError:
        names = [_type_name(kind) for kind in get_args(expected) or (expected,) if kind is not type(None)]
        yield f"{key}: expected {' or '.join(filter(None, names))}, found {value!r}"


def _type_name(kind: Any) -> str:
    """A type in words; empty for classes that no recipe can hold."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    plain = get_origin(kind) or kind
    return str(plain.__name__) if plain in (int, float, str, bool, list, dict) else ""


def _unusable(trainer: L.Trainer, options: Mapping[str, Any]) -> Iterator[str]:
    """What Lightning accepts, but would lose the trained weights or break off later."""
    strategy = f".strategy: {options.get('strategy', 'auto')}"
    if isinstance(getattr(trainer.strategy, "launcher", None), _MultiProcessingLauncher):
        yield (
            f"{strategy} trains in processes that keep what callbacks know, so the best checkpoint and the statistics "
            "would be lost; use strategy: ddp"
        )


def for_lightning(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe as Lightning takes them, which knows no name of FSDP2.

    Gloo, and the gathering of weights, know no tensors of inference mode.
    """
    name = str(options.get("strategy"))
    if name == FULLY_SHARDED:
        return {**options, "strategy": FullyShardedStrategy(), "inference_mode": False}
    if name.startswith("deepspeed") and name in StrategyRegistry:
        from pave_lightning.experts.deepspeed import deepspeed_strategy

        return {**options, "strategy": deepspeed_strategy(name)}
    return dict(options)


def _strategy_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Why a strategy that divides the weights cannot be had with these options, or here."""
    name = str(options.get("strategy", "auto"))
    if re.sub(r"[\W_]", "", name.lower()) in ("modelparallel", "modelparallelstrategy", "fullyshard", "fsdpv2"):
        yield f"strategy: {name} is called {FULLY_SHARDED} here"
    if name.startswith("deepspeed") and find_spec("deepspeed") is None:
        yield (
            f"strategy: {name} needs DeepSpeed, which is not installed; run `pip install deepspeed`, or use "
            f"{FULLY_SHARDED}, which divides as much and needs nothing else"
        )
    if not shards(options) or name == FULLY_SHARDED:
        return
    if options.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available():
        yield f"strategy: {name} needs GPUs; use {FULLY_SHARDED}, which divides the weights on CPUs too, or ddp"
    by_norm = options.get("gradient_clip_algorithm") in (None, "norm")
    if name.startswith("fsdp") and options.get("gradient_clip_val") and by_norm:
        yield f"strategy: {name} clips no gradients by their norm (gradient_clip_val); use {FULLY_SHARDED}, which does"


def processes_started(options: Mapping[str, Any]) -> int:
    """How many processes Lightning makes of options of the machine."""
    with quiet_lightning():
        trainer = L.Trainer(**for_lightning(options), logger=False, enable_checkpointing=False)
    return int(trainer.num_devices * trainer.num_nodes)


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
        **for_lightning(options),
        **ours,
    }
    if settings["enable_progress_bar"]:
        settings["callbacks"].append(PassingProgressBar())
    try:
        return L.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise PaveError(f"trainer: {reason(error)}") from error


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
