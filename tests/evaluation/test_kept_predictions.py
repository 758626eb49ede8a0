"""What is kept of predictions: every row once, in the order of the file, whatever the batches and processes."""

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from pave_lightning.evaluation import Evaluator, ExpertsCandidate, SuiteData
from pave_lightning.evaluation.kept_predictions import KeptPredictions
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.tasks.heads import Predictions
from pave_lightning.tasks.predictions import TaskPredictions, read_predictions, write_predictions
from pave_lightning.tasks.samplers import ExactSampler
from several_processes import run_together


@torch.no_grad()
def said(suite, task):
    """The outputs of a task's expert, one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(suite.experts[task.name]).eval()
    texts = ([row[name] for name in task.text] for row in suite.rows[task.name, "test"])
    return torch.cat([model(**suite.tokenizer(*text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("batch_size", [4, 7])
def test_predictions_of_a_suite_are_those_of_a_plain_loop(suite, tmp_path, batch_size):
    trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, enable_progress_bar=False)
    evaluator = Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint())
    data = SuiteData([suite.data(task, batch_size=batch_size) for task in suite.tasks], "test")
    candidate = ExpertsCandidate(suite.checkpoints())
    found = evaluator.score(candidate, data, trainer, keep=True)
    for task in suite.tasks:
        outputs, kept = said(suite, task), found[task.name].predictions
        labels = [row["label"] for row in suite.rows[task.name, "test"]]
        np.testing.assert_array_equal(kept.rows, np.arange(len(labels)))
        np.testing.assert_array_equal(kept.positions, 0)
        if task.kind == "regression":
            assert kept.predictions.dtype == kept.targets.dtype == np.float64
            np.testing.assert_array_equal(kept.targets, np.asarray(labels, dtype=np.float32))
            np.testing.assert_allclose(kept.predictions, outputs[:, 0].numpy(), atol=1e-5)
        else:
            assert kept.predictions.dtype == kept.targets.dtype == np.int64
            np.testing.assert_array_equal(kept.targets, labels)
            np.testing.assert_array_equal(kept.predictions, outputs.argmax(1).numpy())
    assert all(one.predictions is None for one in evaluator.score(candidate, data, trainer).values())


def test_a_split_with_fewer_rows_than_processes_is_allowed(suite):
    """Lightning's own constructor sets the attribute, so that one of the class would say nothing."""
    modules = [suite.data(task) for task in suite.tasks]
    for data in (*modules, SuiteData(modules, "test")):
        assert data.allow_zero_length_dataloader_with_multiple_devices


LENGTHS = [3, 9, 1, 4, 4, 7, 2]
# One task with a class a row; one with as many numbers a row as it is long, but none for row 2; one with a single
# row; one with texts, of which several may be right.
TASKS = 4


class Rows(L.LightningDataModule):
    """The numbers of the rows themselves, divided as tasks' rows are."""

    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def test_dataloader(self):
        loaders = []
        for task in range(TASKS):
            lengths = LENGTHS[:1] if task == 2 else LENGTHS
            sampler = ExactSampler(lengths, world=self.trainer.world_size, rank=self.trainer.global_rank)
            loaders.append(DataLoader(torch.arange(len(lengths)), batch_size=2, sampler=sampler))
        return loaders


def written(row):
    """A text and the right ones, of different lengths and numbers."""
    return "ä\n" * row, [f"right {place}" for place in range(1 + row % 3)]


