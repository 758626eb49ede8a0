import multiprocessing
import os
import socket
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
from pave_lightning.statistics import TaskStatistics

WORLD_SIZE = 2


class Expert(L.LightningModule):
    """Has a shared input, a cross moment, and layers that only some rows or none reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 2)
        self.rare, self.rare_twin, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.rare_norm, self.idle_norm = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.norm(batch)
        self.narrow(self.query(batch) + self.key(batch))
        if (chosen := batch[batch[:, 0] == 0]).numel():
            self.rare(chosen)
            self.rare_twin(chosen)
            self.rare_norm(chosen)


class SwitchedNorm(nn.LayerNorm):
    """May put out something else than a norm does."""

    odd = False

    def forward(self, inputs: Tensor) -> Tensor:
        return 3 * super().forward(inputs) if self.odd else super().forward(inputs)


class NormsDisagree(Expert):
    """Its processes disagree about what one norm is."""

    def __init__(self) -> None:
        super().__init__()
        self.switched = SwitchedNorm(4)

    def validation_step(self, batch: Tensor, index: int) -> None:
        super().validation_step(batch, index)
        self.switched.odd = self.global_rank > 0
        self.switched(batch)


class SharesUnevenly(Expert):
    """Its processes disagree about which inputs are the same, and when they cease to be."""

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.query(batch)
        self.key(batch + 1 if index >= 2 - self.global_rank else batch)
        self.rare(batch)
        self.rare_twin(batch)


def examples() -> Tensor:
    return torch.arange(5 * 4).reshape(5, 4) % 7 + torch.tensor([0.0, 1.0, 0.5, -2.0])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def capture(rank: int, port: str, expert: type[Expert], folder: str, rows: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    data = examples()[rank::WORLD_SIZE]  # three examples here, two there
    callback = PaveCallback(Path(folder) / "statistics", rows=rows, norms=True)
    try:
        L.Trainer(
            accelerator="cpu",
            devices=WORLD_SIZE,
            strategy=DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment()),
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=callback,
        ).validate(expert(), DataLoader(data, batch_size=1), verbose=False)  # type: ignore[arg-type]
    except PaveError as error:
        (Path(folder) / f"error{rank}").write_text(str(error))
        return
    callback.statistics.save(Path(folder) / f"rank{rank}")
    (Path(folder) / f"unreached{rank}").write_text(" ".join(callback.unreached + callback.unreached_norms))


def run(expert: type[Expert], folder: Path, rows: int = 100) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=capture, args=(rank, port, expert, str(folder), rows), daemon=True)
        for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    run(Expert, tmp_path)
    alone = PaveCallback(tmp_path / "alone", norms=True)
    L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=alone,
    ).validate(Expert(), DataLoader(examples(), batch_size=1), verbose=False)  # type: ignore[arg-type]
    assert (tmp_path / "rank0").read_bytes() == (tmp_path / "rank1").read_bytes()
    assert (tmp_path / "rank0").read_bytes() == (tmp_path / "statistics").read_bytes()
    together = TaskStatistics.load(tmp_path / "statistics")
    assert together.layers() == alone.statistics.layers() == ["key", "narrow", "query", "rare", "rare_twin"]
    assert together.examples == 5
    assert together.rows("rare") == 1
    assert together.owner("rare_twin") == "rare"
    for name in together:
        assert together.rows(name) == alone.statistics.rows(name)
        expected = alone.statistics[name]
        if expected.kind == "rows":
            assert together.kind(name) == "input"
            torch.testing.assert_close(together[name].matrix, expected.covariance(), rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(together[name].matrix, expected.matrix, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "unreached0").read_text() == (tmp_path / "unreached1").read_text() == "never idle_norm"
    assert list(together.norms) == list(alone.statistics.norms) == ["norm", "rare_norm"]
    for name, rows in (("norm", 5), ("rare_norm", 1)):
        norm, expected_norm = together.norms[name], alone.statistics.norms[name]
        assert norm.rows == norm.seen == expected_norm.rows == rows
        torch.testing.assert_close(norm.squares, expected_norm.squares)


def test_a_norm_that_is_of_another_form_in_one_process_is_left_out_in_all(tmp_path: Path) -> None:
    run(NormsDisagree, tmp_path)
    for rank in range(WORLD_SIZE):
        assert list(TaskStatistics.load(tmp_path / f"rank{rank}").norms) == ["norm", "rare_norm"]
        assert (tmp_path / f"unreached{rank}").read_text() == "never idle_norm switched"


def test_processes_share_the_cap(tmp_path: Path) -> None:
    run(Expert, tmp_path, rows=3)
    together = TaskStatistics.load(tmp_path / "statistics")
    # The first process may count one row of its three, the second all of its two.
    assert (together.rows("query"), together.seen("query")) == (3, 5)
    assert (together.norms["norm"].rows, together.norms["norm"].seen) == (3, 5)
    mine, others = examples()[0::2].double(), examples()[1::2].double()
    possible = [(row.outer(row) + others.T @ others) / 3 for row in mine]
    found = together["query"].matrix.double()
    assert min(float((found - one).abs().max()) for one in possible) < 1e-5


def test_processes_that_cease_to_share_in_different_batches_agree(tmp_path: Path) -> None:
    run(SharesUnevenly, tmp_path)
    assert (tmp_path / "rank0").read_bytes() == (tmp_path / "rank1").read_bytes()
    together = TaskStatistics.load(tmp_path / "statistics")
    assert together.owner("rare_twin") == "rare"
    assert together.owner("query") == "query"
    parts = [examples()[rank::WORLD_SIZE].double() for rank in range(WORLD_SIZE)]
    shifted = [rows + (torch.arange(len(rows)) >= 2 - rank)[:, None] for rank, rows in enumerate(parts)]
    for name, rows in {"query": torch.cat(parts), "key": torch.cat(shifted), "rare": torch.cat(parts)}.items():
        assert together.rows(name) == 5
        torch.testing.assert_close(together[name].matrix.double(), rows.T @ rows / 5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("length", "warned"), [(5, True), (6, False)])
def test_warns_of_a_sampler_that_repeats(length: int, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers(Dataset[Tensor]):
        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> Tensor:
            return torch.full((4,), float(index))

    said: list[str] = []
    monkeypatch.setattr("pave_lightning.callbacks.pave_callback.rank_zero_warn", said.append)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    loader = DataLoader(Numbers(), sampler=DistributedSampler(Numbers(), num_replicas=2, rank=0))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.callbacks.append(PaveCallback())  # type: ignore[attr-defined]
    trainer.validate(Expert(), loader, verbose=False)
    assert len(said) == int(warned)
