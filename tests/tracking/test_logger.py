import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only

from pave_lightning.tracking.logger import FLUSH_EVERY, TrackingLogger


class FakeTracker:
    def __init__(self):
        self.calls = []

    def log_metric_rows(self, run_id, rows):
        self.calls.append((run_id, list(rows)))


@pytest.fixture
def tracker():
    return FakeTracker()


def test_metrics_are_written_in_batches(tracker):
    logger = TrackingLogger(tracker, "run-1")
    for step in range(FLUSH_EVERY - 1):
        logger.log_metrics({"loss": float(step)}, step)
    assert tracker.calls == []
    logger.log_metrics({"loss": 0.0}, FLUSH_EVERY)
    ((run_id, rows),) = tracker.calls
    assert run_id == "run-1"
    assert len(rows) == FLUSH_EVERY
    assert rows[3] == ({"loss": 3.0}, 3)

    logger.log_metrics({"late": 1.0}, None)
    logger.save()
    logger.finalize("success")
    assert tracker.calls[1:] == [("run-1", [({"late": 1.0}, None)])]


def test_only_rank_zero_logs(tracker, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TrackingLogger(tracker, "run-1")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert tracker.calls == []


def test_steps_that_the_run_has_are_left_out(tracker):
    logger = TrackingLogger(tracker, "run-1", logged={"loss": 20, "a_b": 10})
    for step in (10, 20, 30):
        logger.log_metrics({"loss": float(step), "a@b": 1.0, "new": 2.0}, step)
    logger.log_metrics({"loss": 0.0}, None)
    logger.save()
    rows = [row for _, rows in tracker.calls for row in rows]
    assert rows == [
        ({"new": 2.0}, 10),
        ({"a@b": 1.0, "new": 2.0}, 20),
        ({"loss": 30.0, "a@b": 1.0, "new": 2.0}, 30),
        ({"loss": 0.0}, None),
    ]


def test_a_checkpoint_leaves_nothing_unwritten(tracker):
    logger = TrackingLogger(tracker, "run-1")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.after_save_checkpoint(None)
    assert tracker.calls == [("run-1", [({"loss": 1.0}, 1)])]


class Model(BoringModel):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 2})

    def training_step(self, batch, index):
        loss = self.step(batch)
        self.log("train/loss", loss)
        return {"loss": loss}


def test_under_a_trainer(tracker, tmp_path):
    torch.manual_seed(0)
    logger = TrackingLogger(tracker, "run-1", name="mlflow")
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=logger,
        max_steps=4,
        log_every_n_steps=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(Model())
    assert (logger.name, logger.version) == ("mlflow", "run-1")
    rows = [row for _, rows in tracker.calls for row in rows]
    steps = [step for metrics, step in rows if "train/loss" in metrics]
    assert steps == [1, 3]
    assert all(isinstance(value, float) for metrics, _ in rows for value in metrics.values())
