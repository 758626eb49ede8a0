"""FeatCal against stacked least squares in numpy, on a toy stack of blocks."""

import numpy as np
import pytest
import torch

from pave_lightning.merging import merge
from pave_lightning.merging.methods.feature_calibration import FeatureCalibration, FeatureCalibrationOptions

WIDTH = 5


def layer_norm(rows):
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-3)


def reference(source, evidence, *, extrapolation, share, ridge, unread):
    """Every layer by least squares on stacked rows, with square roots of the weights; no normal equations."""
    named = {parameter.name: parameter for parameter in source.parameters}
    base = {name: source.base(p).double().numpy() for name, p in named.items()}
    experts = {t: {n: source.expert(t, p).double().numpy() for n, p in named.items()} for t in source.tasks}
    anchor = {name: value.double().numpy() for name, value in evidence.anchor.items()}
    pull = {name: base[name] + extrapolation * anchor[name] for name in base}
    found = {name: base[name] + anchor[name] for name in base}

    def rows(words, task):
        batches = evidence.passes.batches[task]
        return np.concatenate([words[b["input_ids"][b["attention_mask"].bool()].numpy()] for b in batches])

    def last_tokens(task):
        masks = [b["attention_mask"] for b in evidence.passes.batches[task]]
        # No token of these blocks sees another one, so heads are taken to read the last.
        return np.concatenate([(torch.arange(1, 7) == mask.sum(1, True))[mask.bool()].numpy() for mask in masks])

    student = {task: rows(found["words.weight"], task) for task in source.tasks}
    teacher = {task: rows(experts[task]["words.weight"], task) for task in source.tasks}

    def forward(weights, index, hidden):
        dense, norm = f"layers.{index}.dense", f"layers.{index}.norm"
        inner = hidden + 1.5 * np.tanh(hidden @ weights[f"{dense}.weight"].T + weights[f"{dense}.bias"])
        return inner, layer_norm(inner) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]

    for index in range(2):
        dense, norm = f"layers.{index}.dense", f"layers.{index}.norm"
        left, right, bias_parts = [], [], []
        normalised = {}
        for task, weights in experts.items():
            own, aimed = student[task], share * teacher[task] + (1 - share) * student[task]
            size = np.linalg.norm(own.T @ own / len(own))
            factor = np.sqrt(1 / (size * len(own)))
            left.append(factor * own)
            right.append(factor * aimed @ weights[f"{dense}.weight"].T)
            bias_parts.append((1 / size, aimed.mean(axis=0), own.mean(axis=0), weights))
            normalised[task] = layer_norm(forward(found, index, own)[0])
        left.append(np.sqrt(ridge) * np.eye(WIDTH))
        right.append(np.sqrt(ridge) * pull[f"{dense}.weight"].T)
        weight = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0].T
        # The bias minimises a weighted sum of squares of constants: their weighted mean.
        aims = [w[f"{dense}.bias"] + w[f"{dense}.weight"] @ aim - weight @ own for _, aim, own, w in bias_parts]
        weights = [share_of for share_of, *_ in bias_parts]
        bias = np.average([*aims, pull[f"{dense}.bias"]], axis=0, weights=[*weights, ridge])
        scale, shift = np.empty(WIDTH), np.empty(WIDTH)
        for channel in range(WIDTH):
            system, target = [], []
            for task, z in normalised.items():
                counts = np.ones(len(z)) if index == 0 else np.where(last_tokens(task), 1.0, unread)
                column = np.stack([z[:, channel], np.ones(len(z))], axis=1) * np.sqrt(counts / counts.sum())[:, None]
                expert = [experts[task][f"{norm}.{part}"][channel] for part in ("weight", "bias")]
                system.append(column)
                target.append(column @ expert)
            system.append(np.sqrt(ridge) * np.eye(2))
            target.append(np.sqrt(ridge) * np.array([pull[f"{norm}.{part}"][channel] for part in ("weight", "bias")]))
            scale[channel], shift[channel] = np.linalg.lstsq(
                np.concatenate(system), np.concatenate(target), rcond=None
            )[0]
        found.update({f"{dense}.weight": weight, f"{dense}.bias": bias, f"{norm}.weight": scale, f"{norm}.bias": shift})
        student = {task: forward(found, index, hidden)[1] for task, hidden in student.items()}
        teacher = {task: forward(experts[task], index, hidden)[1] for task, hidden in teacher.items()}
    return {name: found[name] - base[name] for name in found}


@pytest.mark.parametrize(
    ("extrapolation", "share", "ridge", "unread"), [(2.0, 0.3, 0.05, 0.01), (1.0, 0.0, 0.5, 1.0), (0.0, 1.0, 0.01, 0.3)]
)
def test_every_layer_is_the_least_squares_solution(walkable, extrapolation, share, ridge, unread):
    source, evidence = walkable
    options = FeatureCalibrationOptions(
        extrapolation=extrapolation, teacher_share=share, ridge=ridge, unread_tokens=unread
    )
    merged = merge(FeatureCalibration(options), source, evidence)
    expected = reference(source, evidence, extrapolation=extrapolation, share=share, ridge=ridge, unread=unread)
    for name, value in expected.items():
        assert np.allclose(merged.vectors[name].numpy(), value, atol=2e-5), name


