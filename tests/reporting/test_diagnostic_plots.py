"""Pictures of made-up tables: that they are written, grow with the model and stand little as well as much."""

import subprocess
import sys
import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from pave_lightning.diagnostics import Diagnostics
from pave_lightning.reporting import diagnostic_plots
from pave_lightning.reporting.diagnostic_plots import kind_of_layer, natural, write_diagnostics

PARTS = ("attention.self.query", "output.dense")
MATRICES = ("covariance", "root", "identity", "task_vector")


def made_up(tasks, blocks):
    """Random tables of a model of that size."""
    random = np.random.default_rng(0)
    layers = [f"encoder.layer.{block}.{part}" for block in range(blocks) for part in PARTS]
    names = [f"task{index}" for index in range(tasks)]
    pairs = list(combinations(names, 2))
    spectra = [
        {"task": t, "layer": n, "matrix": m, "index": i, "value": 2.0**-i, "normalised": 2.0**-i}
        for t in names for n in layers for m in MATRICES for i in range(5)
    ]  # fmt: skip
    errors = [
        {"task": t, "layer": n, "metric": m, "rank": 10 - i, "full": 10, "kept": i == 1, "error": random.random()}
        for t in names for n in layers for m in MATRICES[:3] for i in range(1, 5)
    ]  # fmt: skip
    overlaps = [
        {"layer": n, "task_a": a, "task_b": b, "part": "removed" if np.isnan(s) else "top", "share": s}
        | {"directions_a": 2, "directions_b": 3, "overlap": random.random(), "expected": 0.1}
        for n in layers for a, b in pairs for s in (0.05, 0.1, 0.25, np.nan)
    ]  # fmt: skip
    energies = [
        {"layer": n, "task": t, "treatment": w, "elements": 9}
        | dict.fromkeys(["of_vector", "of_weight", "norm_ratio"], 0.5)
        for n in layers for t in names for w in ("pave", "dare", "dare_dropped")
    ]  # fmt: skip
    measures = ["sign_conflict", "weighted_conflict", "cosine", "top_overlap", "support_overlap"]
    conflicts = [
        {"layer": n, "task_a": a, "task_b": b, "treatment": w} | {name: random.random() for name in measures}
        for n in layers for a, b in pairs for w in ("plain", "pave", "dare")
    ]  # fmt: skip
    ranks = [{"task": t, "layer": n, "rank": 9, "full": 10, "share": 0.9} for t in names for n in layers]
    error_table = pd.DataFrame(errors, columns=["task", "layer", "metric", "rank", "full", "kept", "error"])
    return Diagnostics(
        spectra=pd.DataFrame(spectra, columns=["task", "layer", "matrix", "index", "value", "normalised"]),
        kept_ranks=pd.DataFrame(ranks, columns=["task", "layer", "rank", "full", "share"]),
        pruning_error=error_table.assign(pruned_share=1 - error_table["rank"] / error_table["full"]),
        subspace_overlap=pd.DataFrame(
            overlaps, columns=["layer", "task_a", "task_b", "part", "share", "overlap", "expected"]
        ),
        removed_energy=pd.DataFrame(
            energies, columns=["layer", "task", "treatment", "of_vector", "of_weight", "norm_ratio"]
        ),
        conflicts=pd.DataFrame(conflicts, columns=["layer", "task_a", "task_b", "treatment", *measures]),
        removed_energy_summary=pd.DataFrame(),
        conflict_summary=pd.DataFrame(),
    )


@pytest.mark.parametrize(("tasks", "blocks"), [(0, 0), (1, 1), (9, 2)])
def test_all_files_are_written_whatever_the_size(tmp_path, tasks, blocks):
    found = made_up(tasks, blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = write_diagnostics(found, tmp_path / "new")
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    assert {file.name for file in files if file.suffix == ".png"} == {
        *("spectra.png", "kept_ranks.png", "pruning_error.png", "subspace_overlap.png", "conflicts.png"),
    }
    assert len(pd.read_parquet(tmp_path / "new" / "conflicts.parquet")) == len(found.conflicts)


def test_pictures_with_a_place_for_every_layer_grow(tmp_path):
    overlaps, conflicts = {}, {}
    for blocks in (1, 18):
        found, file = made_up(2, blocks), tmp_path / "picture.png"
        diagnostic_plots.subspace_overlap(found.subspace_overlap, file)
        overlaps[blocks] = imread(file).shape
        diagnostic_plots.conflicts(found.conflicts, found.removed_energy, file)
        conflicts[blocks] = imread(file).shape
    # At 150 dpi and 7 points a label needs some 18 pixels
    assert overlaps[18][0] > max(18 * 36, overlaps[1][0])
    assert conflicts[18][1] > max(18 * 36, conflicts[1][1])


def test_missing_values_do_not_break_a_picture(tmp_path):
    found = made_up(2, 1)
    for table in (found.spectra, found.pruning_error, found.conflicts, found.removed_energy):
        table[table.select_dtypes("float").columns] = np.nan
    found.pruning_error["pruned_share"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_diagnostics(found, tmp_path)


def test_blocks_are_sorted_by_number():
    assert sorted(["l.10.q", "l.2.q", "l.2.k", "a"], key=natural) == ["a", "l.2.k", "l.2.q", "l.10.q"]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("encoder.layer.3.output.dense", "output.dense"),
        ("h.0.attn.c_attn", "attn.c_attn"),
        ("decoder.block.1.layer.0.SelfAttention.q", "layer.SelfAttention.q"),
        ("pooler.dense", "pooler.dense"),
        ("layers.0", "layers.0"),
    ],
)
def test_kinds_of_layers(layer, kind):
    assert kind_of_layer(layer) == kind


def test_drawing_needs_no_torch_and_no_pyplot():
    code = (
        "import sys\n"
        "import pave_lightning.reporting.diagnostic_plots\n"
        "assert not {'matplotlib', 'torch', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
