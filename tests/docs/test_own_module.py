"""The example of docs/own_module.md runs, and the merged model is better than the base."""

import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from pave_lightning import PaveCallback

PAGE = (Path(__file__).parent.parent.parent / "docs" / "own_module.md").read_text()
WHOLE_WAY, TOY = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def found():
    """What stands in the namespace of the page after it was run: definitions, data, then the whole way."""
    definitions, marked, steps = WHOLE_WAY.partition("experts, statistics = {}, {}")
    space = {}
    with torch.random.fork_rng():
        for part in (definitions, TOY, marked + steps):
            exec(compile(part, "own_module.md", "exec"), space)
    return space


def loss(found, model, task):
    """The quantile loss of a model on a task's test rows, by hand."""
    total, count = 0.0, 0
    for batch in found["loaders"][task]["test"]:
        with torch.no_grad():
            gaps = (batch["demand"] - model(batch["series"], batch["facts"])).tolist()
        total += sum(0.8 * gap if gap > 0 else -0.2 * gap for gap in gaps)
        count += len(gaps)
    return total / count


def test_it_takes_fewer_than_forty_lines():
    assert len([line for line in WHOLE_WAY.splitlines() if line.strip()]) < 40


def test_the_merged_model_is_better_than_the_base(found):
    for task, expert in found["experts"].items():
        merged = loss(found, found["models"][task], task)
        under_expert_head = loss(found, found["merged"].model(task, scale=0.0), task)
        assert loss(found, expert, task) < merged < 0.85 * min(loss(found, found["base"], task), under_expert_head)


def test_the_scores_are_those_of_its_own_metric(found):
    for task, model in found["models"].items():
        assert found["scores"][task][0]["quantile_loss"] == pytest.approx(loss(found, model, task), rel=1e-5)


def test_both_inputs_are_captured_and_purified(found):
    for task, statistics in found["statistics"].items():
        assert set(statistics.layers()) >= {"series", "facts", "both"}
        assert statistics.examples == 512
        series = torch.cat([batch["series"] for batch in found["loaders"][task]["train"]]).double()
        covariance = series.T @ series / len(series)
        assert torch.allclose(statistics["series"].matrix.double(), covariance, atol=1e-4)


def test_matrices_are_purified_and_biases_are_not(found):
    base = dict(found["base"].named_parameters())
    plain = {
        name: sum(dict(expert.named_parameters())[name] - value for expert in found["experts"].values())
        for name, value in base.items()
    }
    for name in ("series", "facts", "both"):
        assert torch.allclose(found["merged"].vectors[f"{name}.bias"], plain[f"{name}.bias"], atol=1e-6)
        assert not torch.allclose(found["merged"].vectors[f"{name}.weight"], plain[f"{name}.weight"], atol=1e-4)


class Lengths(L.LightningModule):
    """Batches are tuples of padded sequences and their lengths."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 6)

    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])


def test_a_mask_for_any_batch():
    """The way that the page names for batches whose rows are padded."""
    series, lengths = torch.randn(20, 5, 4), torch.randint(1, 6, (20,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(series, lengths), batch_size=8)
    callback = PaveCallback(mask=lambda batch, layer: torch.arange(5) < batch[1][:, None])
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    L.Trainer(callbacks=[callback], **options).validate(Lengths(), data, verbose=False)
    real = torch.cat([row[:length] for row, length in zip(series, lengths, strict=True)]).double()
    found = callback.statistics["layer"]
    assert found.rows == len(real)
    assert torch.allclose(found.matrix.double(), real.T @ real / len(real), atol=1e-5)
