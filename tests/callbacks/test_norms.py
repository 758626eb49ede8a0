"""Mean squares of what the scales of norms multiply."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError

torch.set_num_threads(1)
WIDTH = 6


@pytest.fixture
def capture(capture_with: Any) -> Any:
    return capture_with(rows=None, norms=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator)
    return drawn * torch.linspace(0.5, 3, shape[-1]) + torch.linspace(-2, 1, shape[-1])


def shuffled(module: nn.Module) -> nn.Module:
    for index, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(random(*parameter.shape, seed=index + 1) + 0.3)
    return module


def expected(rows: Tensor, eps: float, *, centred: bool) -> Tensor:
    """Mean over rows of what each channel is after normalisation, from its definition in float64."""
    rows = rows.double()
    rows = rows - rows.mean(dim=1, keepdim=True) if centred else rows
    size = (rows * rows).mean(dim=1, keepdim=True) + eps
    return (rows * rows / size).mean(dim=0).float()


def beside_a_layer(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(norm, nn.Linear(WIDTH, 2))


@pytest.mark.parametrize(
    ("norm", "eps", "centred"),
    [
        (nn.LayerNorm(WIDTH, eps=0.5), 0.5, True),
        (nn.LayerNorm(WIDTH, eps=0.5, bias=False), 0.5, True),
        (nn.RMSNorm(WIDTH, eps=0.5), 0.5, False),
        (LlamaRMSNorm(WIDTH, eps=0.5), 0.5, False),
        (GemmaRMSNorm(WIDTH, eps=0.5), 0.5, False),
    ],
)
def test_as_the_definition_whatever_scale_and_shift(
    norm: nn.Module, eps: float, centred: bool, capture: Any, running: Any
) -> None:
    data = [random(3, 4, WIDTH, seed=index) for index in range(3)]
    callback = capture(running(beside_a_layer(shuffled(norm))), data)
    found = callback.statistics.norms["0"]
    rows = torch.cat([batch.reshape(-1, WIDTH) for batch in data])
    torch.testing.assert_close(found.squares, expected(rows, eps, centred=centred))
    assert (found.rows, found.seen) == (36, 36)
    assert callback.unreached_norms == []
    assert callback.statistics.layers() == ["1"]


def test_padding_is_left_out_and_the_sample_is_that_of_the_layers(capture: Any, running: Any) -> None:
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    torch.manual_seed(0)
    bert = shuffled(BertModel(config))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = {"input_ids": torch.randint(1, 50, (3, 4)), "attention_mask": mask}
    kept: list[Tensor] = []
    handle = bert.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda _, args, __: kept.append(args[0]))
    module = running(bert, lambda net, batch: net(**batch))
    everything = capture(module, [batch])
    handle.remove()
    rows = kept[0][mask.bool()]
    found = everything.statistics.norms["encoder.layer.0.output.LayerNorm"]
    torch.testing.assert_close(found.squares, expected(rows, config.layer_norm_eps, centred=True), rtol=1e-4, atol=1e-5)
    assert found.rows == found.seen == 8
    names = ["embeddings.LayerNorm", "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"]
    assert list(everything.statistics.norms) == names

    sampled = capture(module, [batch], rows=3, keep_rows=True, moments="input")
    # What the first norm puts out is what the query looks at: the three rows that it keeps tell which were counted.
    norm, query = sampled.statistics.norms[names[0]], sampled.statistics["encoder.layer.0.attention.self.query"]
    assert (norm.rows, norm.seen, query.rows, query.kind) == (3, 8, 3, "rows")
    scale, shift = bert.embeddings.LayerNorm.weight, bert.embeddings.LayerNorm.bias
    outputs = query.matrix * 3**0.5
    torch.testing.assert_close(norm.squares, ((outputs - shift) / scale).square().mean(dim=0), rtol=1e-3, atol=1e-4)


def test_the_cap_is_spread_over_calls(capture: Any, running: Any) -> None:
    norm = beside_a_layer(nn.LayerNorm(WIDTH))
    data = [random(20, WIDTH, seed=index) for index in range(4)]
    callback = capture(running(norm, lambda net, batch: (net(batch), net(2 * batch))), data, rows=40)
    found = callback.statistics.norms["0"]
    # The first batch does not know yet that there are two calls.
    assert found.rows == callback.statistics.rows("1") == 40
    assert found.seen == callback.statistics.seen("1") == 160


def test_a_scale_that_two_norms_hold_has_one_moment(capture: Any, running: Any) -> None:
    first, second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    second.weight = first.weight
    net = nn.Sequential(first, second, nn.Linear(WIDTH, 2))
    norms = capture(running(net), [random(5, WIDTH)]).statistics.norms
    assert list(norms) == ["0"]
    assert norms["0"].rows == 10


class CentredWithoutShift(nn.Module):
    """Looks like an RMSNorm, but takes off the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.layer_norm(inputs, (WIDTH,), eps=self.variance_epsilon) * self.weight


