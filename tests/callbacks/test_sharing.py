"""Layers whose inputs are the same at first and later not: each gets the moment of its own inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model

from pave_lightning.callbacks import PaveCallback


class Three(nn.ModuleDict):
    """Linear layers that are run in the order of a batch's plan, each on one of its tensors."""

    def __init__(self) -> None:
        super().__init__({name: nn.Linear(3, 3) for name in "abc"})


def run_plan(net: nn.ModuleDict, batch: Any) -> None:
    tensors, plan = batch
    for name, number in plan:
        net[name](tensors[number])


def own_rows(data: list[Any], name: str) -> Tensor:
    return torch.cat([tensors[number] for tensors, plan in data for layer, number in plan if layer == name]).double()


@pytest.mark.parametrize("seed", range(12))
def test_every_layer_has_the_moment_of_its_own_inputs(
    seed: int, running: Any, capture_with: Callable[..., Any]
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    data: list[Any] = []
    for _ in range(8):
        tensors = [torch.randn(5, 3, generator=generator) for _ in range(3)]
        same = [(name, number) for number in range(2) for name in "abc"]
        # At first all layers are given the same; later one is left out, given another tensor, or called once more.
        while len(data) > 2 and chance() < 0.5:
            place = int(chance() * len(same))
            changes = [same[place]] * (chance() < 0.4) + [(same[place][0], 2)] * (chance() < 0.5)
            same[place : place + 1] = changes
        data.append((tensors, same))
    callback = capture_with()(running(Three(), run_plan), data)
    for name in "abc":
        rows, found = own_rows(data, name), callback.statistics[name]
        assert found.rows == found.seen == len(rows)
        torch.testing.assert_close(found.covariance().double(), rows.T @ rows / len(rows), atol=1e-5, rtol=1e-5)


def test_layers_that_go_on_together_share_one_matrix(running: Any, capture_with: Callable[..., Any]) -> None:
    tensors = [torch.randn(4, 3) for _ in range(2)]
    together, parted = [("a", 0), ("b", 0), ("c", 0)], [("a", 0), ("b", 0), ("c", 1)]
    captured = capture_with()(running(Three(), run_plan), [(tensors, together), (tensors, parted)]).statistics
    assert captured["a"].matrix is captured["b"].matrix
    assert captured["a"].matrix is not captured["c"].matrix


def test_shared_projections_of_deberta(running: Any, capture_with: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        position_buckets=4,
        max_relative_positions=-1,
    )
    model = DebertaV2Model(config).eval()
    batches = [{"input_ids": torch.randint(0, 30, (2, 9))} for _ in range(3)]
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    options = {"rows": None, "moments": "input", "keep_rows": False}
    callback: PaveCallback = capture_with(**options)(running(model, lambda net, batch: net(**batch)), batches)
    attention = "encoder.layer.1.attention.self"
    captured = callback.statistics
    assert captured.rows(f"{attention}.query_proj") > captured.rows(f"{attention}.value_proj") == 3 * 2 * 9
    assert captured.owner(f"{attention}.query_proj") == captured.owner(f"{attention}.key_proj")
    assert set(captured) == set(seen)
    for name, moment in captured.items():
        rows = torch.cat([inputs.reshape(-1, inputs.shape[-1]) for inputs in seen[name]]).double()
        assert moment.rows == len(rows)
        torch.testing.assert_close(moment.matrix.double(), rows.T @ rows / len(rows), atol=1e-5, rtol=1e-5)
