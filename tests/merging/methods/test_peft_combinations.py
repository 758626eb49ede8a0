"""peft's combinations against peft itself: models with several adapters, combined by ``add_weighted_adapter``."""

import inspect

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.peft_combinations import PeftCombination, PeftCombinationOptions

SHAPES = {"v": (14, 9), "w": (8, 20)}
FACTORS = ("linear", "ties", "magnitude_prune", "dare_linear", "dare_ties")
SCALINGS = {"one": 1.0, "two": 0.5, "three": 3.0}


@pytest.fixture
def scaled(adapted):
    """A source whose factors hold a scaling of their own for each task, as those of adapters do."""

    class Scaled(adapted):
        def __init__(self, pairs, scalings=SCALINGS, **options):
            self.scalings = scalings
            folded = {t: {n: (scalings[t] * b, a) for n, (b, a) in named.items()} for t, named in pairs.items()}
            super().__init__(folded, **options)

        def scaling(self, task, parameter):
            return self.scalings[task]

    return Scaled


def run(source, **options):
    return merge(PeftCombination(PeftCombinationOptions(**options)), source).vectors


def by_peft(pairs, combination, scalings=SCALINGS, **settings):
    """What peft's own ``add_weighted_adapter`` makes of the same factors, layer by layer."""
    model = nn.Sequential()
    for name, (height, width) in SHAPES.items():
        model.add_module(name, nn.Linear(width, height, bias=False, dtype=torch.float64))
    wrapped = None
    for task, named in pairs.items():
        ranks = {name: pair[1].shape[0] for name, pair in named.items()}
        config = LoraConfig(
            r=max(ranks.values()),
            target_modules=list(named),
            rank_pattern=ranks,
            alpha_pattern={name: scalings[task] * rank for name, rank in ranks.items()},
        )
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=task, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(task, config, autocast_adapter_dtype=False)
    for task, named in pairs.items():
        for name, pair in named.items():
            layer = getattr(wrapped.base_model.model, name)
            layer.lora_B[task].weight.data = torch.tensor(pair[0])
            layer.lora_A[task].weight.data = torch.tensor(pair[1])
    wrapped.add_weighted_adapter(
        list(pairs), [1.0] * len(pairs), "merged", combination_type=combination, svd_full_matrices=False, **settings
    )
    layers = {name: getattr(wrapped.base_model.model, name) for name in SHAPES}
    return {n: layer.get_delta_weight("merged").detach().numpy() for n, layer in layers.items() if "merged" in layer.r}


def agree(merged, expected):
    assert set(expected) == set(SHAPES)
    for name, value in expected.items():
        assert np.abs(value).max() > 0.1
        assert np.allclose(merged[name].numpy(), value, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize(
    ("combination", "settings"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 1}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.4, "svd_rank": 4}),
        ("magnitude_prune", {"density": 0.3}),
        ("magnitude_prune_svd", {"density": 0.3}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
        ("dare_linear_svd", {"density": 1.0}),
        ("dare_ties_svd", {"density": 1.0, "majority_sign_method": "frequency"}),
    ],
)
def test_as_peft_does_it(scaled, combination, settings, draw):
    pairs = draw(SHAPES, 2)
    options = {"majority_sign" if key == "majority_sign_method" else key: value for key, value in settings.items()}
    agree(run(scaled(pairs), combination=combination, **options), by_peft(pairs, combination, **settings))


@pytest.mark.parametrize(("combination", "settings"), [("cat", {}), ("svd", {}), ("ties_svd", {"density": 0.5})])
def test_unequal_ranks_as_peft_does_it(scaled, combination, settings, draw):
    pairs = draw(SHAPES, (1, 2, 3))
    agree(run(scaled(pairs), combination=combination, **settings), by_peft(pairs, combination, **settings))


@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
def test_a_task_without_adapter_in_a_layer_is_left_out_there(scaled, combination, draw):
    pairs = draw(SHAPES, 2)
    del pairs["three"]["v"]
    merged = run(scaled(pairs), combination=combination)
    two = {task: {"v": pairs[task]["v"], "w": pairs[task]["w"]} for task in ("one", "two")}
    assert np.allclose(merged["v"].numpy(), by_peft(two, combination)["v"], atol=1e-5)
    assert np.allclose(merged["w"].numpy(), by_peft(draw(SHAPES, 2), combination)["w"], atol=1e-4)


def test_negative_scalings_as_peft_does_it(scaled, draw):
    pairs, scalings = draw(SHAPES, 2), {"one": 1.0, "two": -2.0, "three": 0.5}
    agree(run(scaled(pairs, scalings), combination="linear"), by_peft(pairs, "linear", scalings))


def test_linear_has_cross_terms_and_cat_has_not(scaled, draw):
    pairs = draw(SHAPES, 2)
    exact = sum(SCALINGS[task] * named["w"][0] @ named["w"][1] for task, named in pairs.items())
    assert np.allclose(run(scaled(pairs), combination="cat")["w"].numpy(), exact, atol=1e-5)
    error = run(scaled(pairs), combination="linear")["w"].numpy() - exact
    assert np.linalg.norm(error) > 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"])
def test_what_is_dropped_depends_on_the_seed_alone(scaled, combination, draw):
    pairs = draw(SHAPES, 2)
    turned = {task: pairs[task] for task in ("three", "one", "two")}
    options = {"combination": combination, "density": 0.5}
    torch.manual_seed(1)
    first = run(scaled(pairs), **options, seed=3)
    state = torch.get_rng_state()
    second = run(scaled(turned), **options, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert not torch.equal(run(scaled(pairs), **options, seed=4)["w"], first["w"])
    assert torch.equal(run(scaled(pairs), **options)["w"], run(scaled(pairs), **options, seed=0)["w"])


def test_the_mean_over_many_seeds_is_the_sum(scaled, draw):
    pairs = draw({"w": (3, 4)}, 2)
    source = scaled(pairs)
    options = {"combination": "dare_linear_svd", "density": 0.5, "svd_rank": 3}
    draws = np.stack([run(source, **options, seed=seed)["w"].numpy() for seed in range(400)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    exact = sum(SCALINGS[task] * named["w"][0] @ named["w"][1] for task, named in pairs.items())
    assert np.all(np.abs(draws.mean(axis=0) - exact) < 4.5 * error)


def test_layers_and_factors_draw_apart_from_each_other(scaled, monkeypatch):
    from peft.utils import merge_utils

    plain, drawn = merge_utils.dare_linear, []

    def watched(*arguments):
        drawn.append(plain(*arguments).sign())
        return plain(*arguments)

    monkeypatch.setattr(merge_utils, "dare_linear", watched)
    pairs = {task: dict.fromkeys(("v", "w"), (np.ones((6, 6)), np.ones((6, 6)))) for task in ("one", "two")}
    run(scaled(pairs), combination="dare_linear", density=0.3)
    assert len(drawn) == 4
    assert not any(torch.equal(first, second) for i, first in enumerate(drawn) for second in drawn[:i])


@pytest.mark.parametrize("combination", FACTORS)
def test_unequal_ranks_of_factors_are_refused(scaled, combination, draw):
    with pytest.raises(PaveError, match="w: adapters of one rank are needed, found rank 1 in 'one', 2 in 'two'"):
        run(scaled(draw(SHAPES, (1, 2, 3))), combination=combination)


def test_the_default_is_pefts():
    default = inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"].default
    assert PeftCombinationOptions().combination == default
