"""The course of a training is kept whole, also over an interruption."""

from itertools import pairwise

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from pave_lightning.experts.history import MOST_POINTS, History


class Descent(L.LightningModule):
    """Three steps an epoch; the loss and the score that are logged are the step itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.log("train/loss", float(self.global_step))
        self.log("other", 1.0)
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.log("validation/accuracy", float(self.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, history, epochs):
    return L.Trainer(
        max_epochs=epochs,
        callbacks=[history],
        default_root_dir=folder,
        log_every_n_steps=2,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def test_losses_and_scores_by_step_go_on_from_a_checkpoint(tmp_path):
    rows = DataLoader(TensorDataset(torch.zeros(3, 1)), batch_size=1)
    first = History()
    begun = trainer(tmp_path, first, 1)
    begun.fit(Descent(), rows, rows)
    assert first.curves() == {"train/loss": [[2, 1.0]], "validation/accuracy": [[3, 3.0]]}
    begun.save_checkpoint(tmp_path / "last.ckpt")
    second = History()
    trainer(tmp_path, second, 2).fit(Descent(), rows, rows, ckpt_path=tmp_path / "last.ckpt")
    expected = {"train/loss": [[2, 1.0], [4, 3.0], [6, 5.0]], "validation/accuracy": [[3, 3.0], [6, 6.0]]}
    assert second.curves() == expected
    # A training that begins anew forgets what was.
    trainer(tmp_path, second, 1).fit(Descent(), rows, rows)
    assert second.curves() == first.curves()


def test_long_curves_are_thinned_and_keep_their_end():
    history = History()
    history.load_state_dict({"series": {"train/loss": [[step, 1.0] for step in range(1, 10 * MOST_POINTS + 4)]}})
    (points,) = history.curves().values()
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS
    assert points[-1] == [10 * MOST_POINTS + 3, 1.0]
    assert len({after[0] - before[0] for before, after in pairwise(points)}) == 1
