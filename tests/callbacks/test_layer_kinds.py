"""Weights that are not one `nn.Linear` each: fused attention, tied layers, layers called often, convolutions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.statistics import LayerMoment

torch.set_num_threads(1)


@pytest.fixture
def capture(capture_with: Any) -> Any:
    return capture_with(rows=None, keep_rows=False)


def assert_covariance(moment: LayerMoment, rows: Tensor) -> None:
    rows = rows.double()
    assert moment.rows == len(rows)
    torch.testing.assert_close(moment.matrix.double(), rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)


def masks() -> list[Tensor]:
    return [
        torch.tensor([[1, 1, 1], [1, 0, 0]]),
        torch.tensor([[1, 1], [1, 0], [0, 1]]),
        torch.tensor([[1, 1], [1, 0]]),
    ]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_fused_attention(batch_first: bool, by_name: bool, capture: Any, running: Any) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def step(net: Any, batch: Any) -> None:
        inputs = batch["x"] if batch_first else batch["x"].transpose(0, 1)
        if by_name:
            net.attention(query=inputs, key=inputs, value=inputs, need_weights=False)
        else:
            net.attention(inputs, inputs, inputs)

    data = [{"x": torch.randn(*mask.shape, 4), "attention_mask": mask} for mask in masks()]
    callback = capture(running(Attention(), step), data)
    assert callback.statistics.layers() == ["attention", "attention.out_proj"]
    assert callback.unreached == []
    real = torch.cat([batch["x"][batch["attention_mask"].bool()] for batch in data])
    assert_covariance(callback.statistics["attention"], real)
    # A cap of all but one row draws them from the real ones too.
    capped = capture(running(Attention(), step), data, rows=len(real) - 1).statistics["attention"]
    assert (capped.rows, capped.seen) == (len(real) - 1, len(real))


@pytest.mark.parametrize("rows", [None, 6])
def test_sequence_first_inputs_are_masked_the_other_way_round(rows: int | None, capture: Any, running: Any) -> None:
    real = masks()[:2]
    count = sum(int(mask.sum()) for mask in real)
    hot = []  # one-hot rows, whose covariance says which tokens were counted; padding has the last one
    for mask in real:
        numbers = torch.full(mask.shape, count)
        numbers[mask.bool()] = len(hot) * int(real[0].sum()) + torch.arange(int(mask.sum()))
        hot.append(nn.functional.one_hot(numbers, count + 1).float())
    data = [{"x": x.transpose(0, 1), "attention_mask": mask} for x, mask in zip(hot, real, strict=True)]
    module = running(nn.Sequential(nn.Linear(count + 1, count + 1)), lambda net, batch: net(batch["x"]))
    found = capture(module, data, rows=rows).statistics["0"]
    times = (found.matrix.diagonal() * found.rows).round()
    assert (found.rows, found.seen) == (rows or count, count)
    assert (times[-1], times.max(), times.sum()) == (0, 1, rows or count)


def test_attention_between_different_tensors_is_not_captured(capture: Any, running: Any) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.other = nn.Linear(4, 4)

    def step(net: Any, batch: Tensor) -> None:
        net.attention(net.other(batch), batch, batch)

    callback = capture(running(Cross(), step), [torch.randn(3, 2, 4)])
    assert callback.unreached == ["attention"]
    assert callback.statistics.why_unreached("attention") == (
        "its query, key and value are not projections of one tensor"
    )
    assert callback.statistics.layers() == ["attention.out_proj", "other"]


def test_the_fast_path_of_the_transformer_encoder_is_off_during_the_pass(capture: Any, running: Any) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    seen: list[Tensor] = []

    def step(net: Any, batch: Any) -> None:
        net(batch["x"], src_key_padding_mask=batch["attention_mask"] == 0)
        seen.append(batch["x"][batch["attention_mask"].bool()])

    data = [{"x": torch.randn(2, 3, 4), "attention_mask": masks()[0]}]
    before = torch.backends.mha.get_fastpath_enabled()
    callback = capture(running(encoder, step), data)
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert callback.unreached == []
    assert_covariance(callback.statistics["layers.0.self_attn"], seen[0])
    assert callback.statistics.rows("layers.1.linear1") == 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.second(self.between(self.first(inputs)))
        return out


@pytest.mark.parametrize("moments", ["input", "smallest", "output"])
def test_tied_layers_have_one_moment(moments: str, capture: Any, running: Any) -> None:
    net, data = Tied(), [torch.randn(5, 6), torch.randn(4, 6)]
    callback = capture(running(net), data, moments=moments)
    assert callback.statistics.layers() == ["between", "first"]
    assert callback.unreached == []
    assert {name.rpartition(".")[0] for name, _ in net.named_parameters() if name.endswith("weight")} == {
        "between",
        "first",
    }
    first = torch.cat(data)
    with torch.no_grad():
        rows = torch.cat([first, net.between(net.first(first))]).double()
    weight = net.first.weight.detach().double()
    covariance = rows.T @ rows / 18
    expected = {"input": covariance, "smallest": weight @ covariance, "output": weight @ covariance @ weight.T}[moments]
    found = callback.statistics["first"]
    assert (found.rows, found.seen) == (18, 18)
    torch.testing.assert_close(found.matrix.double(), expected, atol=1e-5, rtol=1e-4)


class Repeated(nn.Module):
    """One layer for all depths, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.embed(inputs)
        for _ in range(4):
            out = self.layer(out).tanh()
        return out


