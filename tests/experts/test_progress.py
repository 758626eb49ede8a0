"""What a progress bar shows while a pass runs, and that nothing of it stays."""

import io

import lightning.pytorch as L
import pytest
import rich
import torch
from rich.console import Console

from pave_lightning.experts.progress import PassingProgressBar


class Passing(L.LightningModule):
    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def test_step(self, batch, batch_idx):
        self.log("score", 0.5)
        if self.error is not None:
            raise self.error


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal receives; the global console of rich is put back afterwards."""
    file, before = io.StringIO(), rich.get_console().__dict__.copy()
    shown = Console(file=file, force_terminal=True, width=80)

    def reconfigure(*args, **kwargs):
        rich.get_console().__dict__ = shown.__dict__

    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", reconfigure)
    yield file
    rich.get_console().__dict__ = before


def run(module, tmp_path):
    bar = PassingProgressBar()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[bar], default_root_dir=tmp_path)
    trainer.test(module, torch.utils.data.DataLoader(torch.zeros(8, 1)), verbose=False)
    return trainer, bar


def last_line_is_cleared(text):
    # Erase the line that was drawn last; nothing is drawn after it.
    return text.rstrip().endswith("\x1b[2K")


def test_the_bar_is_drawn_and_cleared(terminal, tmp_path):
    run(Passing(), tmp_path)
    assert "Testing" in terminal.getvalue()
    assert last_line_is_cleared(terminal.getvalue())


def test_it_is_cleared_after_an_error(terminal, tmp_path):
    with pytest.raises(ValueError, match="broken"):
        run(Passing(ValueError("broken")), tmp_path)
    assert last_line_is_cleared(terminal.getvalue())


def test_the_number_of_the_loggers_run_is_not_shown(terminal, tmp_path, monkeypatch):
    trainer, bar = run(Passing(), tmp_path)
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.progress.progress_bar.get_standard_metrics", lambda _: {"v_num": 3}
    )
    assert "v_num" not in bar.get_metrics(trainer, trainer.lightning_module)
