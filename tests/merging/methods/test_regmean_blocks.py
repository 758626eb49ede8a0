"""RegMean++ against stacked least squares in numpy, on a toy stack of blocks."""

import numpy as np
import pytest
import torch

from pave_lightning.merging import merge
from pave_lightning.merging.methods.regmean_blocks import RegMeanBlocks, RegMeanBlocksOptions

WIDTH = 5


def reference(source, evidence, nondiagonal):
    """Every layer by least squares on rows whose second moments are the shrunk ones."""
    named = {parameter.name: parameter for parameter in source.parameters}
    experts = {t: {n: source.expert(t, p).double().numpy() for n, p in named.items()} for t in source.tasks}
    found = {name: np.mean([weights[name] for weights in experts.values()], axis=0) for name in named}

    def rows(task):
        batches = evidence.passes.batches[task]
        return np.concatenate(
            [found["words.weight"][b["input_ids"][b["attention_mask"].bool()].numpy()] for b in batches]
        )

    hidden = {task: rows(task) for task in source.tasks}
    for index in range(2):
        name = f"layers.{index}.dense.weight"
        left, right = [], []
        for task, weights in experts.items():
            moment = hidden[task].T @ hidden[task] / len(hidden[task])
            shrunk = nondiagonal * moment + (1 - nondiagonal) * np.diag(np.diag(moment))
            root = np.linalg.cholesky(shrunk).T
            left.append(root)
            right.append(root @ weights[name].T)
        found[name] = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0].T
        for task, states in hidden.items():
            inner = states + 1.5 * np.tanh(states @ found[name].T + found[f"layers.{index}.dense.bias"])
            centred = inner - inner.mean(axis=1, keepdims=True)
            normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-3)
            hidden[task] = normal * found[f"layers.{index}.norm.weight"] + found[f"layers.{index}.norm.bias"]
    return {name: value - source.base(named[name]).double().numpy() for name, value in found.items()}


@pytest.mark.parametrize("nondiagonal", [1.0, 0.95, 0.0])
def test_every_layer_is_the_least_squares_solution(walkable, nondiagonal):
    source, evidence = walkable
    options = RegMeanBlocksOptions(nondiagonal=nondiagonal, ridge=1e-9)
    merged = merge(RegMeanBlocks(options), source, evidence)
    for name, value in reference(source, evidence, nondiagonal).items():
        assert np.allclose(merged.vectors[name].numpy(), value, atol=5e-5), name


def test_a_strong_ridge_gives_the_mean(walkable):
    source, evidence = walkable
    merged = merge(RegMeanBlocks(RegMeanBlocksOptions(ridge=1e8)), source, evidence)
    for parameter in source.parameters:
        mean = (source.vector("one", parameter) + source.vector("two", parameter)) / 2
        assert torch.allclose(merged.vectors[parameter.name], mean, atol=1e-5)
