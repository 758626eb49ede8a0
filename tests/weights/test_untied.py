"""Language models whose checkpoints tie the head to the embedding, or do not, or both."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pave_lightning import load_merged, merge, task_vectors
from pave_lightning.merging import make_method
from pave_lightning.merging.folders import MergeContext, write_merged

SMALL = {"vocab_size": 20, "num_attention_heads": 2}
LLAMA = {**SMALL, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
T5 = {**T5, "decoder_start_token_id": 0}


def noisy(model, seed):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.fixture
def llama(tmp_path):
    """Write a tiny Llama, tied or not, and give its folder."""

    def write(name, seed, *, tied):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
        noisy(model, seed).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def flan(tmp_path):
    """Write a tiny T5 whose file has a head of its own, though its configuration ties it, as Flan-T5's does."""

    def write(name, seed):
        torch.manual_seed(0)
        model = noisy(hf.T5ForConditionalGeneration(hf.T5Config(**T5)), seed)
        folder = tmp_path / name
        model.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        head = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed + 10))
        save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return write


def merged_folder(tmp_path, source, base):
    folder = tmp_path / "merged"
    folder.mkdir()
    checkpoints = {task: source.checkpoint(task) for task in source.tasks}
    context = MergeContext(base, source.architecture.checkpoint(base), checkpoints, source.architecture, {})
    write_merged(folder, make_method("average", {}), source, None, context)
    return folder


def test_an_untied_head_is_merged(llama):
    source = task_vectors(llama("base", 0, tied=False), {t: llama(t, s, tied=False) for s, t in enumerate("ab", 1)})
    head = next(parameter for parameter in source.parameters if parameter.name == "lm_head.weight")
    assert head.is_matrix
    found = merge("average", source).vectors["lm_head.weight"]
    torch.testing.assert_close(found, (source.vector("a", head) + source.vector("b", head)) / 2)


def test_a_tied_head_is_the_embedding(llama):
    source = task_vectors(llama("base", 0, tied=True), {t: llama(t, s, tied=True) for s, t in enumerate("ab", 1)})
    assert not any("lm_head" in parameter.name for parameter in source.parameters)


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_of_tied_and_untied_checkpoints_the_tied_ones_have_their_embedding_as_head(llama, base_is_tied):
    base, one = llama("base", 0, tied=base_is_tied), llama("a", 1, tied=False)
    source = task_vectors(base, {"a": one, "b": llama("b", 2, tied=True)})
    parameters = {parameter.name: parameter for parameter in source.parameters}
    head, table = parameters["lm_head.weight"], parameters["model.embed_tokens.weight"]
    assert torch.equal(source.expert("b", head), source.expert("b", table))
    assert not torch.equal(source.expert("a", head), source.expert("a", table))
    assert torch.equal(source.base(head), source.base(table)) is base_is_tied


def test_a_file_with_a_head_of_its_own_is_untied_whatever_its_configuration_says(flan, tmp_path):
    base = flan("base", 0)
    source = task_vectors(base, {"a": flan("a", 1), "b": flan("b", 2)})
    folder = merged_folder(tmp_path, source, base)
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in "ab"}
    expected = (stored["a"]["lm_head.weight"] + stored["b"]["lm_head.weight"]) / 2
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    for model in (hf.T5ForConditionalGeneration.from_pretrained(folder), load_merged(folder, "a")):
        torch.testing.assert_close(model.lm_head.weight.data, expected)
        shared = (stored["a"]["shared.weight"] + stored["b"]["shared.weight"]) / 2
        torch.testing.assert_close(model.shared.weight.data, shared)
        assert model.decoder.embed_tokens.weight is model.shared.weight
