from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pave_lightning.errors import PaveError
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.kinds.tokens import tokenizer_fingerprint
from pave_lightning.tasks.samplers import ExactSampler, TrainingSampler


@pytest.fixture
def make_module(tmp_path, tokenizer):
    def build(task, **options):
        training = task.training.model_copy(update={"max_length": options.pop("max_length", 16)})
        task = task.model_copy(update={"training": training})
        options = {"seed": 0, "cache_dir": tmp_path / "cache", "batch_size": 4, **options}
        return TaskDataModule(task, options.pop("tokenizer", tokenizer), **options)

    return build


def attach(module, world, rank, fn=None):
    progress = SimpleNamespace(ready=0, started=0, processed=0, completed=0)
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=progress),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=progress, is_last_batch=False)),
    )
    state = SimpleNamespace(fn=fn)
    module.trainer = SimpleNamespace(world_size=world, global_rank=rank, state=state, fit_loop=loop)
    return module


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch["input_ids"].tolist() for batch in loader]


def rows_of(loader):
    """The rows of a loader without padding, in order."""
    return [
        (tuple(ids[mask.bool()].tolist()), label.item())
        for batch in loader
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


# --- exact sampler ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 3))
def test_every_row_once_over_all_ranks(lengths, world):
    parts = [list(ExactSampler(lengths, world=world, rank=rank)) for rank in range(world)]
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank, part in enumerate(parts):
        assert len(ExactSampler(lengths, world=world, rank=rank)) == len(part)
        assert [lengths[row] for row in part] == sorted((lengths[row] for row in part), reverse=True)


def test_rows_of_one_length_keep_their_order():
    assert list(ExactSampler([3, 5, 3, 5, 3])) == [1, 3, 0, 2, 4]


def test_a_resumed_sampler_leaves_out_what_is_done_in_its_epoch_only():
    sampler = TrainingSampler(range(10), batch_size=3, seed=0)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.resume(4, 2)
    assert list(sampler) == list(sampler) == whole[6:]
    assert len(sampler) == 10
    sampler.set_epoch(5)
    assert len(list(sampler)) == 10


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_a_model_takes(make_module, make_task):
    batch = next(iter(make_module(make_task()).val_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].shape == (4, 9)
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_regression_labels_are_float32(make_module, make_task):
    module = make_module(make_task(numbers=True))
    labels = torch.cat([batch["labels"] for batch in module.test_dataloader()])
    assert labels.dtype == torch.float32
    assert sorted(labels.tolist()) == list(range(23))


def test_padding_is_dynamic_and_masked(make_module, make_task):
    shapes = []
    for batch in make_module(make_task()).val_dataloader():
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
        assert batch["attention_mask"].any(0).all()
        shapes.append(batch["input_ids"].shape[1])
    assert shapes == sorted(shapes, reverse=True)
    assert shapes[-1] < shapes[0]


def test_class_names_become_indices(make_module, make_task):
    rows = [{"text": text, "label": text} for text in ("good", "bad", "film")]
    module = make_module(make_task(rows, rows, rows, classes=["film", "good", "bad"]))
    assert module.dataset("train")["labels"][:] == [1, 2, 0]


def test_whole_floats_become_indices(make_module, make_task):
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    assert make_module(make_task(train=rows)).dataset("train")["labels"][:] == [1, 0]


def test_pairs_are_joined_and_cut(make_module, make_task):
    rows = [{"a": "a b c d e", "b": "f g", "label": 0}, {"a": "a", "b": "b", "label": 1}]
    module = make_module(make_task(rows, rows, rows, text=("a", "b")), max_length=8)
    first = module.dataset("train")[0]
    assert first["length"] == 8
    assert first["token_type_ids"] == [0] * 5 + [1] * 3
    assert module.processor.decode(first["input_ids"]) == "[CLS] a b c [SEP] f g [SEP]"


def test_columns_may_be_called_like_the_results(make_module, make_task):
    rows = [{"length": "a b", "labels": 1, "input_ids": 7}, {"length": "c", "labels": 0, "input_ids": 7}]
    module = make_module(make_task(rows, rows, rows, text=("length",), label="labels"))
    assert module.dataset("train")["length"][:] == [4, 3]
    assert module.dataset("train")["labels"][:] == [1, 0]


def test_examples_choose_the_rows(make_module, make_task):
    module = make_module(make_task(examples={"train": 6, "validation": 5, "test": 4}))
    assert [len(module.dataset(split)) for split in ("train", "validation", "test")] == [6, 5, 4]


def test_a_tokenizer_without_padding_is_refused(make_module, make_task):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(PaveError, match="no padding token"):
        make_module(make_task(), tokenizer=bare)


def test_bad_labels_never_reach_a_model(make_module, make_task):
    with pytest.raises(PaveError, match="from 0 to 1, but holds 2 in row 0"):
        make_module(make_task(train=[{"text": "a", "label": 2}])).train_dataloader()


# --- order -----------------------------------------------------------------------------------------------------------


def test_training_batches_depend_on_seed_and_epoch_only(make_module, make_task):
    task = make_task()
    first, resumed = make_module(task).train_dataloader(), make_module(task).train_dataloader()
    epochs = [epoch_of(first, epoch) for epoch in range(3)]
    torch.manual_seed(123)
    assert epoch_of(resumed, 2) == epochs[2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_of(make_module(task, seed=7).train_dataloader(), 0) != epochs[0]


def test_training_sees_every_row_and_groups_by_length(make_module, make_task):
    module = make_module(make_task(train=[{"text": "a " * n, "label": n % 2} for n in range(1, 14)] * 10))
    loader = module.train_dataloader()
    assert sorted(rows_of(loader)) == sorted(rows_of(module._exact_loader(module.dataset("train"), 3)))
    waste = [1 - batch["attention_mask"].float().mean().item() for batch in loader]
    assert np.mean(waste) < 0.15


@pytest.mark.parametrize("world", [2, 3])
def test_training_ranks_share_the_rows(world, make_module, make_task):
    task = make_task()
    whole = set(rows_of(make_module(task).train_dataloader()))
    parts = [rows_of(attach(make_module(task), world, rank).train_dataloader()) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert set().union(*parts) == whole


def test_the_global_generator_is_left_alone(make_module, make_task):
    loader = make_module(make_task()).val_dataloader()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("which", ["val", "test", "capture"])
def test_evaluation_and_capture_are_exact(which, world, make_module, make_task):
    numbered = [{"text": " ".join("abcdefgh"[: i % 5 + 1]), "label": float(i)} for i in range(13)]
    task = make_task(numbered, numbered, numbered, numbers=True)
    found = []
    for rank in range(world):
        module = attach(make_module(task), world, rank)
        loader = (
            module.capture_dataloader(100, 3, 0) if which == "capture" else getattr(module, f"{which}_dataloader")()
        )
        found += [label for _, label in rows_of(loader)]
    assert sorted(found) == list(range(13))


def test_capture_shows_a_seeded_sample_of_the_trained_rows(make_module, make_task):
    rows = [{"text": "a", "label": float(i)} for i in range(40)]
    module = make_module(make_task(train=rows, numbers=True, examples={"train": 20}))
    trained = set(module.dataset("train")["labels"][:])
    samples = [{label for _, label in rows_of(module.capture_dataloader(8, 4, seed))} for seed in (0, 0, 1)]
    assert [len(sample) for sample in samples] == [8, 8, 8]
    assert samples[0] == samples[1] != samples[2]
    assert all(sample <= trained for sample in samples)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_random_tokens_are_words_within_the_special_tokens_of_a_real_text(world, make_module, make_task, tokenizer):
    tokenizer.cls_token, tokenizer.sep_token = "[CLS]", "[SEP]"

    def drawn(seed, rank=0, world=1):
        module = attach(make_module(make_task(), max_length=7), world, rank)
        batches = list(module.random_dataloader(examples=300, batch_size=8, seed=seed))
        assert all("labels" not in batch for batch in batches)
        return [
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    rows = [row for rank in range(world) for row in drawn(1, rank, world)]
    assert len(rows) == 300
    assert {(row[0], row[-1]) for row in rows} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    assert {len(row) for row in rows} == {3, 4, 5, 6, 7}
    words = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    assert {token for row in rows for token in row[1:-1]} == words
    assert sorted(rows) == sorted(drawn(1))
    assert sorted(rows) != sorted(drawn(2))


@pytest.fixture
def maps(monkeypatch):
    """Counts how often rows are tokenised."""
    calls = []
    original = EncodedRows._encoded

    def counted(self, rows):
        calls.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(EncodedRows, "_encoded", counted)
    return calls


def test_tokenised_rows_are_reused(make_module, make_task, maps, tokenizer):
    task = make_task()
    module = make_module(task)
    module.prepare_data()
    assert len(maps) == 3
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=3)
    again = make_module(task, batch_size=2)
    again.prepare_data()
    again.setup("fit")
    again.test_dataloader()
    assert len(maps) == 3
    assert again.dataset("train").to_list() == module.dataset("train").to_list()


def test_whatever_matters_makes_a_new_file(make_module, make_task, maps, make_other_tokenizer):
    changes = [
        (make_task(), {}),
        (make_task(), {"max_length": 8}),
        (make_task(examples={"train": 5}), {}),
        (make_task(examples={"train": 5}), {"seed": 1}),
        (make_task(classes=["positive", "negative"]), {}),
        (make_task(), {"tokenizer": make_other_tokenizer}),
        (make_task(train=[{"text": "a", "label": 0}]), {}),
    ]
    for count, (task, options) in enumerate(changes, start=1):
        make_module(task, **options).dataset("train")
        if count < len(changes):
            make_task()
        assert len(maps) == count


@pytest.fixture
def make_other_tokenizer():
    backend = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_tokenizer_fingerprint(tokenizer, make_other_tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a"], padding="max_length", truncation=True, max_length=7)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_other_tokenizer) != before
    tokenizer.truncation_side = "left"
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_failed_write_leaves_nothing(make_module, make_task, tmp_path, monkeypatch):
    module = make_module(make_task())
    monkeypatch.setattr(module.encoded, "_encode", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.dataset("train")
    assert list((tmp_path / "cache" / "encoded").iterdir()) == []


def test_rows_are_encoded_and_written_in_parts(make_module, make_task, monkeypatch):
    task = make_task()
    whole = make_module(task).encoded.table("train")
    other = make_module(task.model_copy(update={"name": "other"}))
    monkeypatch.setattr(type(task), "encoded_at_once", 5)
    parts = other.encoded.table("train")
    assert [len(batch) for batch in parts.to_batches()] == [5, 5, 5, 5, 3]
    assert parts.to_pylist() == whole.to_pylist() == make_module(task).dataset("train").to_list()


def test_encoded_rows_take_little_room(make_module, make_task):
    for numbers, kind in ((False, pa.int64()), (True, pa.float32())):
        schema = make_module(make_task(numbers=numbers)).encoded.table("train").schema
        small = {"input_ids": pa.int32(), "token_type_ids": pa.int8(), "attention_mask": pa.int8()}
        lists = {name: pa.list_(found) for name, found in small.items()}
        assert dict(zip(schema.names, schema.types, strict=True)) == {**lists, "labels": kind, "length": pa.int64()}


def test_two_processes_may_tokenise_at_once(make_module, make_task, tmp_path, monkeypatch):
    task = make_task()
    slow, fast = make_module(task), make_module(task)
    original = slow.encoded._make
    read = []

    def overtaken(*args):
        original(*args)
        read.append(fast.dataset("train"))

    monkeypatch.setattr(slow.encoded, "_make", overtaken)
    assert slow.dataset("train").to_list() == read[0].to_list()
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 1


@pytest.mark.parametrize(("stage", "splits"), [("fit", 2), ("validate", 1), ("test", 1), (None, 3)])
def test_a_stage_tokenises_only_its_splits(stage, splits, make_module, make_task, maps):
    module = attach(make_module(make_task()), 1, 0, stage)
    module.prepare_data()
    assert len(maps) == splits


# --- with Lightning --------------------------------------------------------------------------------------------------


class Probe(L.LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"train": [], "val": [], "test": []}
        self.fail_at = fail_at

    def note(self, which, batch):
        self.seen[which].append((self.current_epoch, batch["input_ids"].tolist()))
        return self.layer(batch["labels"][:, None].float()).sum()

    def training_step(self, batch, index):
        if self.global_step == self.fail_at:
            raise RuntimeError("stopped")
        return self.note("train", batch)

    def validation_step(self, batch, index):
        self.note("val", batch)

    def test_step(self, batch, index):
        self.note("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def make_trainer(tmp_path):
    def build(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        fixed = {"devices": 1, "use_distributed_sampler": False, "default_root_dir": tmp_path, "max_epochs": 3}
        return L.Trainer(**{**quiet, **fixed, "num_sanity_val_steps": 0, "enable_checkpointing": False, **options})

    return build


@pytest.mark.filterwarnings("ignore")
def test_lightning_shows_every_epoch_other_batches(make_module, make_task, make_trainer):
    probe, trainer = Probe(), make_trainer()
    trainer.fit(probe, datamodule=make_module(make_task()))
    trainer.test(probe, datamodule=make_module(make_task()), verbose=False)
    by_epoch = [[ids for epoch, ids in probe.seen["train"] if epoch == which] for which in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    assert [sum(map(len, epoch)) for epoch in by_epoch] == [23, 23, 23]
    assert sum(len(ids) for _, ids in probe.seen["val"]) == 3 * 23
    assert sum(len(ids) for _, ids in probe.seen["test"]) == 23


@pytest.fixture
def make_toy(make_module, make_task):
    task = make_task()
    return lambda **options: make_module(task, **options)


# 6 batches an epoch: inside the first and the second epoch, and where one begins.
@pytest.mark.filterwarnings("ignore", "error:.*not resumable")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fail_at", [2, 6, 9, 11, 12])
def test_resuming_after_a_failure_goes_on_with_the_next_batch(fail_at, workers, make_toy, make_trainer, tmp_path):
    whole, half, rest = Probe(), Probe(fail_at), Probe()
    make_trainer().fit(whole, datamodule=make_toy())
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    options = {"callbacks": [saving], "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(**options).fit(half, datamodule=make_toy(num_workers=workers))
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    make_trainer().fit(rest, datamodule=make_toy(num_workers=workers), ckpt_path=newest)
    assert half.seen["train"] + rest.seen["train"] == whole.seen["train"]


@pytest.mark.filterwarnings("ignore", "error:.*not resumable")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}, {"save_on_train_epoch_end": True}])
def test_resuming_from_any_checkpoint_goes_on_with_the_next_batch(when, workers, make_toy, make_trainer, tmp_path):
    whole = Probe()
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
    make_trainer(callbacks=[saving], enable_checkpointing=True).fit(whole, datamodule=make_toy())
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) >= 3
    for path in saved:
        rest = Probe()
        make_trainer().fit(rest, datamodule=make_toy(num_workers=workers), ckpt_path=path)
        done = int(path.stem.removeprefix("step="))
        assert [ids for _, ids in rest.seen["train"]] == [ids for _, ids in whole.seen["train"]][done:]


def test_batches_have_a_mask_though_the_tokenizer_counts_it_not_among_the_inputs(make_module, make_task, tokenizer):
    expected = rows_of(make_module(make_task()).val_dataloader())
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    assert rows_of(make_module(make_task()).val_dataloader()) == expected
