"""What capture and purification should come to, by definition and without any of the code that they check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def answers(model: nn.Module, batch: Any) -> list[Tensor]:
    """All floating-point tensors that a model gives for a batch."""
    with torch.no_grad():
        given = model(**batch) if isinstance(batch, dict) else model(batch)
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The patches that a convolution multiplies with its kernels, one a row: channels first, then the kernel's axes."""
    unfold: dict[str, Any] = {key: getattr(layer, key) for key in ("kernel_size", "dilation", "padding", "stride")}
    unfold["padding"] = (0, 0) if layer.padding == "valid" else layer.padding
    if isinstance(layer, nn.Conv1d):
        inputs, one = inputs.unsqueeze(2), {"padding": 0}
        unfold = {key: (one.get(key, 1), *value) for key, value in unfold.items()}
    return nn.functional.unfold(inputs, **unfold).transpose(1, 2).flatten(0, 1)


@contextmanager
def watched(layers: dict[str, nn.Module], mask: Tensor | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers, row by row, float64; without the rows of padded positions where a mask is given."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().double()
            if isinstance(module, CONVOLUTIONS):
                rows = patches(module, rows)
            elif mask is not None and rows.shape[:-1] == mask.shape:
                rows = rows[mask.bool()]
            seen[name].append(rows.flatten(0, -2))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight by which a layer multiplies, ``(d_out, d_in)``, float64."""
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator, union-attr]
    return weight.T if type(layer).__name__ == "Conv1D" else weight.flatten(1)


def put_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """The reverse."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    own = matrix.T if type(layer).__name__ == "Conv1D" else matrix
    with torch.no_grad():
        weight.copy_(own.reshape(weight.shape))


def projected(weight: Tensor, rows: Tensor, rank: int, damping: float) -> Tensor:
    """U_r U_r^T W with the leading left singular vectors of W (X^T X / n + damping), by the paper's definition."""
    covariance = rows.T @ rows / len(rows) + damping * torch.eye(rows.shape[1], dtype=torch.float64)
    leading = torch.linalg.svd(weight @ covariance, full_matrices=False).U[:, :rank]
    return leading @ leading.T @ weight


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """A model with noise on all its weights and running statistics, as fine-tuning would leave it."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=random))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=random))
    return model


def check_moments(statistics: Any, layers: dict[str, nn.Module], seen: dict[str, Tensor]) -> None:
    """Compare what was captured of layers with the moments of what they were given."""
    assert set(seen) <= set(statistics.layers())
    for name, rows in seen.items():
        found, expected = statistics[name], rows.T @ rows / len(rows)
        if found.kind == "cross":
            expected = matrix_of(layers[name]) @ expected
        matrix = found.matrix.double()
        matrix = matrix.T @ matrix if found.kind == "rows" else matrix
        torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
