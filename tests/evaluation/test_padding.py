"""A text's logits do not depend on what else stands in its batch, whatever the model and the tokenizer's side."""

import json

import pytest
import torch
import transformers as hf

from pave_lightning import Task
from pave_lightning.evaluation import CheckpointCandidate, Evaluator, SuiteData
from pave_lightning.experts.loading import load_expert
from pave_lightning.experts.task_expert import TaskExpert
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.tokenizers import load_tokenizer, padding_id
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.empty_models import read_config

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
LLAMA = {**SIZES, "num_key_value_heads": 1}
FAMILIES = {
    "bert": lambda: hf.BertConfig(**SIZES, pad_token_id=0),
    "roberta": lambda: hf.RobertaConfig(**SIZES, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, vocab_size=100),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "bloom": lambda: hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=100),
    "opt": lambda: hf.OPTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        vocab_size=100,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
        pad_token_id=0,
    ),
    "xlnet": lambda: hf.XLNetConfig(
        vocab_size=100, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0, bos_token_id=2, eos_token_id=3
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=100,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    ),
    "bart": lambda: hf.BartConfig(
        vocab_size=100,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    ),
}


@pytest.fixture
def task(task_files):
    return Task(name="words", data=task_files(), text="text", classes=["low", "high"])


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """Write a random expert of a family, whose tokenizer pads on a side, with a token of its own or with the last."""

    def build(family, side, own_token=True):
        config = FAMILIES[family]()
        config.id2label, config.label2id = {0: "low", 1: "high"}, {"low": 0, "high": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hf.AutoModelForSequenceClassification.from_config(config)
            for parameter in model.parameters():
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path / f"{family}-{side}"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"padding_side": side, "model_input_names": ["input_ids", "attention_mask"]}
        if family == "qwen2":  # its class splits texts into bytes, whatever tokenizer.json says
            (folder / "tokenizer.json").unlink()
            letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"w0123456789", "\u0120"]
            (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
            (folder / "merges.txt").write_text("#version: 0.2\n")
            settings |= {"tokenizer_class": "Qwen2Tokenizer"}
        if not own_token:
            settings["eos_token"] = settings.pop("sep_token")
            del settings["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return build


def data_of(task, folder, batch_size, tmp_path):
    tokenizer = load_tokenizer(folder)
    padding = padding_id(read_config(folder), tokenizer)
    task = task.model_copy(update={"training": task.training.model_copy(update={"max_length": 20})})
    return TaskDataModule(task, tokenizer, seed=0, cache_dir=tmp_path / "cache", batch_size=batch_size, padding=padding)


def by_text(logits, batches):
    """The logits by what stands in each row; rows come in another order in other batches."""
    found = {}
    for values, batch in zip(logits, batches, strict=True):
        for row, ids, mask in zip(values, batch["input_ids"], batch["attention_mask"], strict=True):
            found[tuple(ids[mask.bool()].tolist())] = row
    return found


def same(alone, together):
    assert len(alone) > 20
    assert alone.keys() == together.keys()
    for text, row in alone.items():
        torch.testing.assert_close(together[text], row, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_the_batch(family, side, make, task, tmp_path):
    folder = make(family, side)
    expert = TaskExpert(load_expert(folder, task), task)
    found = []
    for batch_size in (1, 8):
        batches = list(data_of(task, folder, batch_size, tmp_path).test_dataloader())
        assert batch_size == 1 or any((batch["attention_mask"] == 0).any() for batch in batches)
        found.append(by_text([expert(batch) for batch in batches], batches))
    same(*found)


class Keeping(Evaluator):
    """Keeps the logits of every batch."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.kept.append((self._models[0](**inputs).logits, batch))
        super().test_step(batch, batch_idx, dataloader_idx)


@pytest.mark.parametrize("own_token", [True, False], ids=["a token of its own", "the end-of-text token"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "xlnet"])
def test_nor_do_the_evaluators(family, own_token, make, task, tmp_path):
    folder = make(family, "left", own_token)
    checkpoint = Checkpoint(folder, Architecture.of_folder(folder).prefix)
    found = []
    for batch_size in (1, 8):
        evaluator = Keeping([task], {"words": checkpoint}, checkpoint)
        evaluator.kept = []
        trainer = build_trainer({"accelerator": "cpu", "enable_progress_bar": False}, root=tmp_path)
        data = SuiteData([data_of(task, folder, batch_size, tmp_path)], "test")
        evaluator.score(CheckpointCandidate(checkpoint), data, trainer)
        found.append(by_text(*zip(*evaluator.kept, strict=True)))
    same(*found)


def test_the_last_token_of_a_text_is_read_where_it_also_pads(make, task, tmp_path):
    folder = make("gpt2", "left", own_token=False)
    module = data_of(task, folder, 8, tmp_path)
    batch = next(iter(module.test_dataloader()))
    # Every text ends with [SEP], which is token 3 and pads here.
    lengths = batch["attention_mask"].sum(dim=1)
    assert (batch["input_ids"] == 3).sum() > (batch["attention_mask"] == 0).sum()
    for row, length in zip(batch["input_ids"], lengths, strict=True):
        assert row[length - 1] == 3
        assert (row[length:] == 3).all()