CentredWithoutShift.__name__ = "CohereLayerNorm"


def test_norms_of_other_forms_and_those_that_nothing_reaches_are_named(capture: Any, running: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.LayerNorm(WIDTH)
            self.batch, self.group = nn.BatchNorm1d(WIDTH), nn.GroupNorm(2, 4)
            self.centred, self.idle = CentredWithoutShift(), nn.LayerNorm(WIDTH)
            self.without, self.grid = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.LayerNorm((4, WIDTH))
            self.layer = nn.Linear(WIDTH, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.centred(self.batch(self.plain(inputs)))
            self.grid(self.group(hidden.reshape(-1, 4, WIDTH)))
            return self.layer(self.without(hidden + torch.arange(WIDTH)))

    net = Net()
    net.batch.running_mean.fill_(3.0)  # type: ignore[union-attr]
    callback = capture(running(net), [5 * random(8, WIDTH) for _ in range(2)])
    assert list(callback.statistics.norms) == ["plain"]
    assert callback.unreached_norms == ["batch", "group", "centred", "idle"]


def test_nothing_is_captured_of_norms_unless_asked_for(tmp_path: Any, capture: Any, running: Any) -> None:
    module = running(beside_a_layer(nn.LayerNorm(WIDTH)))
    data = [random(5, WIDTH)]
    without = capture(module, data, norms=False)
    assert (dict(without.statistics.norms), without.unreached_norms) == ({}, [])
    having = capture(module, data)
    without.statistics.save(tmp_path / "without")
    having.statistics.save(tmp_path / "with")
    assert (tmp_path / "without").stat().st_size < (tmp_path / "with").stat().st_size
    assert torch.equal(without.statistics["1"].matrix, having.statistics["1"].matrix)
    assert having.statistics["1"].rows == 5


def test_a_second_pass_begins_anew_and_leaves_no_hook(running: Any, validate: Any) -> None:
    net = beside_a_layer(nn.LayerNorm(WIDTH))
    callback = PaveCallback(backbone="net", norms=True)
    for size in (3, 5):
        validate(callback, running(net), [random(size, WIDTH)])
        assert callback.statistics.norms["0"].rows == size
        assert not any(module._forward_hooks for module in net.modules())


def test_low_precision_does_not_reach_the_squares(capture: Any, running: Any) -> None:
    net, data = beside_a_layer(nn.LayerNorm(WIDTH)), [random(40, WIDTH)]
    plain, blurred = capture(running(net), data), capture(running(net), data, precision="bf16-mixed")
    torch.testing.assert_close(blurred.statistics.norms["0"].squares, plain.statistics.norms["0"].squares)


def test_infinite_inputs_are_told(capture: Any, running: Any) -> None:
    data = random(3, WIDTH)
    data[1, 2] = float("nan")
    net = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "layer": nn.Linear(WIDTH, 2)})

    def step(net: Any, batch: Tensor) -> None:
        net["norm"](batch)
        net["layer"](batch.nan_to_num())

    with pytest.raises(PaveError, match="norm 'norm' has seen NaN or infinite values in the 3 rows"):
        capture(running(net, step), [data])
