import gc
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding, BertConfig, BertModel, GPT2Config, GPT2Model

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
from pave_lightning.statistics import LayerMoment, TaskStatistics

torch.set_num_threads(1)

HIDDEN, INNER, LENGTH = 16, 40, 7


class Expert(L.LightningModule):
    """A LightningModule that knows nothing of the package."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.backbone(**batch).last_hidden_state[:, 0])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self(batch).sum()

    def validation_step(self, batch: Any, _: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Recorder:
    """The plain way: keep every row of every linear layer and multiply in float64 at the end."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.mask: Tensor | None = None
        self.handles = [
            layer.register_forward_hook(lambda _, args, __, name=name: self.keep(name, args[0]))
            for name, layer in module.named_modules()
            if type(layer).__name__ in {"Linear", "Conv1D"}
        ]

    def keep(self, name: str, inputs: Tensor) -> None:
        if self.mask is not None and inputs.ndim == 3:
            kept = [row for sentence, real in zip(inputs, self.mask, strict=True) for row in sentence[real.bool()]]
            inputs = torch.stack(kept)
        self.rows.setdefault(name, []).append(inputs.detach().reshape(-1, inputs.shape[-1]).double())

    def covariance(self, name: str) -> Tensor:
        rows = torch.cat(self.rows[name])
        return rows.T @ rows / len(rows)


def record(module: L.LightningModule, batches: list[Any]) -> Recorder:
    recorder = Recorder(module)
    module.eval()
    with torch.no_grad():
        for batch in batches:
            recorder.mask = batch.get("attention_mask") if isinstance(batch, dict | BatchEncoding) else None
            module.validation_step(batch, 0)
    for handle in recorder.handles:
        handle.remove()
    return recorder


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=LENGTH,
    )
    model = BertModel(config)
    for parameter in model.parameters():  # biases start at zero, which would hide a forgotten one
        nn.init.normal_(parameter, std=0.3)
    return model


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in range(2, 2 + count):
        lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        made.append(
            {"input_ids": torch.randint(1, 50, (size, LENGTH), generator=generator) * mask, "attention_mask": mask}
        )
    return made


