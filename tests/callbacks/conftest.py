"""A module that runs what it is told to, and a validation pass over it."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
from torch import nn
from torch.utils.data import DataLoader

from pave_lightning.callbacks import PaveCallback


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Running(L.LightningModule):
    """Runs a step that is given as a function."""

    def __init__(self, net: nn.Module, step: Callable[[Any, Any], object] = lambda net, batch: net(batch)) -> None:
        super().__init__()
        self.net = net
        self.step = step

    def validation_step(self, batch: Any, _: int) -> None:
        self.step(self.net, batch)


@pytest.fixture
def running() -> type[Running]:
    return Running


def _validate(callback: PaveCallback, module: L.LightningModule, data: list[Any], precision: Any = "32-true") -> None:
    L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        precision=precision,
        callbacks=callback,
    ).validate(module, DataLoader(data, batch_size=None), verbose=False)  # type: ignore[arg-type]


@pytest.fixture
def validate() -> Callable[..., None]:
    return _validate


@pytest.fixture
def capture_with() -> Callable[..., Callable[..., PaveCallback]]:
    """Make a function that captures what passes through ``net``, with options that each call may change."""

    def capture(module: L.LightningModule, data: list[Any], *, precision: Any = "32-true", **options: Any) -> Any:
        callback = PaveCallback(backbone="net", **options)
        _validate(callback, module, data, precision)
        return callback

    return lambda **options: partial(capture, **options)
