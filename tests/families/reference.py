"""What capture and purification should come to, by definition and without any of the code that they check."""

from collections.abc import Callable, Iterator, Sequence
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
def watched(layers: dict[str, nn.Module], masks: Sequence[Tensor] = ()) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers, row by row, float64; without the rows of padded positions of the mask that has their shape.

    Masks of encoder and decoder are told apart by their lengths.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().double()
            rows = patches(module, rows) if isinstance(module, CONVOLUTIONS) else without_padding(rows, masks)
            seen[name].append(rows.flatten(0, -2))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def of_used(statistics: Any, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows with the captured moment, for layers whose weight is used without calling them, which no hook has seen.

    That their moments are right is tested on its own (tests/callbacks/test_used_weights.py).
    """
    found = {}
    for name in set(statistics.layers()) - set(seen):
        moment = statistics[name]
        matrix = moment.matrix.double()
        covariance = matrix.T @ matrix if moment.kind == "rows" else matrix
        values, vectors = torch.linalg.eigh(covariance)
        found[name] = (values.clamp(min=0) * len(matrix.T)).sqrt()[:, None] * vectors.T
    return found


def without_padding(rows: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Rows of shape ``(B, L, d)`` or ``(B * L, d)`` without those that are padding."""
    for mask in masks:
        if rows.shape[:-1] == mask.shape:
            return rows[mask.bool()]
        if rows.shape[:-1] == (mask.numel(),):
            return rows[mask.bool().flatten()]
    return rows


def matrix_view(layer: nn.Module) -> Tensor:
    """The weight by which a layer multiplies, ``(d_out, d_in)``; writing to it changes the layer."""
    fused = isinstance(layer, nn.MultiheadAttention)
    weight: Tensor = (layer.in_proj_weight if fused else layer.weight).data  # type: ignore[assignment, union-attr]
    return weight.T if type(layer).__name__ == "Conv1D" else weight.flatten(1)


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


def check_moments(statistics: Any, matrix_of: Callable[[str], Tensor], seen: dict[str, Tensor]) -> None:
    """Compare what was captured of layers with the moments of what they were given."""
    for name, rows in seen.items():
        found, expected = statistics[name], rows.T @ rows / len(rows)
        if found.kind == "cross":
            expected = matrix_of(name).double() @ expected
        matrix = found.matrix.double()
        matrix = matrix.T @ matrix if found.kind == "rows" else matrix
        torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
