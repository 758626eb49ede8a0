"""Options of adapters that cannot work on a base are told by a plan, in words that say what to do."""

import pytest

from pave_lightning.pipeline.planning.lora import lora_problems
from pave_lightning.tasks.options import Lora
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture

SEQ = "AutoModelForSequenceClassification"


@pytest.fixture
def told(base_folder, task_files):
    def run(options, **training):
        task = Task.model_validate(
            {"name": "words", "data": task_files(), "text": "text", "classes": 2, "training": training}
        )
        found = lora_problems(task, Lora.model_validate(options), Architecture.of_folder(base_folder, SEQ), base_folder)
        start = "task 'words': training.lora."
        lines = list(found)
        assert all(line.startswith((start, "task 'words': training.lora: ")) for line in lines)
        return [line.removeprefix(start) for line in lines]

    return run


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target_modules": ["queri"]}, "target_modules: no layer 'queri'; did you mean 'query'?"),
        (
            {"target_modules": ["LayerNorm"]},
            "target_modules: 'LayerNorm' is neither a linear layer, a convolution nor an embedding, so it has no "
            "factors; name the layers in it, or train it whole with modules_to_save",
        ),
        ({"exclude_modules": ["valu"]}, "exclude_modules: no module 'valu'; did you mean 'value'?"),
        (
            {"layers_to_transform": [1, 2, 5]},
            "layers_to_transform: no layer 2, 5; the base has layers 0 to 1",
        ),
        ({"rank_pattern": {"layer.7": 4}}, "rank_pattern: 'layer.7' fits no adapted module; known are: "),
        ({"alpha_pattern": {"vaule": 4}}, "alpha_pattern: 'vaule' fits no adapted module; did you mean 'value'?"),
        ({"rank": 40}, "rank is 40, but no layer that it adapts has more than 32 directions; lower it"),
        ({"rank_pattern": {"query": 40}}, "rank_pattern is 40, but no layer that it adapts has more than 32"),
        (
            {"modules_to_save": ["classifier"]},
            "modules_to_save: 'classifier' is of the head, which is trained whole in any case; leave it out",
        ),
        ({"modules_to_save": ["Layernorm"]}, "modules_to_save: no module 'Layernorm'; did you mean 'LayerNorm'?"),
        (
            {"trainable_token_indices": [3, 100]},
            "trainable_token_indices: 100 is beyond the base's 100 tokens (0 to 99)",
        ),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["word_embeddings"]},
            "trainable_token_indices: the token embedding is frozen, adapted, or trained whole already",
        ),
        (
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
            "target_parameters: no parameter 'experts.gate_up_proj'",
        ),
        (
            {"init_lora_weights": "pissa", "target_modules": ["word_embeddings", "query"]},
            "init_lora_weights: pissa starts linear layers only, and target_modules names embeddings.word_embeddings",
        ),
        (
            {"target_modules": ["query"], "exclude_modules": ["self"], "modules_to_save": ["self"]},
            "target_modules: no module is left to adapt",
        ),
    ],
)
def test_what_cannot_work(told, options, problem):
    (line,) = told(options)
    assert line.startswith(problem)


def test_all_is_told_at_once(told):
    lines = told({"target_modules": ["queri", "value"], "modules_to_save": ["classifier"], "rank_pattern": {"x": 2}})
    assert [line.partition(":")[0] for line in lines] == ["target_modules", "rank_pattern", "modules_to_save"]


def test_frozen_modules(told):
    freeze = ["encoder", "pooler", "embeddings"]
    assert "no module is left to adapt" in told({}, freeze=freeze)[0]
    (line,) = told({"target_modules": ["query"], "modules_to_save": ["embeddings"]}, freeze=["embeddings"])
    assert "'embeddings' is frozen by training.freeze" in line


def test_what_only_peft_knows_is_told_too(told):
    (line,) = told({"init_lora_weights": "orthogonal", "rank": 3})
    assert "even" in line


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": ["query", "word_embeddings"], "bias": "all"},
        {"modules_to_save": ["LayerNorm"], "trainable_token_indices": [0, 99]},
        {"init_lora_weights": "pissa_niter_4", "rank_pattern": {r"layer\.1\..*": 4}},
    ],
)
def test_what_works(told, options):
    assert told(options) == []