class Fake(L.LightningModule):
    """Predicts what can be told from the row."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.nothing, self.found = kept, nn.Linear(1, 1), None

    def test_step(self, rows, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1:
            lengths = [0 if row == 2 else LENGTHS[row] for row in rows]
            values = torch.tensor([row + word / 10 for row, n in zip(rows, lengths, strict=True) for word in range(n)])
            examples = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
            found = Predictions(values, -values, torch.tensor(0), examples)
        elif dataloader_idx == 3:
            texts, right = zip(*(written(row) for row in rows.tolist()), strict=True)
            found = Predictions(texts, right, torch.tensor(0))
        else:
            found = Predictions(rows % 3, rows % 2, torch.tensor(0))
        self.kept.add(dataloader_idx, found, rows.tolist())

    def on_test_epoch_end(self):
        self.found = self.kept.gathered(self.trainer, self.device)


def predict(rank, world, folder):
    options = {"devices": 1}
    if world > 1:
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
        options = {"devices": world, "strategy": strategy}
    module = Fake(KeptPredictions(TASKS))
    L.Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **options,
    ).test(module, datamodule=Rows(), verbose=False)
    named = {f"task{index}": found for index, found in enumerate(module.found)}
    write_predictions(folder / f"{world}-{rank}.parquet", named, {"task0": ["no", "yes", "maybe"]})


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_keep_the_same_as_one(tmp_path, world):
    for processes in (1, world):
        run_together(predict, processes, processes, tmp_path)
    whole = (tmp_path / "1-0.parquet").read_bytes()
    for rank in range(world):
        assert (tmp_path / f"{world}-{rank}.parquet").read_bytes() == whole
    found, classes = read_predictions(tmp_path / "1-0.parquet")
    np.testing.assert_array_equal(found["task0"].predictions, np.arange(7) % 3)
    np.testing.assert_array_equal(found["task0"].targets, np.arange(7) % 2)
    assert classes == {"task0": ["no", "yes", "maybe"], "task1": [], "task2": [], "task3": []}
    words = [(row, word) for row, length in enumerate(LENGTHS) if row != 2 for word in range(length)]
    np.testing.assert_array_equal(np.stack([found["task1"].rows, found["task1"].positions], 1), words)
    expected = np.asarray([np.float32(row + word / 10) for row, word in words], dtype=np.float64)
    np.testing.assert_array_equal(found["task1"].predictions, expected)
    np.testing.assert_array_equal(found["task1"].targets, -expected)
    assert found["task2"].rows.tolist() == [0]
    told = [(text, list(right)) for text, right in zip(found["task3"].predictions, found["task3"].targets, strict=True)]
    assert told == [written(row) for row in range(7)]


def test_predictions_of_which_the_example_is_not_known_are_not_kept(tmp_path):
    class Unplaced(Fake):
        def test_step(self, rows, batch_idx, dataloader_idx=0):
            self.kept.add(dataloader_idx, Predictions(torch.zeros(5), torch.zeros(5), torch.tensor(0)), rows.tolist())

    module = Unplaced(KeptPredictions(TASKS))
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).test(
        module, datamodule=Rows(), verbose=False
    )
    assert module.found == [None] * TASKS


def test_a_file_holds_what_was_written(tmp_path):
    rows = np.array([2, 0, 2, 1])
    words = TaskPredictions.ordered(rows, np.array([5, 6, 7, 8]), np.array([1, 2, 3, 4]))
    assert words.rows.tolist() == [0, 1, 2, 2]
    assert words.positions.tolist() == [0, 0, 0, 1]
    assert words.predictions.tolist() == [6, 8, 5, 7]
    numbers = TaskPredictions.ordered(np.arange(2), np.array([0.1, np.nan]), np.array([1 / 3, 1e300]))
    nothing = TaskPredictions.ordered(*np.zeros((3, 0), dtype=np.int64))
    write_predictions(tmp_path / "a.parquet", {"words": words, "numbers": numbers, "nothing": nothing}, {})
    found, _ = read_predictions(tmp_path / "a.parquet")
    assert list(found) == ["words", "numbers", "nothing"]
    for name, one in (("words", words), ("numbers", numbers), ("nothing", nothing)):
        for field in ("rows", "positions", "predictions", "targets"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(one, field))
            assert getattr(found[name], field).dtype == getattr(one, field).dtype
    assert words.same_rows(found["words"])
    assert not words.same_rows(numbers)
