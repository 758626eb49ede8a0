"""Purified weights on disk: what is stored, and that reading back equals computing."""

import logging

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.weights import Checkpoint

LAYERS = ("block.wide", "block.tall", "end.square", "end.flipped")


@pytest.fixture(scope="module")
def source(make_source):
    return make_source(convolutions=True)


def stored(folder, tasks="abc"):
    return {task: Checkpoint(folder / task, "backbone") for task in tasks if (folder / task).exists()}


@pytest.mark.parametrize("target", ["expert", "delta"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_reading_back_equals_computing(source, capture, same_everywhere, tmp_path, scope, target):
    options = Purify(rho=0.7, scope=scope, target=target)
    vectors = PurifiedTaskVectors(source, capture(source, convolutions=True), options)
    write_purified(vectors, tmp_path)
    found = StoredPurification(source, stored(tmp_path))
    assert (found.tasks, found.parameters) == (vectors.tasks, vectors.parameters)
    same_everywhere(found, vectors)
    for parameter in source.parameters:
        assert torch.equal(found.base(parameter), source.base(parameter))
        rows = slice(1, 3)
        assert torch.equal(found.expert("b", parameter, rows), vectors.expert("b", parameter)[rows])
        assert torch.equal(found.vector("b", parameter, rows), vectors.vector("b", parameter)[rows])
    for layer in (*LAYERS, "patches"):
        assert not all(torch.equal(*(s.expert(t, source.named(layer)) for s in (found, source))) for t in "abc")


def test_only_matrix_weights_that_were_purified_are_stored(source, capture, tmp_path):
    unseen = {("a", "block.wide"): None, ("b", "patches"): None, ("c", "end.square"): np.zeros((9, 9))}
    statistics = capture(source, convolutions=True, replace=unseen)
    write_purified(PurifiedTaskVectors(source, statistics, Purify(rho=0.7)), tmp_path)
    names = {task: {f"{layer}.weight" for layer in (*LAYERS, "patches")} for task in "abc"}
    for task, layer in unseen:
        names[task].remove(f"{layer}.weight")
    assert {task: set(checkpoint.backbone) for task, checkpoint in stored(tmp_path).items()} == names


def test_tasks_that_have_nothing_purified_get_no_folder(source, capture, same_everywhere, tmp_path):
    zeros = {("b", p.layer): np.zeros((p.matrix_shape[1],) * 2) for p in source.parameters if p.is_matrix}
    vectors = PurifiedTaskVectors(source, capture(source, replace=zeros), Purify(rho=0.7, tasks=["a", "b"]))
    write_purified(vectors, tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]
    same_everywhere(StoredPurification(source, stored(tmp_path)), vectors)


def test_nothing_to_purify_is_told_and_leaves_no_folder(source, capture, tmp_path):
    zeros = {(t, p.layer): np.zeros((p.matrix_shape[1],) * 2) for t in "abc" for p in source.parameters if p.is_matrix}
    for scope in ("layer", "model", "global"):
        vectors = PurifiedTaskVectors(source, capture(source, replace=zeros), Purify(scope=scope))
        with pytest.raises(PaveError, match="no layer of any task has a captured subspace"):
            write_purified(vectors, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tasks_that_were_not_stored_stay_plain(source, capture, tmp_path):
    vectors = PurifiedTaskVectors(source, capture(source), Purify(rho=0.7))
    write_purified(vectors, tmp_path)
    some = StoredPurification(source, stored(tmp_path, "b"))
    for parameter in source.parameters:
        assert torch.equal(some.expert("a", parameter), source.expert("a", parameter))
        assert torch.equal(some.expert("b", parameter), vectors.expert("b", parameter))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_what_was_left_as_it_is_is_told_once_for_each_layer(make_source, capture, caplog, tmp_path, scope):
    source = make_source(unchanged={("c", "end.flipped")})
    statistics = capture(source, replace={("a", "block.wide"): None, ("b", "end.square"): np.zeros((9, 9))})
    logger = logging.getLogger("pave_lightning")
    logger.addHandler(caplog.handler)
    try:
        options = Purify(rho=0.7, target="delta", scope=scope)
        write_purified(PurifiedTaskVectors(source, statistics, options), tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    expected = {
        "task 'a': block.wide is left as it is: no example reached it",
        "task 'b': end.square is left as it is: all its inputs were zero",
        "task 'c': end.flipped is left as it is: its task vector has no effect on the data",
    }
    assert {record.getMessage() for record in caplog.records} == expected


@pytest.mark.parametrize("scope", ["layer", "model", "global"])
def test_two_processes_purify_as_one(source, capture, in_processes, assert_same_weights, tmp_path, scope):
    unseen = {("b", "end.square"): np.zeros((9, 9))}
    folders = {}

    def purify(group):
        folder = folders[group.size] = tmp_path / f"by-{group.size}"
        folder.mkdir(exist_ok=True)
        vectors = PurifiedTaskVectors(
            source, capture(source, replace=unseen), Purify(rho=0.7, scope=scope), Compute(workers=2)
        )
        write_purified(vectors, folder, group)
        return list(vectors.ranks.items()), vectors.untouched

    results = [*in_processes(1, purify), *in_processes(2, purify)]
    assert results[0] == results[1] == results[2]
    assert ("b", "end.square") in results[0][1]
    assert_same_weights(folders[1], folders[2])
    assert all(len(list((folders[2] / task).glob("*.safetensors"))) == 2 for task in "abc")
