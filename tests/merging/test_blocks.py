"""Walking through real, tiny models block by block."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from pave_lightning.errors import PaveError
from pave_lightning.merging.blocks import BlockStack, Entry, watched
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
    for index in range(len(stack.blocks)):
        stack.advance(index, [entry])
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
    assert seen.inputs["attention.self.query"][0] is seen.inputs["attention.self.value"][0] is entry.hidden
    assert [tensor.shape for tensor in seen.inputs["output.dense"]] == [(3, 7, 24)]
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
    assert {layer for layer, calls in seen.inputs.items() if seen.is_given(calls[0], entry.hidden)} == given


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_seen_twice(batch):
    """DeBERTa-v3 projects hidden states and relative positions with the same weights."""
    config = DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4
    )
    stack = BlockStack(DebertaV2Model(config).eval())
    entry = stack.enter(batch)
    with watched(stack.blocks[0]) as seen:
        stack.run(stack.blocks[0], entry)
    hidden, positions = seen.inputs["attention.self.query_proj"]
    assert hidden is entry.hidden
    assert positions.shape == (1, 8, 16)


def test_rows_are_the_real_tokens():
    mask = torch.tensor([[True, True, False], [False, True, False]])
    entry = Entry(torch.zeros(2, 3, 4), [], mask)
    values = torch.arange(24.0).reshape(2, 3, 4)
    real = [[0, 1, 2, 3], [4, 5, 6, 7], [16, 17, 18, 19]]
    assert entry.rows(values).tolist() == real
    assert entry.rows(values.reshape(6, 4)).tolist() == real, "a batch that was flattened into its tokens"
    assert entry.rows(values.reshape(2, 3, 2, 2)).reshape(3, 4).tolist() == real, "heads of a token are rows"
    assert len(entry.rows(torch.zeros(5, 4))) == 5, "what is no token counts as it is"
    assert entry.read_rows(last=False).tolist() == [True, False, True]
    assert entry.read_rows(last=True).tolist() == [False, True, True]


class Chain(nn.Module):
    """Three linear blocks; subclasses do something that a walk cannot do."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 4)
        self.layers = nn.ModuleList([Step() for _ in range(3)])

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = self.step(layer, hidden)
        return hidden

    def step(self, layer, hidden):
        return layer(given=hidden)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, given, shift=None):
        return self.dense(given) + (0 if shift is None else shift)


class Scaled(Chain):
    def step(self, layer, hidden):
        return layer(2 * hidden)


class Reversed(Chain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Step(), Step()])

    def forward(self, input_ids, attention_mask=None):
        return self.layers[0](self.layers[1](self.words(input_ids)))


class Shifted(Chain):
    """Each block but the first is given the mean of its input besides."""

    def forward(self, input_ids, attention_mask=None):
        hidden, shift = self.words(input_ids), None
        for layer in self.layers:
            hidden = layer(hidden, shift)
            shift = hidden.mean()
        return hidden


class Beside(Chain):
    def __init__(self):
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, input_ids, attention_mask=None):
        return self.small[0](super().forward(input_ids))


class Changing(Chain):
    """Each pass through a block changes it."""

    def step(self, layer, hidden):
        found = layer(hidden)
        layer.dense.bias += 1
        return found


def test_a_chain_is_walked_through_however_it_is_called(batch):
    BlockStack(Chain()).check(batch)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, r"the input of layers\.1 is not just the output of the block before"),
        (Reversed, r"it does not run each block of layers once and in order \(it has 2 of them and makes 2 calls\)"),
        (Shifted, r"what it gives to layers\.1 depends on more than the hidden states"),
        (Beside, "it runs the blocks of small beside those of layers"),
        (Changing, "running the blocks of layers one after the other gives other outputs than it does"),
    ],
)
def test_what_is_no_chain_is_refused(kind, reason, batch):
    torch.manual_seed(0)
    stack = BlockStack(kind())
    with pytest.raises(PaveError, match=f"{kind.__name__} cannot be calibrated block by block: {reason}; choose a"):
        stack.check(batch)
    assert not any("forward" in vars(block) for block in stack.blocks), "the blocks are left as they were"


@torch.no_grad()
def test_blocks_that_are_run_several_times_are_refused(batch):
    model = AlbertModel(AlbertConfig(**SIZES, embedding_size=16)).eval()
    with pytest.raises(PaveError, match=r"encoder\.albert_layer_groups .*has 1 of them and makes 3 calls"):
        BlockStack(model).check(batch)


def test_a_model_that_cannot_be_run_on_examples_is_refused():
    stack = BlockStack(Chain())
    with pytest.raises(PaveError, match=r"cannot be run so on a task's examples .*keyword argument 'image'"):
        stack.check({"image": torch.zeros(1, 2)})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(PaveError, match=r"Linear cannot be calibrated .* it has no stack of identical blocks"):
        BlockStack(nn.Linear(2, 2))
