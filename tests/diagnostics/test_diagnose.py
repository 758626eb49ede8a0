"""All tables of whole tiny models."""

import numpy as np
import pytest
import torch

from pave_lightning.diagnostics import DiagnosticOptions, diagnose
from pave_lightning.diagnostics.diagnose import weighted_means
from pave_lightning.merging.methods.dare import DareOptions, DroppedTaskVectors
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.weights import task_vectors

LAYER = "encoder.layer.1.output.dense"
OPTIONS = DiagnosticOptions(pruned_shares=(0.1, 0.5), top_shares=(0.1, 0.25), dare=DareOptions(drop_rate=0.7, seed=3))


@pytest.fixture(scope="module")
def source(base_folder, expert_folders):
    return task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})


@pytest.fixture(scope="module")
def statistics(source):
    random = np.random.default_rng(0)
    result = {}
    for task in source.tasks:
        moments = {}
        for parameter in source.parameters:
            if parameter.is_matrix:
                rows = random.normal(size=(90, parameter.matrix_shape[1]))
                matrix = torch.tensor(rows.T @ rows / len(rows), dtype=torch.float32)
                moments[parameter.layer] = LayerMoment("input", matrix, 90)
        result[task] = TaskStatistics(moments, examples=9)
    return result


@pytest.fixture(scope="module")
def purified(source, statistics):
    return PurifiedTaskVectors(source, statistics, Purify(rho=0.75, damping=0.1))


@pytest.fixture(scope="module")
def found(source, purified, statistics):
    return diagnose(source, purified, statistics, OPTIONS)


def test_sizes_of_the_tables(source, found):
    layers = sum(parameter.is_matrix for parameter in source.parameters)
    values = sum(min(p.matrix_shape) for p in source.parameters if p.is_matrix)
    lengths = {name: len(table) for name, table in found.tables().items() if name != "pruning_error"}
    assert lengths == {
        "spectra": 3 * 4 * values,
        "kept_ranks": 3 * layers,
        "subspace_overlap": 3 * 3 * layers,
        "removed_energy": 3 * 3 * layers,
        "conflicts": 3 * 3 * layers,
        "removed_energy_summary": 9,
        "conflict_summary": 9,
    }
    assert set(found.spectra["matrix"]) == {"covariance", "root", "identity", "task_vector"}


def test_one_layer_against_numpy(source, purified, statistics, found):
    parameter = next(p for p in source.parameters if p.is_matrix and p.layer == LAYER)
    weight = source.expert("second", parameter).double().numpy()
    after = purified.expert("second", parameter).double().numpy()
    covariance = statistics["second"][LAYER].matrix.double().numpy()
    kept = purified.ranks["second", LAYER]

    errors = found.pruning_error.query("task == 'second' and layer == @LAYER and metric == 'covariance' and kept")
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    expected = np.linalg.norm((weight - after) @ root) / np.linalg.norm(weight @ root)
    assert errors["rank"].tolist() == [kept.rank]
    assert errors["error"].item() == pytest.approx(expected, rel=1e-4)

    spectrum = found.spectra.query("task == 'second' and layer == @LAYER and matrix == 'task_vector'")
    vector = weight - source.base(parameter).double().numpy()
    assert spectrum["value"].to_numpy() == pytest.approx(np.linalg.svd(vector)[1], rel=1e-5)
    assert spectrum["normalised"].iloc[0] == 1

    energy = found.removed_energy.query("task == 'second' and layer == @LAYER").set_index("treatment")
    gone = np.square(weight - after).sum()
    assert energy.loc["pave", "of_vector"] == pytest.approx(gone / np.square(vector).sum(), rel=1e-4)
    assert energy.loc["pave", "of_weight"] == pytest.approx(gone / np.square(weight).sum(), rel=1e-4)
    left = np.linalg.svd(weight - after)[0][:, : kept.full - kept.rank]
    inside = np.square(left.T @ vector).sum() / np.square(vector).sum()
    assert energy.loc["pave", "in_removed_directions"] == pytest.approx(inside, rel=1e-3)


def test_removed_overlap_and_dare_rows(source, purified, found):
    parameter = next(p for p in source.parameters if p.is_matrix and p.layer == LAYER)
    tails = []
    for task in ("first", "third"):
        kept = purified.ranks[task, LAYER]
        gone = (source.expert(task, parameter) - purified.expert(task, parameter)).double().numpy()
        tails.append(np.linalg.svd(gone)[0][:, : kept.full - kept.rank])
    expected = np.square(tails[0].T @ tails[1]).sum() / min(tail.shape[1] for tail in tails)
    row = found.subspace_overlap.query("layer == @LAYER and part == 'removed' and task_a == 'first'").iloc[-1]
    assert row["task_b"] == "third"
    assert row["overlap"] == pytest.approx(expected, rel=1e-3)

    dropped = DroppedTaskVectors(source, OPTIONS.dare)
    a, b = (dropped.vector(task, parameter).numpy() for task in ("first", "third"))
    row = found.conflicts.query("layer == @LAYER and treatment == 'dare' and task_a == 'first'").iloc[-1]
    assert row["support_overlap"] == pytest.approx(((a != 0) & (b != 0)).sum() / ((a != 0) | (b != 0)).sum())
    assert row["cosine"] == pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4)


def test_dare_removes_what_theory_says(found):
    summary = found.removed_energy_summary.groupby("treatment")["of_vector"].mean()
    assert summary["dare_dropped"] == pytest.approx(0.7, abs=0.02)
    assert summary["dare"] == pytest.approx(0.7 / 0.3, abs=0.05)


def test_what_is_not_known_is_left_out(source, statistics):
    chosen = {"first": statistics["first"]}
    purified = PurifiedTaskVectors(source, chosen, Purify(rho=0.75, tasks=["first"]))
    found = diagnose(source, purified, chosen, OPTIONS)
    assert set(found.pruning_error["task"]) == {"first"}
    assert set(found.kept_ranks["task"]) == {"first"}
    assert found.subspace_overlap.empty
    assert set(found.spectra.query("task == 'third'")["matrix"]) == {"identity", "task_vector"}
    third = found.removed_energy.query("task == 'third' and treatment == 'pave'")
    assert (third["of_vector"] == 0).all()


def test_no_purification_leaves_everything(source, statistics):
    found = diagnose(source, PurifiedTaskVectors(source, statistics, Purify(rho=1.0)), statistics, OPTIONS)
    assert set(found.subspace_overlap["part"]) == {"top"}
    pave = found.removed_energy.query("treatment == 'pave'")
    assert (pave["of_vector"] == 0).all()
    plain, pave = (found.conflict_summary.query("treatment == @name") for name in ("plain", "pave"))
    assert np.array_equal(plain["cosine"], pave["cosine"])


def test_weighted_means_leave_out_what_is_not_known():
    import pandas as pd

    table = pd.DataFrame({"t": ["a", "a", "b"], "elements": [1, 3, 2], "x": [1.0, 5.0, np.nan]})
    means = weighted_means(table, ["t"], ["x"])
    assert means["t"].tolist() == ["a", "b"]
    assert means["x"].iloc[0] == 4
    assert np.isnan(means["x"].iloc[1])