def test_a_layer_that_is_called_often_has_one_moment(capture: Any, running: Any) -> None:
    net, data = Repeated(), [torch.randn(7, 20), torch.randn(5, 20)]
    callback = capture(running(net), data)
    rows = []
    with torch.no_grad():
        inner = net.embed(torch.cat(data))
        for _ in range(4):
            rows.append(inner)
            inner = net.layer(inner).tanh()
    assert_covariance(callback.statistics["layer"], torch.cat(rows))


def test_the_cap_of_a_layer_that_is_called_often_is_spread_over_its_calls(capture: Any, running: Any) -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> None:
            for call in range(4):
                self.layer(nn.functional.one_hot(torch.full((len(inputs),), call), 4).float())

    found = capture(running(Marked()), [torch.ones(50, 1)] * 20, rows=400).statistics["layer"]
    assert (found.rows, found.seen) == (400, 4000)
    # The first batch counts its part of 20 once for each call; all others divide theirs.
    assert ((found.matrix.diagonal() * 400).round() - 100).abs().max() <= 20
    assert found.matrix.diagonal().sum() == pytest.approx(1)


def unfolded(layer: Any, inputs: Tensor) -> Tensor:
    """Patches one by one, channels first, then the axes of the kernel."""
    axes = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    margins = [(span // 2, span - span // 2) for span in ((size - 1) * apart for size, _, apart in axes)]
    if layer.padding != "same":
        margins = [(0, 0) if layer.padding == "valid" else (side, side) for side in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, [side for margin in margins[::-1] for side in margin], mode=mode)
    rows = []
    steps = [
        range(0, size - (k - 1) * apart, step) for size, (k, step, apart) in zip(padded.shape[2:], axes, strict=True)
    ]
    for image in padded:
        for place in torch.cartesian_prod(*[torch.tensor(list(step)) for step in steps]).reshape(-1, len(steps)):
            window = tuple(
                slice(int(at), int(at) + (k - 1) * apart + 1, apart)
                for at, (k, _, apart) in zip(place, axes, strict=True)
            )
            rows.append(image[(slice(None), *window)].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("moments", ["input", "smallest", "output"])
@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(3, 5, (2, 3), stride=(2, 3)), (5, 7)),
        (nn.Conv2d(6, 4, 1), (3, 4)),
        (nn.Conv2d(6, 4, 1, stride=2), (5, 4)),
        (nn.Conv1d(3, 4, 4, stride=4), (9,)),
        (nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), (2, 4, 5)),
        (nn.Conv2d(2, 4, 3, padding=1), (4, 5)),
        (nn.Conv2d(2, 30, 3, stride=2, padding=(2, 1)), (5, 6)),
        (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(0, 1)), (7, 5)),
        (nn.Conv2d(2, 4, 2, padding="same", dilation=(1, 3)), (4, 5)),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (4, 5)),
        (nn.Conv1d(3, 4, 5, stride=3, padding=2, padding_mode="circular"), (11,)),
        (nn.Conv3d(2, 4, 2, dilation=2, padding=1), (3, 4, 5)),
    ],
    ids=str,
)
def test_convolutions_as_matrix_products(
    convolution: Any, size: tuple[int, ...], moments: Any, capture: Any, running: Any
) -> None:
    torch.manual_seed(0)
    data = [torch.randn(count, convolution.in_channels, *size) for count in (2, 3)]
    patches = torch.cat([unfolded(convolution, images) for images in data])
    weight = convolution.weight.detach().reshape(convolution.out_channels, -1)
    with torch.no_grad():
        outputs = torch.cat([convolution(images).movedim(1, -1).reshape(-1, len(weight)) for images in data])
    torch.testing.assert_close(patches @ weight.T + convolution.bias, outputs, atol=1e-5, rtol=1e-4)
    module = running(nn.Sequential(convolution))
    found = capture(module, data, convolutions=True, moments=moments).statistics["0"]
    rows, matrix = patches.double(), weight.double()
    expected = rows.T @ rows / len(rows)
    if matrix.shape[0] < matrix.shape[1] and moments != "input":
        expected = matrix @ expected
        if moments == "output":
            expected = expected @ matrix.T
    assert (found.rows, found.seen) == (len(rows), len(rows))
    torch.testing.assert_close(found.matrix.double(), expected, atol=1e-5, rtol=1e-4)


