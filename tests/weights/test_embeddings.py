"""Token embeddings of experts with other rows than their base."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CanineConfig,
    CanineModel,
    GemmaConfig,
    GemmaModel,
    T5Config,
    T5Model,
)

from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors
from pave_lightning.weights.embeddings import reading, resize_rows, share_rows, token_embeddings, tokens_beyond
from pave_lightning.weights.task_vectors import differences, own_token_rows

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 12}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "gemma": lambda: GemmaModel(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=4)),
    "t5": lambda: T5Model(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
    "bart": lambda: BartModel(
        BartConfig(**BART, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, scale_embedding=True)
    ),
}


@pytest.fixture
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().eval()


def out(model, ids):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).last_hidden_state


every_family = pytest.mark.parametrize("model", MODELS, indirect=True)


def test_which_weight_it_is():
    assert token_embeddings(MODELS["bert"]()) == ["embeddings.word_embeddings.weight"]
    shared = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert token_embeddings(MODELS["t5"]()) == token_embeddings(MODELS["bart"]()) == shared
    small = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    assert token_embeddings(CanineModel(CanineConfig(**small))) == []


@every_family
def test_a_model_reads_its_own_tokens_above_the_shared_rows(model):
    ids = torch.tensor([[3, 11, 4, 10], [9, 1, 2, 5]])
    before, table = out(model, ids), model.get_input_embeddings().weight.detach().clone()
    share_rows(model, 10)
    assert model.get_input_embeddings().weight.shape == (10, 8)
    assert model.config.vocab_size == 10
    assert sum(len(value) == 12 for value in model.parameters()) == 0
    torch.testing.assert_close(out(model, ids), before, rtol=0, atol=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    assert not torch.equal(out(model, ids)[0], before[0])
    assert torch.equal(out(model, ids)[1], before[1]) == (3 not in ids[1])
    assert torch.equal(model.get_input_embeddings().weight[4:], table[4:10])


@every_family
def test_tokens_of_one_task_at_a_time(model):
    own = tokens_beyond(model, 10)
    ids = torch.tensor([[3, 11, 4, 10]])
    before = out(model, ids)
    resize_rows(model, 10)
    with reading(model, own):
        torch.testing.assert_close(out(model, ids), before, rtol=0, atol=0)
    with pytest.raises(IndexError):
        out(model, ids)
    assert torch.equal(own.shared(ids), torch.tensor([[3, 0, 4, 0]]))


@every_family
def test_growing_keeps_what_was_there(model):
    ids = torch.tensor([[3, 11, 4, 10]])
    before = out(model, ids)
    resize_rows(model, 20)
    assert len({value.data_ptr() for value in map(model.get_parameter, token_embeddings(model))}) == 1
    assert (model.get_input_embeddings().weight[12:] == 0).all()
    torch.testing.assert_close(out(model, ids), before, rtol=0, atol=0)
    assert tokens_beyond(model, 20) is None


@pytest.mark.parametrize("rows", [9, 12, 15])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_task_vectors_have_the_bases_rows(family, rows, tmp_path):
    torch.manual_seed(1)
    base, expert = MODELS[family](), MODELS[family]()
    resize_rows(expert, rows)
    name = token_embeddings(base)[0]
    with torch.no_grad():
        expert.get_parameter(name)[12:].normal_()
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    architecture = Architecture.of_folder(tmp_path / "expert")
    stored = [Checkpoint(tmp_path / place, architecture.prefix) for place in ("base", "expert")]
    assert differences("task", *stored, architecture) == []
    source = ExpertTaskVectors(stored[0], {"task": stored[1]}, architecture)
    (parameter,) = [found for found in source.parameters if found.name == name]
    assert parameter.shape == (12, 8)
    expected = torch.zeros(12, 8)
    kept = min(rows, 12)
    expected[:kept] = expert.get_parameter(name).detach()[:kept] - base.get_parameter(name).detach()[:kept]
    assert torch.equal(source.vector("task", parameter), expected)
    for part in (slice(0, 5), slice(7, 11), slice(10, 12)):
        assert torch.equal(source.vector("task", parameter, part), expected[part])
    own = own_token_rows(*stored, architecture)
    if rows > 12:
        assert torch.equal(own[name], expert.get_parameter(name).detach()[12:])
    else:
        assert own == {}


def test_a_backbone_with_added_tokens_alone_is_the_bases(tmp_path):
    base = MODELS["bert"]()
    base.save_pretrained(tmp_path / "base")
    resize_rows(base, 20)
    base.save_pretrained(tmp_path / "longer")
    stored = [Checkpoint(tmp_path / place, "bert") for place in ("base", "longer")]
    assert stored[1].has_backbone_of(stored[0])
    with torch.no_grad():
        base.embeddings.word_embeddings.weight[11] += 1
    base.save_pretrained(tmp_path / "tuned")
    assert not Checkpoint(tmp_path / "tuned", "bert").has_backbone_of(stored[0])
