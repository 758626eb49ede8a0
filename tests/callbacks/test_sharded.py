"""Capture where processes hold parts of the weights: FSDP2 on the CPU."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.utils.data import BatchSampler, DataLoader

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
from pave_lightning.experts.sharding import FullyShardedStrategy
from pave_lightning.statistics import TaskStatistics
from several_processes import run_together

WIDTH, LENGTH, EXAMPLES, SIZE = 6, 3, 7, 2


class Expert(L.LightningModule):
    """Blocks with shared inputs, cross moments and norms; some layers are divided by themselves, one is compiled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [
            nn.ModuleDict(
                {
                    "query": nn.Linear(WIDTH, WIDTH),
                    "key": nn.Linear(WIDTH, WIDTH),
                    "narrow": nn.Linear(WIDTH, 2),
                    "wide": nn.Linear(2, WIDTH),
                    "norm": nn.LayerNorm(WIDTH),
                }
            )
            for _ in range(3)
        ]
        self.blocks = nn.ModuleList(Block(**block) for block in blocks)
        self.head, self.never = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, FullyShardedStrategy):
            return
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        fully_shard(self.blocks[0].narrow, mesh=mesh)
        self.blocks[1].narrow.compile(backend="eager")
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        # By itself: its own hook takes its weights away before others see it.
        fully_shard(self.head, mesh=mesh, reshard_after_forward=True)

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        values = batch["values"]
        for block in self.blocks:
            values = block(values)
        self.head(values)


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.__dict__["order"] = list(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, values):
        values = self.norm(values)
        return values + self.wide(self.narrow(self.query(values) + self.key(values)))


def examples() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (EXAMPLES, 1))
    return [{"values": v, "attention_mask": m} for v, m in zip(torch.randn(EXAMPLES, LENGTH, WIDTH), mask, strict=True)]


def padded(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    """What a process is shown: as many examples as the others, of which some are of weight 0."""
    most = -(-EXAMPLES // world)
    own = [{**example, "example_weight": torch.tensor(1.0)} for example in examples()[rank::world]]
    return own + [{**examples()[0], "example_weight": torch.tensor(0.0)}] * (most - len(own))


def validate(data, path: Path | None, *, strategy, world: int, stand_ins: int = 0, **options) -> PaveCallback:
    callback = PaveCallback(path, norms=True, **options)
    L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=callback,
    ).validate(Expert(), DataLoader(data, batch_sampler=Batches(len(data), stand_ins)), verbose=False)
    return callback


class Batches(BatchSampler):
    """Says how many batches at the end are of weight 0."""

    def __init__(self, count: int, stand_ins: int = 0) -> None:
        super().__init__(range(count), SIZE, drop_last=False)
        self.stand_ins = stand_ins


def capture(rank: int, world: int, folder: Path) -> None:
    found = validate(padded(rank, world), folder / "written", strategy=FullyShardedStrategy(), world=world)
    found.statistics.save(folder / f"rank{rank}")
    (folder / f"unreached{rank}").write_text(" ".join(found.unreached))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_divided_weights_give_the_statistics_of_one_process(world, tmp_path):
    run_together(capture, world, world, tmp_path)
    alone = validate(examples(), None, strategy="auto", world=1).statistics
    for rank in range(world):
        assert (tmp_path / f"rank{rank}").read_bytes() == (tmp_path / "written").read_bytes()
        assert (tmp_path / f"unreached{rank}").read_text() == "never"
    together = TaskStatistics.load(tmp_path / "written")
    assert together.examples == EXAMPLES
    assert together.layers() == alone.layers()
    assert len(alone.layers()) == 3 * 4 + 1
    for name in together:
        assert (together.kind(name), together.rows(name)) == (together[name].kind, alone.rows(name))
        one, all_of_them = alone[name], together[name]
        expected = one.covariance() if one.kind in ("rows", "input") else one.matrix
        torch.testing.assert_close(all_of_them.matrix, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert list(together.norms) == list(alone.norms) == [f"blocks.{number}.norm" for number in range(3)]
    for name, norm in together.norms.items():
        assert norm.rows == alone.norms[name].rows
        torch.testing.assert_close(norm.squares, alone.norms[name].squares)


@pytest.mark.parametrize("options", [{}, {"rows": 5}])
def test_examples_of_weight_zero_are_passed_over(options):
    plain = examples()
    zeros = [{**example, "example_weight": torch.tensor(0.0)} for example in plain]
    ones = [{**example, "example_weight": torch.tensor(2.0)} for example in plain]
    # The first batch is of both kinds, the fourth of weight 0 altogether.
    mixed = [zeros[0], ones[1], ones[2], ones[3], ones[4], ones[5], zeros[0], zeros[1]]
    found = validate(mixed, None, strategy="auto", world=1, stand_ins=1, **options).statistics
    assert found.examples == 5
    if options:
        assert {found.rows(name) for name in found} == {5}
        return
    expected = validate(plain[1:6], None, strategy="auto", world=1).statistics
    for name in expected:
        assert found.rows(name) == expected.rows(name)
        torch.testing.assert_close(found[name].matrix, expected[name].matrix, rtol=1e-5, atol=1e-6)


def test_weights_that_cannot_be_told_apart_are_refused():
    odd = [
        {"values": example["values"], "example_weight": torch.tensor(float(i))} for i, example in enumerate(examples())
    ]
    with pytest.raises(PaveError, match="examples of weight 0 into batches of their own"):
        validate(odd, None, strategy="auto", world=1)
    odd = [{**example, "example_weight": torch.ones(2)} for example in examples()]
    with pytest.raises(PaveError, match=r"must be a tensor of shape \(batch,\), found shape \(2, 2\)"):
        validate(odd, None, strategy="auto", world=1)


class Wrapped(Expert):
    """Divided by Lightning: all of it as one unit, and each block as another."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy):
            chosen = set(self.blocks)
            self.trainer.strategy.kwargs["auto_wrap_policy"] = CustomPolicy(lambda module: module in chosen)


def capture_on_gpu(rank: int, strategy: str, folder: Path) -> None:
    options = {"accelerator": "gpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    callback = PaveCallback(folder / "written")
    trainer = L.Trainer(strategy=strategy, callbacks=callback, enable_progress_bar=False, **options)
    trainer.validate(Wrapped(), DataLoader(examples(), batch_size=SIZE), verbose=False)


@pytest.mark.cuda
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_strategies_for_gpus_are_captured_under(strategy, tmp_path):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    run_together(capture_on_gpu, 1, strategy, tmp_path)
    found = TaskStatistics.load(tmp_path / "written")
    alone = validate(examples(), None, strategy="auto", world=1).statistics
    assert found.layers() == alone.layers()
    for name in alone:
        torch.testing.assert_close(found[name].matrix, alone[name].matrix, rtol=1e-4, atol=1e-5)
