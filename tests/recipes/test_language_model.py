"""The recipe of language models, on a tiny stand-in of SmolLM2 and few rows."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pave_lightning import load_recipe, run_recipe
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.suites import INSTRUCTIONS_FOLDER

RECIPE = Path(__file__).parents[2] / "recipes" / "language_model.yaml"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A tiny random Llama that reads bytes, with the chat marks of SmolLM2 as special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Bytes
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, special = tmp_path_factory.mktemp("smollm"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Bytes()
    texts = pq.read_table(INSTRUCTIONS_FOLDER / "record" / "validation.parquet").column("prompt").to_pylist()
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 512}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    return folder


@pytest.fixture
def cut_down(stand_in, tmp_path, tracking_uri):
    """The recipe with few rows."""
    return load_recipe(
        RECIPE,
        [
            f"base={stand_in}",
            f"output={tmp_path / 'runs'}",
            f"tracking.uri={tracking_uri}",
            "examples={train: 32, validation: 6, test: 8}",
            "capture.examples=8",
            "trainer={accelerator: cpu, max_epochs: 1, enable_progress_bar: false}",
            # What a random model writes is never right.
            *(f"tasks.{name}.metrics=[chrf]" for name in ("arithmetic", "definition", "order", "record")),
            *(f"merge.{name}.scale=0.4" for name in ("task_arithmetic", "ties", "dare", "tsv_m", "iso_c")),
        ],
    )


def test_the_recipe_can_be_planned(cut_down, tmp_path):
    check_recipe(cut_down, RunFolder(tmp_path / "plan"))


@pytest.mark.slow
def test_the_recipe_runs(cut_down):
    folder = run_recipe(cut_down)
    table = list(csv.DictReader((folder / "results.csv").open()))
    methods = {step.method for step in cut_down.merge}
    assert len(methods) >= 6
    assert {(row["model"], row["vectors"]) for row in table} >= {
        (method, vectors) for method in methods for vectors in ("plain", "purified")
    }
    for row in table:
        assert all(np.isfinite(float(row[f"{task.name}/chrf"])) for task in cut_down.tasks)
