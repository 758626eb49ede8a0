"""Rows of experts matched by token."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pave_lightning.errors import PaveError
from pave_lightning.experts.alignment import Alignment, CommonTokens, alignment_notes, common_tokens, output_tables
from pave_lightning.weights import Architecture

BASE = ["<pad>", "<s>", "</s>", "a", "b", "c"]


def test_tokens_in_common():
    base = {"a": 0, "b": 1}
    experts = {"first": {"z": 0, "a": 1, "y": 2}, "second": {"x": 5, "y": 0}}
    assert common_tokens("base_rows", base, 4, experts) == CommonTokens(base, 4)
    found = common_tokens("union", base, 4, experts)
    assert found.new == ("z", "y", "x")  # by task, then by number
    assert found.numbers == {"a": 0, "b": 1, "z": 4, "y": 5, "x": 6}
    assert found.sources(experts["second"]).tolist() == [-1, -1, -1, -1, -1, 0, 5]


def test_what_is_told():
    tokens = CommonTokens({"a": 0, "b": 1, "c": 2}, 3)
    told = list(alignment_notes(tokens, {"same": {"a": 0, "b": 1, "c": 2}, "other": {"a": 1, "b": 0, "z": 2}}))
    assert told == [
        "task 'other': rows of its expert are matched by token: 2 tokens with another number, 1 token dropped ('z'), "
        "1 token of the base missing, whose rows count as unchanged"
    ]
    (new,) = alignment_notes(CommonTokens({"a": 0}, 1, ("y", "z")), {})
    assert new == "the merged model has 2 new tokens: 'y', 'z'"


def tokenizer_of(tokens):
    backend = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def write(tmp_path):
    """A tiny language model with these tokens and its tokenizer."""

    def build(name, tokens, *, tied=False, rows=None, seed=0):
        numbers = {token: row for row, token in enumerate(tokens)}
        config = LlamaConfig(
            vocab_size=rows or len(tokens),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=numbers["<pad>"],
            bos_token_id=numbers["<s>"],
            eos_token_id=[numbers["</s>"], numbers["<s>"]],
            tie_word_embeddings=tied,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        tokenizer_of(tokens).save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def aligned(vocabulary, base, experts, tmp_path):
    architecture = Architecture.of_folder(base)
    found = Alignment(vocabulary, architecture.checkpoint(base), architecture, experts)
    for task in experts:
        (tmp_path / vocabulary / task).mkdir(parents=True)
        found.write(task, tmp_path / vocabulary / task)
    return tmp_path / vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_an_aligned_language_model_says_the_same(write, tmp_path, tied):
    base = write("base", BASE, rows=8)
    own = ["b", "</s>", "z", "a", "<pad>", "<s>", "y", "c"]
    other = ["y", *BASE]
    experts = {"one": write("one", own, tied=tied, seed=1), "two": write("two", other, tied=tied, seed=2)}
    place = aligned("union", base, experts, tmp_path) / "one"
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (experts["one"], place))
    reads, read = (AutoTokenizer.from_pretrained(folder) for folder in (experts["one"], place))
    text = "<s> a z c b a </s>"
    numbers = read.get_vocab()
    assert numbers == {**{token: row for row, token in enumerate(BASE)}, "z": 8, "y": 9}
    assert after.config.vocab_size == 10
    assert (after.config.pad_token_id, after.config.bos_token_id, after.config.eos_token_id) == (0, 1, [2, 1])
    old = before(**reads(text, return_tensors="pt", return_token_type_ids=False)).logits
    new = after(**read(text, return_tensors="pt", return_token_type_ids=False)).logits
    shared = [token for token in own if token != "y"]  # of y the two experts have the mean
    assert torch.allclose(old[..., [own.index(t) for t in shared]], new[..., [numbers[t] for t in shared]], atol=1e-6)
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        first, second, found = (load_file(f / "model.safetensors")[name] for f in (*experts.values(), place))
        assert torch.allclose(found[9], (first[6] + second[0]) / 2)


def test_rows_that_the_expert_lacks_are_the_bases(write, tmp_path):
    base = write("base", BASE, rows=8)
    experts = {"one": write("one", ["</s>", "c", "<s>", "<pad>", "z"], seed=1)}
    place = aligned("base_rows", base, experts, tmp_path) / "one"
    of_base, own, found = (load_file(folder / "model.safetensors") for folder in (base, experts["one"], place))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = of_base[name].clone()
        for token, row in (("<pad>", 3), ("<s>", 2), ("</s>", 0), ("c", 1)):
            expected[BASE.index(token)] = own[name][row]
        assert torch.equal(found[name], expected)
    assert all(torch.equal(own[n], found[n]) for n in own if n not in ("model.embed_tokens.weight", "lm_head.weight"))
    assert AutoTokenizer.from_pretrained(place).get_vocab() == {token: row for row, token in enumerate(BASE)}


def test_an_output_layer_that_the_base_lacks(write, tmp_path):
    base = write("base", BASE)
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(base)
    experts = {"one": write("one", [*BASE[:-1][::-1], "z"], seed=1)}
    place = aligned("base_rows", base, experts, tmp_path) / "one"
    own, found = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (experts["one"], place))
    assert torch.equal(found[:5], own[:5].flip(0))
    assert torch.allclose(found[5], own.mean(dim=0))


def test_names_of_output_layers():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    found = output_tables(BertForMaskedLM(BertConfig(vocab_size=10, **sizes)))
    assert {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} <= set(found)


def test_a_token_of_the_configuration_that_is_dropped(write, tmp_path):
    base = write("base", BASE)
    expert = write("one", ["z", *BASE], seed=1)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    place = aligned("base_rows", base, {"one": expert}, tmp_path) / "one"
    assert json.loads((place / "config.json").read_text())["pad_token_id"] == 0  # the base's own


def test_tokenizers_that_cannot_be_joined(write, tmp_path):
    base, expert = write("base", BASE), write("one", [*BASE, "z"], seed=1)
    backend = Tokenizer(models.BPE({token: row for row, token in enumerate([*BASE, "z"])}, []))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(expert)
    with pytest.raises(PaveError, match=r"task 'one': vocabulary: union cannot join its tokenizer, a BPE, with the"):
        aligned("union", base, {"one": expert}, tmp_path)