def test_what_is_switched_off_stays_the_anchor(walkable):
    source, evidence = walkable
    options = FeatureCalibrationOptions(norms=False, biases=False)
    merged = merge(FeatureCalibration(options), source, evidence)
    changed = {name for name, vector in merged.vectors.items() if not torch.equal(vector, evidence.anchor[name])}
    assert changed == {"layers.0.dense.weight", "layers.1.dense.weight"}


def test_a_strong_ridge_gives_the_extrapolated_anchor(walkable):
    source, evidence = walkable
    merged = merge(FeatureCalibration(FeatureCalibrationOptions(ridge=1e7, extrapolation=1.5)), source, evidence)
    for name, vector in merged.vectors.items():
        times = 1.0 if name == "words.weight" else 1.5
        assert torch.allclose(vector, times * evidence.anchor[name], atol=1e-4), name


def test_equal_experts_are_found_whatever_the_anchor(walkable):
    source, evidence = walkable
    source._vectors["two"] = source._vectors["one"]
    evidence.anchor["words.weight"] = source._vectors["one"]["words.weight"]
    merged = merge(FeatureCalibration(FeatureCalibrationOptions(ridge=1e-7)), source, evidence)
    for name, vector in merged.vectors.items():
        assert torch.allclose(vector, source._vectors["one"][name], atol=5e-3), name


def test_a_second_sweep_lets_layers_see_each_other(walkable):
    source, evidence = walkable
    once, twice = (
        merge(FeatureCalibration(FeatureCalibrationOptions(sweeps=count)), source, evidence) for count in (1, 2)
    )
    # The first layer's own input does not change within a block; what the norm behind it sees does.
    assert torch.equal(once.vectors["layers.0.dense.weight"], twice.vectors["layers.0.dense.weight"])
    assert not torch.allclose(once.vectors["layers.0.norm.weight"], twice.vectors["layers.0.norm.weight"], atol=1e-4)


def test_weight_and_bias_together_are_one_affine_least_squares_solution(walkable):
    source, evidence = walkable
    options = FeatureCalibrationOptions(affine=True, norms=False, extrapolation=1.0, teacher_share=0.4, ridge=0.2)
    merged = merge(FeatureCalibration(options), source, evidence)
    named = {parameter.name: parameter for parameter in source.parameters}
    base = {name: source.base(p).double().numpy() for name, p in named.items()}
    student_words = base["words.weight"] + evidence.anchor["words.weight"].double().numpy()
    left, right = [], []
    for task in source.tasks:
        expert = {name: source.expert(task, p).double().numpy() for name, p in named.items()}
        batches = evidence.passes.batches[task]
        places = np.concatenate([b["input_ids"][b["attention_mask"].bool()].numpy() for b in batches])
        own, teacher = student_words[places], expert["words.weight"][places]
        aimed = 0.4 * teacher + 0.6 * own
        factor = np.sqrt(1 / (np.linalg.norm(own.T @ own / len(own)) * len(own)))
        left.append(factor * np.concatenate([own, np.ones((len(own), 1))], axis=1))
        right.append(factor * (aimed @ expert["layers.0.dense.weight"].T + expert["layers.0.dense.bias"]))
    pull = {name: base[name] + evidence.anchor[name].double().numpy() for name in base}
    left.append(np.sqrt(0.2) * np.eye(WIDTH + 1))
    right.append(np.sqrt(0.2) * np.vstack([pull["layers.0.dense.weight"].T, pull["layers.0.dense.bias"]]))
    found = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0]
    weight, bias = (merged.vectors[f"layers.0.dense.{part}"].numpy() for part in ("weight", "bias"))
    assert np.allclose(weight + base["layers.0.dense.weight"], found[:-1].T, atol=2e-5)
    assert np.allclose(bias + base["layers.0.dense.bias"], found[-1], atol=2e-5)


def test_unread_tokens_may_weigh_less_in_all_blocks(walkable):
    source, evidence = walkable
    options = {"unread_tokens": 0.1}
    last, everywhere = (
        merge(FeatureCalibration(FeatureCalibrationOptions(**options, unread_in=where)), source, evidence)
        for where in ("last", "all")
    )
    name = "layers.0.norm.weight"
    assert torch.equal(last.vectors["layers.0.dense.weight"], everywhere.vectors["layers.0.dense.weight"])
    assert not torch.allclose(last.vectors[name], everywhere.vectors[name], atol=1e-4)
    full = merge(FeatureCalibration(FeatureCalibrationOptions(unread_tokens=1.0)), source, evidence)
    assert torch.equal(last.vectors[name], full.vectors[name])