def test_capped_patches_are_rows_of_the_unfolded_image(capture: Any, running: Any) -> None:
    convolution, images = nn.Conv2d(3, 40, 2, stride=2), torch.randn(2, 3, 6, 5)
    module = running(nn.Sequential(convolution))
    found = capture(module, [images], convolutions=True, rows=4, keep_rows=True).statistics["0"]
    assert (found.kind, found.rows, found.seen) == ("rows", 4, 12)
    distance = torch.cdist(found.matrix * 2, unfolded(convolution, images))
    nearest = distance.min(dim=1)
    assert nearest.values.max() < 1e-3
    assert len(set(nearest.indices.tolist())) == 4


def test_convolutions_are_left_out_unless_asked_for_or_no_matrix_product(capture: Any, running: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(16, 2)
    )
    data = [torch.randn(2, 3, 4, 4)]
    assert capture(running(net), data).statistics.layers() == ["3"]
    callback = capture(running(net), data, convolutions=True)
    assert callback.statistics.layers() == ["0", "3"]
    assert callback.unreached == []


def test_layers_that_cut_one_input_differently_do_not_share(capture: Any, running: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pointwise, self.patches = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 16, 4, stride=4)
            self.padded = nn.Conv1d(4, 16, 4, stride=4, padding=2)
            self.linear = nn.Linear(8, 8)

        def forward(self, inputs: Tensor) -> None:
            self.pointwise(inputs)
            self.patches(inputs)
            self.padded(inputs)
            self.linear(inputs)

    net, inputs = Both(), torch.randn(3, 4, 8)
    captured = capture(running(net), [inputs], convolutions=True).statistics
    for name in ("pointwise", "patches", "padded"):
        assert_covariance(captured[name], unfolded(net.get_submodule(name), inputs))
    assert_covariance(captured["linear"], inputs.reshape(-1, 8))


class Standardised(nn.Conv2d):
    """Changes its kernels before it uses them."""

    def forward(self, inputs: Tensor) -> Tensor:
        kernels = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(inputs, kernels, self.bias, self.stride, self.padding)


class SamePadded(nn.Conv2d):
    """Pads its input by itself, as models that came from TensorFlow do."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(inputs, (0, 1, 0, 1)))


def test_convolutions_that_do_something_else_are_told(capture: Any, running: Any) -> None:
    net = nn.Sequential(Standardised(3, 4, 3, padding=1), SamePadded(4, 4, 2), nn.Conv2d(4, 4, 3))
    callback = capture(running(net), [torch.randn(2, 3, 6, 6)], convolutions=True)
    assert callback.statistics.layers() == ["2"]
    assert callback.unreached == ["0", "1"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_convolutions_in_half_precision_are_still_known(precision: Any, capture: Any, running: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module = running(net.to(dtype))
    callback = capture(module, [torch.randn(2, 3, 8, 8, dtype=dtype)], convolutions=True, precision=precision)
    assert callback.unreached == []


def test_patches_are_copied_piece_by_piece(capture: Any, running: Any, monkeypatch: Any) -> None:
    convolution, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 5)
    monkeypatch.setattr("pave_lightning.callbacks.observation.PATCH_ELEMENTS", 27 * 7)
    found = capture(running(nn.Sequential(convolution)), [images], convolutions=True, moments="input").statistics["0"]
    assert (found.rows, found.seen) == (60, 60)
    assert_covariance(found, unfolded(convolution, images))


def test_a_model_of_convolutions_alone_says_what_would_capture_them(capture: Any, running: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(PaveError, match=r"no linear layers .* it has 2 convolutions, which convolutions=True captures"):
        capture(running(net), [torch.randn(1, 3, 8, 8)])
