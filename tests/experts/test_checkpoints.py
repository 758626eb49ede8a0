"""Checkpoints that cannot be used are set aside, told, and training begins anew, with the same result."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from pave_lightning.experts import fitting
from pave_lightning.experts.checkpoints import clear_away
from pave_lightning.tasks.task import Task


class StoppedError(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def task(task_files):
    return Task.model_validate(
        {
            "name": "words",
            "data": task_files("text_classification"),
            "text": "text",
            "classes": ["low", "high"],
            "training": {"learning_rate": 1e-3, "batch_size": 16, "max_length": 16},
            "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
        }
    )


@pytest.fixture(scope="module")
def fit(task, base_folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("data")

    def run(folder):
        return fitting.fit_expert(task, base_folder, seed=0, work_folder=folder, cache_folder=cache)[0].state_dict()

    return run


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """The weights of a training that nothing disturbed."""
    return fit(tmp_path_factory.mktemp("whole") / "work")


@pytest.fixture(scope="module")
def broken_off(fit, tmp_path_factory):
    class Stopping(fitting.TaskExpert):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise StoppedError
            super().on_train_epoch_start()

    folder = tmp_path_factory.mktemp("stopped") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "TaskExpert", Stopping)
        with pytest.raises(StoppedError):
            fit(folder)
    return folder


@pytest.fixture
def stopped(broken_off, tmp_path):
    """The folder of a training that broke off in its third epoch."""
    return Path(shutil.copytree(broken_off, tmp_path / "work"))


def zero_a_block(file):
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(bytes(3000))


def flip_a_weight(file):
    """One bit in the last tensor, which torch itself does not notice."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        place = largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte[0] ^ 64]))


def rewrite(change):
    def do(file):
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return do


DAMAGES = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:2000]),
    "empty": lambda file: file.write_bytes(b""),
    "a block of zeros": zero_a_block,
    "one bit of a weight": flip_a_weight,
    "without loops": rewrite(lambda state: state.pop("loops")),
    "without the optimiser": rewrite(lambda state: state["optimizer_states"].clear()),
    "another model": rewrite(lambda state: state["state_dict"].pop("model.classifier.bias")),
    "another shape": rewrite(lambda state: state["state_dict"].update({"model.classifier.bias": torch.zeros(3)})),
}


# The best checkpoint is looked at as the last one is.
BEST = ("cut off", "one bit of a weight", "another model")
FILES = [
    pytest.param(damage, file, marks=() if file == "last.ckpt" or damage in BEST else pytest.mark.slow)
    for damage in DAMAGES
    for file in ("last.ckpt", "best.ckpt")
]


@pytest.mark.parametrize(("damage", "file"), FILES)
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_anew(fit, stopped, whole, caplog, damage, file):
    DAMAGES[damage](stopped / file)
    found = fit(stopped)
    kept = stopped.with_name("work.damaged-1")
    assert (kept / file).is_file()
    assert str(kept) in caplog.text
    assert f"the {file.partition('.')[0]} checkpoint is damaged" in caplog.text
    assert "weights_only" not in caplog.text
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_a_missing_best_checkpoint_is_told(fit, stopped, whole, caplog):
    (stopped / "best.ckpt").unlink()
    torch.testing.assert_close(fit(stopped), whole, rtol=0, atol=0)
    assert "the best checkpoint is missing" in caplog.text


def test_what_lightning_cannot_restore_does_not_block_the_task(fit, stopped, whole, caplog):
    rewrite(lambda state: state["optimizer_states"][0].pop("param_groups"))(stopped / "last.ckpt")
    torch.testing.assert_close(fit(stopped), whole, rtol=0, atol=0)
    assert "the last checkpoint cannot be restored" in caplog.text


def test_a_whole_checkpoint_is_resumed_also_in_a_moved_folder(fit, stopped, whole, caplog):
    with caplog.at_level("INFO", logger="pave_lightning"):
        found = fit(stopped)
    assert "goes on from its last checkpoint" in caplog.text
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_what_was_set_aside_is_kept_when_training_has_ended(tmp_path):
    for name in ("digest", "digest.damaged-1"):
        (tmp_path / "words" / name).mkdir(parents=True)
    clear_away(tmp_path / "words")
    assert [entry.name for entry in (tmp_path / "words").iterdir()] == ["digest.damaged-1"]
    clear_away(tmp_path / "elsewhere")
