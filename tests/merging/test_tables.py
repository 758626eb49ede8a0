"""Methods whose published code decomposes every two-dimensional tensor, embeddings too."""

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from pave_lightning.merging import known_methods, make_method, merge
from pave_lightning.merging.matrices import TableOptions
from pave_lightning.weights import ParameterKind

METHODS = sorted(name for name, kind in known_methods().items() if issubclass(kind.Options, TableOptions))


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_m(matrices):
    rank = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([v[:rank] for _, _, v in parts], axis=0))
    return left @ np.diag(np.concatenate([s[:rank] for _, s, _ in parts])) @ right


def iso_c(matrices):
    left, values, right = np.linalg.svd(np.sum(matrices, axis=0), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(matrices):
    """With a share of 0.5."""
    size, count = min(matrices[0].shape), len(matrices)
    each = round((size - int(size * 0.5)) / count)
    left, values, right = np.linalg.svd(np.sum(matrices, axis=0), full_matrices=False)
    common = size - count * each
    lefts, kept, rights = [left[:, :common]], [values[:common]], [right[:common]]
    for matrix in matrices:
        u, s, v = np.linalg.svd(matrix - lefts[0] @ lefts[0].T @ matrix, full_matrices=False)
        lefts.append(u[:, :each])
        kept.append(s[:each])
        rights.append(v[:each])
    return np.concatenate(kept).mean() * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights))


def dc_merge(matrices):
    """With every entry kept, so that only signs decide."""
    rank = min(matrices[0].shape) // len(matrices)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1))
    right = polar(np.concatenate([v[:rank] for _, _, v in parts]))
    entries = np.stack([left.T @ (u[:, :rank] * s[:rank]) @ v[:rank] @ right.T for u, s, v in parts])
    agrees = np.sign(entries) == np.sign(entries.sum(axis=0))
    mean = (entries * agrees).sum(axis=0) / np.maximum(1, agrees.sum(axis=0))
    blocks = np.kron(np.eye(len(matrices)), np.ones((rank, rank)))
    return left @ (mean * blocks) @ right


REFERENCES = {
    "tsv_m": (tsv_m, {}),
    "iso_c": (iso_c, {}),
    "iso_cts": (iso_cts, {"common_share": 0.5}),
    "dc_merge": (dc_merge, {"keep_share": 1.0}),
}


@pytest.fixture
def source(make_source):
    rng = np.random.default_rng(3)
    shapes = {"words": (14, 8), "weight": (9, 8), "positions": (10, 8), "norm": (8,), "token": (1, 1, 8)}
    kinds = {"words": ParameterKind.EMBEDDING, "norm": ParameterKind.NORM_SCALE}
    vectors = {t: {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for t in "abc"}
    return make_source(vectors, matrices=["weight"], kinds=kinds), vectors


def test_every_method_of_the_kind_has_a_reference():
    assert sorted(REFERENCES) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_tables_are_decomposed_on_demand(source, name):
    source, vectors = source
    reference, options = REFERENCES[name]
    found = merge(make_method(name, {**options, "embeddings": True}), source).vectors
    plain = merge(make_method(name, options), source).vectors
    for parameter in ("words", "weight", "positions", "norm", "token"):
        stacked = [own[parameter].astype(np.float64) for own in vectors.values()]
        mean = np.mean(stacked, axis=0)
        wanted = reference(stacked) if len(stacked[0].shape) == 2 else mean
        assert found[parameter].numpy() == pytest.approx(wanted, abs=1e-5), parameter
        assert plain[parameter].numpy() == pytest.approx(wanted if parameter == "weight" else mean, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_tables_that_are_too_small_for_so_many_tasks_are_averaged(make_source, name):
    rng = np.random.default_rng(3)
    shapes = {"types": (2, 8), "weight": (9, 8)}
    vectors = {t: {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for t in "abc"}
    source = make_source(vectors, matrices=["weight"], kinds={"types": ParameterKind.EMBEDDING})
    reference, options = REFERENCES[name]
    found = merge(make_method(name, {**options, "embeddings": True}), source).vectors["types"].numpy()
    stacked = [own["types"].astype(np.float64) for own in vectors.values()]
    # A sum has as many directions as it has; the others split them among tasks.
    wanted = reference(stacked) if name == "iso_c" else np.mean(stacked, axis=0)
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_which_parameters_of_a_real_model_that_concerns(described, name):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    parameters = described(BertModel(BertConfig(**sizes, vocab_size=12, max_position_embeddings=10)))
    method, more = make_method(name, {}), make_method(name, {"embeddings": True})
    added = {p.name for p in parameters if more.covers(p) and not method.covers(p)}
    assert added == {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert all(more.in_blocks(p) != more.covers(p) for p in parameters)
