"""Layers whose weight is used without calling them are captured by what their weight multiplies."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import _get_current_function_mode

from pave_lightning.callbacks.pave_callback import OTHERWISE_USED
from pave_lightning.callbacks.used_weights import SEARCHED
from pave_lightning.statistics import NOT_REACHED


@pytest.fixture
def capture(capture_with: Any) -> Any:
    return capture_with(rows=None)


def moment(rows: Tensor) -> Tensor:
    return (rows.T @ rows / len(rows)).detach()


def batches() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    masks = [torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1], [1, 1]])]
    return [{"x": torch.randn(*mask.shape, 4, generator=random), "attention_mask": mask} for mask in masks]


def real_rows(data: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([batch["x"][batch["attention_mask"].bool()] for batch in data])


PRODUCTS = {
    "linear": lambda layer, x: linear(x, layer.weight),
    "linear by name": lambda layer, x: linear(x, weight=layer.weight, bias=layer.bias),
    "transposed": lambda layer, x: x @ layer.weight.T,
    "from the left": lambda layer, x: (layer.weight @ x.transpose(1, 2)).transpose(1, 2),
    "matmul": lambda layer, x: torch.matmul(x, layer.weight.t()),
    "flattened": lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.T),
}


class Using(nn.Module):
    def __init__(self, product: Any, size: int = 4) -> None:
        super().__init__()
        self.layer, self.called = nn.Linear(4, size), nn.Linear(4, 4)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.layer, x)[..., :1] + self.called(x)[..., :1].reshape(-1, 1).sum()


@pytest.mark.parametrize("size", [4, 3, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_what_a_weight_multiplies_counts_without_padding(product: str, size: int, capture: Any, running: Any) -> None:
    data = batches()
    net = Using(PRODUCTS[product], size)
    callback = capture(running(net, lambda net, batch: net(batch["x"])), data, moments="input", keep_rows=False)
    assert callback.unreached == []
    rows = real_rows(data)
    for layer in ("layer", "called"):
        assert callback.statistics.rows(layer) == len(rows)
        torch.testing.assert_close(callback.statistics[layer].matrix, moment(rows))
    smallest = capture(running(net, lambda net, batch: net(batch["x"])), data, keep_rows=False).statistics["layer"]
    weight = net.layer.weight.detach()
    expected = weight @ moment(rows) if size < 4 else moment(rows)  # without the bias, whichever product it is
    torch.testing.assert_close(smallest.matrix, expected)


def test_a_product_along_the_other_axis_and_with_some_rows_is_not_that_of_the_layer(capture: Any, running: Any) -> None:
    for product in (lambda layer, x: x @ layer.weight, lambda layer, x: linear(x, layer.weight[:2])):
        net = Using(product)
        callback = capture(running(net, lambda net, batch: net(batch["x"])), batches())
        assert callback.unreached == ["layer"]
        assert callback.statistics.layers() == ["called"]


def test_other_uses_of_a_weight_are_told_as_such(capture: Any, running: Any) -> None:
    net = Using(lambda layer, x: torch.cat([layer.weight, layer.weight]).sum() + x)
    callback = capture(running(net, lambda net, batch: net(batch["x"])), batches())
    assert callback.statistics.why_unreached("layer") == OTHERWISE_USED
    idle = capture(running(Using(lambda layer, x: x), lambda net, batch: net(batch["x"])), batches())
    assert idle.statistics.why_unreached("layer") == NOT_REACHED


def test_the_reason_is_kept_with_the_statistics(capture: Any, running: Any, tmp_path: Any) -> None:
    from pave_lightning.statistics import TaskStatistics

    net = Using(lambda layer, x: torch.cat([layer.weight, layer.weight]).sum() + x)
    capture(running(net, lambda net, batch: net(batch["x"])), batches(), path=tmp_path / "f")
    loaded = TaskStatistics.load(tmp_path / "f")
    assert (loaded.unreached, loaded.why_unreached("layer")) == (("layer",), OTHERWISE_USED)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_projection_of_attention(batch_first: bool, bias: bool, capture: Any, running: Any) -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, bias=bias)

    outputs: list[Tensor] = []

    def step(net: Any, batch: Any) -> None:
        x = batch["x"] if batch_first else batch["x"].transpose(0, 1)
        given = net.attention(x, x, x, key_padding_mask=batch["attention_mask"] == 0, need_weights=False)[0]
        outputs.append(given if batch_first else given.transpose(0, 1))

    net, data = Attention(), batches()
    callback = capture(running(net, step), data, moments="input", keep_rows=False)
    layer = net.attention.out_proj
    watched = list(outputs)
    # What the projection multiplied, from what it gave.
    given = [(out.detach().double() - (layer.bias.double() if bias else 0)) for out in watched]
    heads = [out @ torch.linalg.inv(layer.weight.detach().double()).T for out in given]
    rows = torch.cat([one[batch["attention_mask"].bool()] for one, batch in zip(heads, data, strict=True)])
    torch.testing.assert_close(
        callback.statistics["attention.out_proj"].matrix, moment(rows).float(), atol=1e-4, rtol=1e-3
    )
    outputs.clear()
    with torch.no_grad():
        for batch in data:
            step(net.eval(), batch)
    for plain, seen in zip(outputs, watched, strict=True):
        torch.testing.assert_close(plain, seen)  # the fast path, which rounds otherwise


def test_mambas_step_sizes_are_captured() -> None:
    from families.pretrained import capture as capture_model

    config = hf.MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=3)
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(config).eval()
    mask = torch.ones(2, 5, dtype=torch.long)
    ids = torch.randint(0, 30, (2, 5))
    seen: list[Tensor] = []
    mixer = model.backbone.layers[1].mixer
    handle = mixer.x_proj.register_forward_hook(lambda module, args, output: seen.append(output.detach()[..., :3]))
    found = capture_model(model, [{"input_ids": ids, "attention_mask": mask}], "model")
    handle.remove()
    name = "backbone.layers.1.mixer.dt_proj"
    rows = seen[0].flatten(0, 1)
    matrix = found[name].matrix
    torch.testing.assert_close(matrix.T @ matrix if found.kind(name) == "rows" else matrix, moment(rows))
    assert found.unreached == ()


def test_watching_ends_with_the_search_and_the_pass(capture: Any, running: Any) -> None:
    modes: list[Any] = []
    net = Using(PRODUCTS["linear"])
    plain = nn.Sequential(nn.Linear(4, 4))

    def step(net: Any, batch: Any) -> None:
        modes.append(_get_current_function_mode())
        net(batch["x"])

    capture(running(net, step), batches())
    assert [mode is None for mode in modes] == [False, True, True]
    modes.clear()
    capture(running(plain, step), batches())
    assert [mode is None for mode in modes] == [False, True, True]
    assert _get_current_function_mode() is None
    left = [(module._forward_hooks, module._forward_pre_hooks) for module in (*net.modules(), *plain.modules())]
    assert not any(any(hooks) for hooks in left)


def test_an_error_ends_the_watch(capture: Any, running: Any) -> None:
    def step(net: Any, batch: Any) -> None:
        net(batch["x"])
        raise ZeroDivisionError

    net = Using(PRODUCTS["linear"])
    with pytest.raises(ZeroDivisionError):
        capture(running(net, step), batches())
    assert _get_current_function_mode() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_search_ends_where_layers_are_left_that_nothing_uses(capture: Any, running: Any) -> None:
    """As the texts' side of CLIP is while it reads images; what was found goes on being counted."""
    modes: list[Any] = []
    net = Using(PRODUCTS["linear"])
    net.idle = nn.Linear(4, 4)

    def step(net: Any, batch: Any) -> None:
        modes.append(_get_current_function_mode())
        net(batch["x"])

    data = [batch for _ in range(3) for batch in batches()]
    found = capture(running(net, step), data, moments="input", keep_rows=False).statistics
    assert [mode is None for mode in modes] == [False] * SEARCHED + [True] * (9 - SEARCHED)
    torch.testing.assert_close(found["layer"].matrix, moment(real_rows(data)))
    assert found.unreached == ("idle",)