def loader(data: list[Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def trainer(callback: L.Callback | list[L.Callback], **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callback,
        **options,
    )


def validate(module: L.LightningModule, data: list[Any], callback: PaveCallback, **options: Any) -> TaskStatistics:
    trainer(callback, **options).validate(module, loader(data), verbose=False)
    return callback.statistics


def full(moment: LayerMoment) -> Tensor:
    return moment.matrix.T @ moment.matrix if moment.kind == "rows" else moment.matrix


def hooks_in(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", module="torch")
        yield


def test_equals_the_plain_computation_without_padding() -> None:
    expert, data = Expert(bert()), batches()
    recorder = record(expert, data)
    captured = validate(expert, data, PaveCallback(backbone="backbone"))
    real_tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert captured.examples == 2 + 3 + 4
    assert len(captured) == 2 * 6 + 1
    for name, moment in captured.items():
        expected = recorder.covariance(f"backbone.{name}")
        if name.endswith(".output.dense") and "attention" not in name:
            assert moment.kind == "cross"
            expected = expert.get_submodule(f"backbone.{name}").weight.double() @ expected
        else:
            assert moment.kind == ("rows" if name == "pooler.dense" else "input")
        assert moment.rows == (9 if name == "pooler.dense" else real_tokens)
        assert not moment.matrix.is_inference()
        torch.testing.assert_close(full(moment).double(), expected, atol=1e-5, rtol=1e-5)


def test_all_covariances_on_demand() -> None:
    expert, data = Expert(bert()), batches()
    recorder = record(expert, data)
    captured = validate(expert, data, PaveCallback(backbone="backbone", moments="input"))
    assert {name for name in captured if captured.kind(name) != "input"} == {"pooler.dense"}
    assert captured.kind("pooler.dense") == "rows"
    for name, moment in captured.items():
        expected = recorder.covariance(f"backbone.{name}")
        torch.testing.assert_close(moment.covariance().double(), expected, atol=1e-5, rtol=1e-5)


def test_query_key_and_value_share_one_matrix() -> None:
    captured = validate(Expert(bert()), batches(), PaveCallback(backbone="backbone"))
    attention = "encoder.layer.1.attention.self"
    assert captured[f"{attention}.query"].matrix is captured[f"{attention}.value"].matrix
    assert len({captured.owner(f"{attention}.{name}") for name in ("query", "key", "value")}) == 1
    assert captured.owner("encoder.layer.1.intermediate.dense") == "encoder.layer.1.intermediate.dense"
    apart = validate(Expert(bert()), batches(), PaveCallback(backbone="backbone", share_inputs=False))
    assert apart[f"{attention}.query"].matrix is not apart[f"{attention}.value"].matrix
    torch.testing.assert_close(apart[f"{attention}.query"].matrix, captured[f"{attention}.value"].matrix)


def test_the_whole_module_is_the_default_backbone() -> None:
    captured = validate(Expert(bert()), batches(), PaveCallback())
    assert "head" in captured
    assert captured.rows("head") == 9
    assert "backbone.encoder.layer.0.intermediate.dense" in captured


def test_a_second_pass_begins_anew() -> None:
    expert, data, callback = Expert(bert()), batches(), PaveCallback()
    once = validate(expert, data, callback)
    runner = trainer(callback)
    for _ in range(2):
        runner.validate(expert, loader(data), verbose=False)
    assert callback.statistics is not once
    assert callback.statistics.examples == once.examples
    for name in once:
        assert callback.statistics.rows(name) == once.rows(name)
        assert torch.equal(callback.statistics[name].matrix, once[name].matrix)


def test_saves_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "statistics" / "movie.safetensors"
    captured = validate(Expert(bert()), batches(), PaveCallback(str(file), metadata={"task": "movie"}))
    loaded = TaskStatistics.load(file)
    assert (loaded.examples, loaded.metadata) == (9, {"task": "movie"})
    assert loaded.unreached == captured.unreached == ()
    assert loaded.layers() == captured.layers()
    assert all(torch.equal(loaded[name].matrix, captured[name].matrix) for name in loaded)


def test_stays_out_of_fit() -> None:
    expert, callback = Expert(bert()), PaveCallback()
    watched: list[int] = []

    class Watch(L.Callback):
        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            watched.append(hooks_in(expert))

    runner = trainer([callback, Watch()], max_epochs=1, num_sanity_val_steps=1)
    runner.fit(expert, loader(batches()), loader(batches()))
    assert set(watched) == {0}
    with pytest.raises(PaveError, match="nothing has been captured"):
        _ = callback.statistics
    assert callback.state_dict() == {}


def test_hooks_go_after_the_pass_and_after_an_exception() -> None:
    class Failing(Expert):
        fails = True

        def validation_step(self, batch: Any, index: int) -> None:
            assert hooks_in(self)
            super().validation_step(batch, index)
            if self.fails:
                raise RuntimeError("out of luck")

    expert, callback = Failing(bert()), PaveCallback()
    with pytest.raises(RuntimeError, match="out of luck"):
        validate(expert, batches(), callback)
    assert hooks_in(expert) == 0
    with pytest.raises(PaveError, match="nothing has been captured"):
        _ = callback.statistics
    expert.fails = False
    assert validate(expert, batches(), callback).examples == 9
    assert hooks_in(expert) == 0


def test_the_output_of_the_model_is_left_alone() -> None:
    class Keeping(Expert):
        def validation_step(self, batch: Any, _: int) -> None:
            seen.append(self(batch))

    seen: list[Tensor] = []
    expert, data = Keeping(bert()), batches(1)
    trainer([]).validate(expert, loader(data), verbose=False)
    validate(expert, data, PaveCallback())
    assert torch.equal(seen[0], seen[1])


def test_nothing_of_the_batches_is_kept() -> None:
    counts = []

    class Count(L.Callback):
        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            gc.collect()
            counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))

    data = [batches(1)[0] for _ in range(6)]
    callback = PaveCallback()
    gc.freeze()  # what other tests left is neither looked through nor counted
    trainer([callback, Count()]).validate(Expert(bert()), loader(data), verbose=False)
    gc.unfreeze()
    assert max(counts[3:]) <= counts[2]
    assert callback._observer is None


@pytest.mark.parametrize("moments", ["smallest", "input"])
def test_autocast_takes_no_precision_from_the_products(moments: Any) -> None:
    expert, data = Expert(bert()), batches()
    with torch.autocast("cpu", torch.bfloat16):
        recorder = record(expert, data)
    captured = validate(expert, data, PaveCallback(backbone="backbone", moments=moments), precision="bf16-mixed")
    for name, moment in captured.items():
        expected = recorder.covariance(f"backbone.{name}")
        if moment.kind == "cross":
            expected = expert.get_submodule(f"backbone.{name}").weight.double() @ expected
        torch.testing.assert_close(full(moment).double(), expected, atol=1e-5, rtol=1e-5)


def test_low_matrix_precision_does_not_reach_the_outputs_used() -> None:
    """Where the processor has bfloat16, what layers see differs as well; the products of it must not."""
    expert, data = Expert(bert()), batches()
    torch.set_float32_matmul_precision("medium")
    try:
        recorder = record(expert, data)
        captured = validate(expert, data, PaveCallback(backbone="backbone"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, moment in captured.items():
        expected = recorder.covariance(f"backbone.{name}")
        if moment.kind == "cross":
            expected = expert.get_submodule(f"backbone.{name}").weight.double() @ expected
        torch.testing.assert_close(full(moment).double(), expected, atol=1e-5, rtol=1e-5)


class Perceptron(L.LightningModule):
    """No mask, tuples for batches, layers called by keyword, twice, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(3, 8)
        self.twice = nn.Linear(8, 8)
        self.narrow = nn.Linear(8, 2, bias=False)
        self.never = nn.Linear(8, 8)

    def validation_step(self, batch: Any, index: int) -> None:
        inner = self.widen(input=batch[0])
        self.narrow(self.twice(self.twice(inner).relu()))


def test_any_module_will_do() -> None:
    module, callback = Perceptron(), PaveCallback()
    data = [(torch.randn(size, 5, 3), torch.zeros(size)) for size in (4, 2)]
    captured = validate(module, data, callback)
    assert captured.layers() == ["narrow", "twice", "widen"]
    assert callback.unreached == ["never"]
    assert callback.statistics.unreached == ("never",)
    assert captured.examples == 6
    assert [captured.rows(name) for name in ("widen", "twice", "narrow")] == [30, 60, 30]
    rows = torch.cat([inputs.reshape(-1, 3) for inputs, _ in data]).double()
    torch.testing.assert_close(captured["widen"].matrix.double(), rows.T @ rows / 30, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        first = module.widen(rows.float())
        second = module.twice(first).relu()
        last = module.twice(second).double()
    both = torch.cat([first, second]).double()
    torch.testing.assert_close(captured["twice"].matrix.double(), both.T @ both / 60, atol=1e-5, rtol=1e-5)
    cross = module.narrow.weight.double() @ (last.T @ last / 30)
    assert captured.kind("narrow") == "cross"
    torch.testing.assert_close(captured["narrow"].matrix.double(), cross, atol=1e-5, rtol=1e-5)


def test_conv1d_of_gpt2() -> None:
    config = GPT2Config(vocab_size=50, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=LENGTH)
    torch.manual_seed(0)
    backbone = GPT2Model(config)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    expert, data = Expert(backbone), batches()
    recorder = record(expert, data)
    for precision in ("32-true", "bf16-mixed"):
        captured = validate(expert, data, PaveCallback(backbone="backbone"), precision=precision)
        assert captured.layers() == [f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        assert captured.shape("h.0.attn.c_attn") == (HIDDEN, HIDDEN)
        assert (captured.kind("h.0.mlp.c_proj"), captured.shape("h.0.mlp.c_proj")) == ("cross", (HIDDEN, 4 * HIDDEN))
        tolerance = 1e-5 if precision == "32-true" else 0.05
        for name, moment in captured.items():
            expected = recorder.covariance(f"backbone.{name}")
            if moment.kind == "cross":
                expected = backbone.get_submodule(name).weight.double().T @ expected
            error = torch.linalg.norm(moment.matrix - expected) / torch.linalg.norm(expected)
            assert error < tolerance


def test_flattened_tokens_are_masked_too() -> None:
    class Flat(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def validation_step(self, batch: Any, _: int) -> None:
            self.layer(batch["features"].reshape(-1, 3))

    features = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    batch = BatchEncoding({"features": features, "mask": mask})
    captured = validate(Flat(), [batch], PaveCallback(mask_key="mask"))
    rows = features[0, :3].double()
    assert (captured.examples, captured.rows("layer")) == (1, 3)
    torch.testing.assert_close(full(captured["layer"]).double(), rows.T @ rows / 3, atol=1e-6, rtol=1e-5)


def test_a_compiled_backbone_is_seen() -> None:
    data = batches()
    plain = validate(Expert(bert()), data, PaveCallback(backbone="backbone"))
    expert = Expert(bert()).eval()
    expert.backbone = torch.compile(expert.backbone, backend="eager")  # type: ignore[assignment]
    with torch.no_grad():
        expert(data[0])  # compiled before the hooks are there
    for backbone in ("backbone", None):
        captured = validate(expert, data, PaveCallback(backbone=backbone))
        prefix = "" if backbone else "backbone."
        for name in plain:
            torch.testing.assert_close(captured[prefix + name].matrix, plain[name].matrix)


class Uneven(L.LightningModule):
    """Two layers that read the same input in some batches only."""

    def __init__(self, pattern: list[str]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.pattern = pattern

    def validation_step(self, batch: Tensor, index: int) -> None:
        for layer in self.pattern[index]:
            match layer:
                case "f":
                    self.first(batch)
                case "s":
                    self.second(batch)
                case "o":
                    self.second(batch + 1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pattern", [["fs", "f"], ["fs", "fo"], ["fs", "f", "fs"], ["fs", "ffss", "sf"]])
def test_layers_that_cease_to_share_are_not_mixed_up(pattern: list[str], share: bool) -> None:
    data = [torch.randn(4, 3) for _ in pattern]
    captured = validate(Uneven(pattern), data, PaveCallback(share_inputs=share))
    for name, letters in (("first", "f"), ("second", "so")):
        seen = [
            batch + (letter == "o")
            for given, batch in zip(pattern, data, strict=True)
            for letter in given
            if letter in letters
        ]
        rows = torch.cat(seen).double()
        assert captured.rows(name) == len(rows)
        torch.testing.assert_close(full(captured[name]).double(), rows.T @ rows / len(rows), atol=1e-5, rtol=1e-5)


def test_a_layer_that_joins_late_has_its_own_matrix() -> None:
    data = [torch.randn(4, 3) for _ in range(3)]
    captured = validate(Uneven(["f", "fs", "fs"]), data, PaveCallback())
    rows = torch.cat(data[1:]).double()
    torch.testing.assert_close(captured["second"].matrix.double(), rows.T @ rows / 8, atol=1e-5, rtol=1e-5)
    assert [captured.rows(name) for name in ("first", "second")] == [12, 8]


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="moments must be one of smallest, input, output"):
        PaveCallback(moments="largest")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"rows of a layer's input \(tokens\) to count, must be at least 1, or None for all, found 0"
    ):
        PaveCallback(rows=0)
    with pytest.raises(PaveError, match=r"no submodule 'backbon'.*did you mean 'backbone'"):
        validate(Expert(bert()), batches(), PaveCallback(backbone="backbon"))
    with pytest.raises(PaveError, match=r"no linear layers below backbone\.embeddings"):
        validate(Expert(bert()), batches(), PaveCallback(backbone="backbone.embeddings"))
    broken = Perceptron()
    nn.init.constant_(broken.widen.weight, float("nan"))
    with pytest.raises(PaveError, match=r"layer 'twice' has seen NaN"):
        validate(broken, [(torch.randn(4, 3),)], PaveCallback())
    with pytest.raises(PaveError, match=r"attention_mask.*shape \(2, 1, 7\)"):
        validate(Perceptron(), [{"attention_mask": torch.ones(2, 1, 7)}], PaveCallback())


def tokens(count: int, size: int = 6, length: int = LENGTH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        made.append({"input_ids": torch.randint(1, 50, (size, length), generator=generator), "attention_mask": mask})
    return made


class Numbered(L.LightningModule):
    """Every real token carries a number of its own, so that the moments tell which ones were counted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.narrow, self.pooled = nn.Linear(width, 2, bias=False), nn.Linear(width, width)
        nn.init.ones_(self.narrow.weight)

    def validation_step(self, batch: Any, _: int) -> None:
        rows = batch["rows"]
        self.first(rows)
        self.second(rows + 0)
        self.narrow(rows)
        self.pooled(rows[:, 0])


def numbered(masks: list[Tensor]) -> tuple[list[dict[str, Tensor]], int]:
    """One-hot rows: the diagonal of a covariance is how often each token was counted; padding has the last one."""
    real = sum(int(mask.sum()) for mask in masks)
    made, start = [], 0
    for mask in masks:
        hot = torch.zeros(*mask.shape, real + 1)
        hot[..., real] = 1 - mask
        hot[mask.bool(), start + torch.arange(int(mask.sum()))] = 1
        start += int(mask.sum())
        made.append({"rows": hot, "attention_mask": mask})
    return made, real


def counted(moment: LayerMoment) -> Tensor:
    """How often each numbered token was counted."""
    return (moment.covariance().diagonal() * moment.rows).round().long()


def test_the_cap_counts_so_many_real_rows_of_each_batch() -> None:
    masks = [batch["attention_mask"] for batch in tokens(5)]
    data, real = numbered(masks)
    captured = validate(Numbered(real + 1), data, PaveCallback(rows=50))
    for name in ("first", "second", "narrow"):
        assert (captured.rows(name), captured.seen(name)) == (50, real)
    assert (captured.rows("pooled"), captured.seen("pooled")) == (30, 30)
    times = counted(captured["first"])
    assert times.max() == 1
    assert times[-1] == 0, "padding was counted"
    per_batch = [int(part.sum()) for part in times[:-1].split([int(mask.sum()) for mask in masks])]
    assert per_batch == [10] * 5
    assert torch.equal(counted(captured["second"]), times)
    cross = captured["narrow"]
    assert cross.kind == "cross"
    torch.testing.assert_close(cross.matrix[0] * 50, times.float())


def test_the_sample_depends_on_the_seed_and_nothing_else() -> None:
    data, real = numbered([batch["attention_mask"] for batch in tokens(4)])

    def times(**options: Any) -> Tensor:
        torch.rand(1)
        return counted(validate(Numbered(real + 1), data, PaveCallback(**options))["first"])

    assert torch.equal(times(rows=40), times(rows=40))
    assert not torch.equal(times(rows=40), times(rows=40, seed=1))
    assert times(rows=None).sum() == times(rows=10_000).sum() == real


def test_the_sample_is_uniform() -> None:
    data, real = numbered([tokens(1)[0]["attention_mask"]])
    drawn = torch.stack(
        [counted(validate(Numbered(real + 1), data, PaveCallback(rows=8, seed=seed))["first"]) for seed in range(60)]
    )
    expected, spread = 60 * 8 / real, (60 * 8 / real * (1 - 8 / real)) ** 0.5
    assert ((drawn.sum(dim=0)[:-1] - expected).abs() < 5 * spread).all()


def test_short_batches_are_made_up_for() -> None:
    masks = [torch.ones(size, 4, dtype=torch.long) for size in (1, 1, 8, 8)]
    data, real = numbered(masks)
    captured = validate(Numbered(real + 1), data, PaveCallback(rows=40))
    times = counted(captured["first"])[:-1].split([4, 4, 32, 32])
    assert [int(part.sum()) for part in times] == [4, 4, 16, 16]


def test_several_dataloaders_share_the_cap() -> None:
    data, real = numbered([torch.ones(4, 5, dtype=torch.long)] * 4)

    class Pair(Numbered):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, index)

    callback = PaveCallback(rows=24)
    trainer(callback).validate(Pair(real + 1), [loader(data[:2]), loader(data[2:])], verbose=False)
    times = counted(callback.statistics["first"])[:-1]
    assert [int(part.sum()) for part in times.split(20)] == [6] * 4
    assert not torch.equal(times[:20], times[40:60]), "two loaders were sampled alike"


def test_a_pass_of_unknown_length_never_exceeds_the_cap() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from ({"rows": torch.randn(8, 8, 4), "attention_mask": torch.ones(8, 8)} for _ in range(60))

    callback = PaveCallback(rows=320)
    trainer(callback).validate(Numbered(4), DataLoader(Endless(), batch_size=None), verbose=False)
    left = 320
    for _ in range(60):
        left -= -(-left // 32)
    assert callback.statistics.rows("first") == 320 - left > 250
    assert callback.statistics.seen("first") == 60 * 64


def test_memory_does_not_grow_with_the_data() -> None:
    def bytes_held(batches: int, **options: Any) -> int:
        held = []

        class Weigh(L.Callback):
            def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
                observer: Any = callback._observer
                groups = observer._groups._distinct()
                held.append(sum(group.moment.held_bytes for group in groups if group.moment is not None))

        callback = PaveCallback(backbone="backbone", **options)
        trainer([Weigh(), callback]).validate(Expert(bert()), loader(tokens(batches)), verbose=False)
        return held[-1]

    for options in ({"rows": None}, {"rows": 100}):
        assert bytes_held(60, **options) == bytes_held(20, **options)


def test_outputs_alone_where_they_are_smaller() -> None:
    expert, data = Expert(bert()), batches(4)
    recorder = record(expert, data)
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 0.05)):
        captured = validate(expert, data, PaveCallback(moments="output"), precision=precision)
        kinds = {name: captured.kind(name) for name in captured}
        narrow = {name for name in captured if name.endswith(".output.dense") and "attention" not in name} | {"head"}
        assert {name for name, kind in kinds.items() if kind == "output"} == narrow
        for name in narrow:
            weight = expert.get_submodule(name).weight.double()
            expected = weight @ recorder.covariance(name) @ weight.T
            error = torch.linalg.norm(captured[name].matrix - expected) / torch.linalg.norm(expected)
            assert error < tolerance
            assert captured.shape(name) == (len(weight), len(weight))


def test_few_rows_are_kept_as_they_are() -> None:
    data, module = [torch.randn(3, 10), torch.randn(4, 10)], nn.Linear(10, 10)

    class Single(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def validation_step(self, batch: Any, _: int) -> None:
            self.layer(batch)

    rows = torch.cat(data)
    kept = validate(Single(), data, PaveCallback())["layer"]
    assert (kept.kind, kept.rows) == ("rows", 7)
    torch.testing.assert_close(kept.matrix, rows / 7**0.5)
    summed = validate(Single(), data, PaveCallback(keep_rows=False))["layer"]
    assert summed.kind == "input"
    torch.testing.assert_close(summed.matrix, rows.T @ rows / 7)
    torch.testing.assert_close(kept.covariance(), summed.matrix)
    assert validate(Single(), [*data, torch.randn(3, 10)], PaveCallback())["layer"].kind == "input"


def test_layers_may_have_masks_of_their_own() -> None:
    """One projection counts first tokens alone; those that share its input do not share its moment."""
    module, data = Expert(bert()), batches()
    own = "encoder.layer.1.attention.self.key"

    def mask(batch: Any, layer: str) -> Tensor:
        real: Tensor = batch["attention_mask"]
        return (torch.arange(LENGTH) == 0).expand_as(real) if layer == own else real

    found = validate(module, data, PaveCallback(backbone="backbone", moments="input", mask=mask, rows=None))
    usual = validate(module, data, PaveCallback(backbone="backbone", moments="input", rows=None))
    inputs: list[Tensor] = []
    module.eval()
    handle = module.backbone.get_submodule(own).register_forward_pre_hook(lambda _, args: inputs.append(args[0][:, 0]))
    with torch.no_grad():
        for batch in data:
            module.validation_step(batch, 0)
    handle.remove()
    rows = torch.cat(inputs).double()
    assert torch.allclose(full(found[own]).double(), rows.T @ rows / len(rows), atol=1e-5)
    for name in usual.layers():
        if name != own:
            assert torch.equal(full(found[name]), full(usual[name]))


@pytest.mark.parametrize("batch_mask", [False, True])
def test_layers_without_a_mask_count_all_rows_beside_layers_with_one(batch_mask: bool) -> None:
    """Whether the batch has a mask or not; inputs that layers share are counted each by its own mask."""
    query, value = (f"encoder.layer.1.attention.self.{name}" for name in ("query", "value"))

    def mask(batch: Any, layer: str) -> Tensor | None:
        return batch["attention_mask"] if layer == query or (batch_mask and not layer) else None

    module, data = Expert(bert()), batches()
    found = validate(module, data, PaveCallback(backbone="backbone", moments="input", mask=mask, rows=None))
    inputs: list[Tensor] = []
    module.eval()
    handle = module.backbone.get_submodule(value).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in data:
            module.validation_step(batch, 0)
    handle.remove()
    real = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    rows = torch.cat([given.flatten(0, 1) for given in inputs]).double()
    assert not real.all()
    for name, counted in ((query, rows[real]), (value, rows)):
        assert found[name].rows == len(counted)
        assert torch.allclose(full(found[name]).double(), counted.T @ counted / len(counted), atol=1e-5)


def test_masks_that_fit_no_layer_are_told() -> None:
    def wrong(batch: Any, layer: str) -> Tensor:
        return batch["attention_mask"][:, 1:]

    with pytest.warns(
        UserWarning, match=r"no layer's input has rows \(tokens\) that fit the padding masks .*look at mask$"
    ):
        validate(Expert(bert()), batches(), PaveCallback(mask=wrong))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        validate(Expert(bert()), batches(), PaveCallback())
    assert not [one for one in told if "fit the padding masks" in str(one.message)]


@pytest.mark.parametrize("rows", [1, -1, "twice"])
@pytest.mark.parametrize("of_all", [False, True])
def test_a_mask_of_another_batch_is_refused(rows: int | str, of_all: bool) -> None:
    """Of one layer alone, or of all; of fewer examples or of more."""
    own = "encoder.layer.1.attention.self.key"

    def wrong(batch: Any, layer: str) -> Tensor:
        real: Tensor = batch["attention_mask"]
        if not of_all and layer != own:
            return real
        return real.repeat(2, 1) if isinstance(rows, str) else real[:rows]

    module, size = Expert(bert()), {1: 1, -1: 2, "twice": 6}[rows]
    named = own if not of_all else "encoder.layer.0.attention.self.query"
    told = f"the mask of '{named}' has the shape ({size}, {LENGTH}), but the layer is given (3, {LENGTH}, {HIDDEN})"
    with pytest.raises(PaveError, match=re.escape(told)):
        validate(module, batches()[1:2], PaveCallback(backbone="backbone", mask=wrong))
    assert hooks_in(module) == 0


def test_a_mask_may_have_other_rows_where_a_layer_does_not_see_the_examples_one_by_one() -> None:
    """Each example is cut into two windows, and each window has its row of the mask."""

    class Windows(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(HIDDEN, 3)

        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            self.layer(batch["x"].reshape(6, 4, HIDDEN))

    batch = {"x": torch.randn(3, 8, HIDDEN), "real": torch.arange(24).reshape(6, 4) % 5 > 0}
    found = validate(Windows(), [batch], PaveCallback(mask=lambda batch, layer: batch["real"], moments="input"))
    rows = batch["x"].reshape(24, HIDDEN)[batch["real"].flatten()].double()
    assert found["layer"].rows == 19
    assert torch.allclose(full(found["layer"]).double(), rows.T @ rows / 19, atol=1e-5)


def test_a_mask_of_another_form_is_refused() -> None:
    with pytest.raises(PaveError, match=r"mask: must give a tensor of shape \(batch, length\) or None, found shape"):
        validate(Expert(bert()), batches(), PaveCallback(mask=lambda batch, layer: torch.ones(2)))
