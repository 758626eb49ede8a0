import math

import numpy as np
import pytest
import torch

from pave_lightning.diagnostics import direction_energies, output_energy, pruning_errors
from pave_lightning.diagnostics.spectra import errors_of_layer, spectra_by_metric
from pave_lightning.statistics import LayerMoment

SHAPES = [(6, 6), (5, 9), (9, 5)]


def layer(shape, kind, seed=0):
    """A weight, real inputs, and their moment as it would be captured."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape)
    rows = random.normal(size=(40, shape[1])) * np.linspace(3, 0.1, shape[1])
    covariance = rows.T @ rows / len(rows)
    matrix = {
        "input": covariance,
        "cross": weight @ covariance,
        "rows": rows / np.sqrt(len(rows)),
        "output": weight @ covariance @ weight.T,
    }[kind]
    return weight, rows, LayerMoment(kind, torch.tensor(matrix), len(rows))


def truncated(weight, rows, metric, rank):
    """The weight projected on its leading directions, from plain SVDs."""
    covariance = rows.T @ rows / len(rows)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    seen = weight @ {"covariance": covariance, "root": root, "identity": np.eye(weight.shape[1])}[metric]
    left = np.linalg.svd(seen, full_matrices=False)[0][:, :rank]
    return left @ left.T @ weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["input", "cross", "rows", "output"])
def test_errors_are_those_of_real_outputs(shape, kind):
    weight, rows, moment = layer(shape, kind)
    tensor, full = torch.tensor(weight), min(shape)
    spectra = spectra_by_metric(tensor, moment, 0.0)
    assert list(spectra) == (["root", "identity"] if kind == "output" else ["covariance", "root", "identity"])
    found = list(errors_of_layer(("t", "l"), tensor, moment, spectra, [0, 1, 2], kept_rank=full - 3))
    assert len(found) == 4 * len(spectra)
    for error in found:
        left = weight - truncated(weight, rows, error.metric, error.rank)
        expected = np.linalg.norm(left @ rows.T) / np.linalg.norm(weight @ rows.T)
        assert error.error == pytest.approx(expected, abs=1e-7)
        assert error.kept == (error.rank == full - 3)
        assert error.pruned_share == pytest.approx(1 - error.rank / full)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["input", "cross", "rows", "output"])
def test_energies_are_mean_squares_of_outputs(shape, kind):
    weight, rows, moment = layer(shape, kind)
    directions = np.linalg.qr(np.random.default_rng(1).normal(size=(shape[0], 3)))[0]
    outputs = rows @ weight.T
    found = direction_energies(torch.tensor(weight), torch.tensor(directions), moment)
    assert found.numpy() == pytest.approx(np.square(outputs @ directions).mean(axis=0))
    assert output_energy(torch.tensor(weight), moment) == pytest.approx(np.square(outputs).sum(axis=1).mean())


def test_root_has_the_smallest_error():
    weight, _, moment = layer((7, 7), "input", seed=4)
    tensor = torch.tensor(weight)
    spectra = spectra_by_metric(tensor, moment, 0.0)
    errors = {(e.metric, e.rank): e.error for e in errors_of_layer(("t", "l"), tensor, moment, spectra, range(8))}
    for rank in range(8):
        assert errors["root", rank] == min(errors[metric, rank] for metric in spectra) or rank in (0, 7)


def test_without_a_moment_only_the_plain_spectrum():
    weight = torch.tensor(np.random.default_rng(0).normal(size=(4, 6)))
    spectra = spectra_by_metric(weight, None, 0.1)
    assert list(spectra) == ["identity"]
    assert spectra["identity"].values.numpy() == pytest.approx(np.linalg.svd(weight.numpy())[1])


def test_values_of_the_damped_spectra():
    weight, rows, moment = layer((5, 9), "input")
    spectra = spectra_by_metric(torch.tensor(weight), moment, 0.3)
    damped = rows.T @ rows / len(rows) + 0.3 * np.eye(9)
    assert spectra["covariance"].values.numpy() == pytest.approx(np.linalg.svd(weight @ damped)[1])
    squared = np.linalg.svd(weight @ damped @ weight.T)[1]
    assert spectra["root"].values.numpy() == pytest.approx(np.sqrt(squared))


def test_pruning_errors_by_hand():
    errors = pruning_errors(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64), 25.0)
    assert errors.tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert all(math.isnan(error) for error in pruning_errors(torch.zeros(2), 0.0).tolist())
