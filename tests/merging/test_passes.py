"""Walking through real, tiny models block by block."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from pave_lightning.errors import PaveError
from pave_lightning.merging.passes import BlockStack, load_parameters, share_parameters, watched
from pave_lightning.weights import Parameter, ParameterKind

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
BACKBONES = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, pad_token_id=0)),
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=20)),
}


@pytest.fixture
def batch():
    lengths = torch.tensor([5, 7, 2])
    mask = torch.arange(7) < lengths[:, None]
    return {"input_ids": torch.randint(3, 40, (3, 7)) * mask, "attention_mask": mask.long()}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    return BACKBONES[request.param]().eval()


@torch.no_grad()
def test_walking_is_what_the_model_does(backbone, batch):
    stack = BlockStack(backbone)
    stack.check(batch)
    entry = stack.enter(batch)
    for block in stack.blocks:
        entry.hidden = stack.run(block, entry)
    # GPT-2 normalises once more behind its blocks.
    final = getattr(backbone, "ln_f", nn.Identity())(entry.hidden)
    expected = backbone(**batch).last_hidden_state
    assert torch.allclose(entry.rows(final), entry.rows(expected), atol=1e-5)
    assert len(entry.rows(final)) == 5 + 7 + 2
    parameters = [Parameter(name, ParameterKind.OTHER, ()) for name, _ in backbone.named_parameters()]
    own = stack.own(1, parameters)
    assert set(own) == {name for name, _ in stack.blocks[1].named_parameters()}
    assert all(parameter.name == f"{stack.path}.1.{name}" for name, parameter in own.items())


@torch.no_grad()
@pytest.mark.parametrize(("name", "last"), [("bert", False), ("gpt2", True)])
def test_which_token_heads_read(name, last, batch):
    torch.manual_seed(0)
    stack = BlockStack(BACKBONES[name]().eval())
    assert stack.reads_last(batch) is last
    read = stack.enter(batch).read_rows(last=last)
    assert read.nonzero().flatten().tolist() == ([4, 11, 13] if last else [0, 5, 12])


@torch.no_grad()
def test_inputs_of_layers_and_norms_are_seen(batch):
    torch.manual_seed(0)
    backbone = BACKBONES["bert"]().eval()
    stack = BlockStack(backbone)
    assert stack.path == "encoder.layer"
    entry = stack.enter(batch)
    with watched(stack.blocks[0]) as seen:
        stack.run(stack.blocks[0], entry)
    assert set(seen.inputs) == {
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"),
        *("output.dense", "output.LayerNorm"),
    }
    assert set(seen.outputs) == {"attention.output.LayerNorm", "output.LayerNorm"}
    assert seen.inputs["attention.self.query"] is seen.inputs["attention.self.value"] is entry.hidden
    assert seen.inputs["output.dense"].shape == (3, 7, 24)
    assert not stack.blocks[0].attention.self.query._forward_hooks, "no hook is left behind"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bert", {"attention.self.query", "attention.self.key", "attention.self.value"}),
        ("gpt2", {"ln_1", "attn.c_attn"}),  # behind the norm with which the block begins
    ],
)
def test_what_a_block_itself_is_given(name, given, batch):
    torch.manual_seed(0)
    stack = BlockStack(BACKBONES[name]().eval())
    entry = stack.enter(batch)
    with watched(stack.blocks[0]) as seen:
        stack.run(stack.blocks[0], entry)
    assert {layer for layer, inputs in seen.inputs.items() if seen.is_given(inputs, entry.hidden)} == given


@torch.no_grad()
def test_blocks_that_are_run_several_times_are_refused(batch):
    model = AlbertModel(AlbertConfig(**SIZES, embedding_size=16)).eval()
    with pytest.raises(PaveError, match=r"does more than run the blocks of encoder\.albert_layer_groups"):
        BlockStack(model).check(batch)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(PaveError, match="Linear has no list of like blocks"):
        BlockStack(nn.Linear(2, 2))


def test_parameters_are_copied_in():
    layer = nn.Linear(2, 2)
    load_parameters(layer, {"weight": torch.ones(2, 2)})
    assert (layer.weight == 1).all()
    with pytest.raises(PaveError, match="Linear knows 1 weights by other names than checkpoints do, such as nothing"):
        load_parameters(layer, {"nothing": torch.ones(2), "weight": torch.zeros(2, 2)})
    assert (layer.weight == 1).all(), "nothing is half loaded"


def test_shared_parameters_stay_tied_and_are_one_for_all_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.out.weight = self.words.weight
            self.other = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

    shared = {"words.weight": nn.Parameter(torch.randn(4, 3)), "mean": nn.Parameter(torch.ones(3))}
    modules = [Tied(), Tied()]
    own = modules[0].other.weight
    for module in modules:
        share_parameters(module, shared)
        assert module.words.weight is module.out.weight is shared["words.weight"]
        assert torch.equal(module.mean, torch.ones(3))
        assert not module.mean.requires_grad
    assert modules[0].other.weight is own
    with pytest.raises(PaveError, match="knows 1 weights by other names than checkpoints do, such as absent"):
        share_parameters(modules[0], {"absent": nn.Parameter(torch.zeros(1))})
