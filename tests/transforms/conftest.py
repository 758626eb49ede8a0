"""A source of task vectors in memory, of a model with two blocks."""

import numpy as np
import pytest
import torch

from pave_lightning.weights import Parameter, ParameterKind, TaskVectors

PARAMETERS = (
    Parameter("embeddings.weight", ParameterKind.EMBEDDING, (7, 4)),
    Parameter("layer.0.dense.weight", ParameterKind.LINEAR, (5, 4), 1),
    Parameter("layer.0.dense.bias", ParameterKind.BIAS, (5,)),
    Parameter("layer.1.dense.weight", ParameterKind.LINEAR, (5, 4), 1),
    Parameter("layer.2.dense.weight", ParameterKind.LINEAR, (4, 6), 0),
    Parameter("pooler.weight", ParameterKind.LINEAR, (4, 4), 1),
)


class Source(TaskVectors):
    """Random weights; with ``rank`` the task vectors of matrices are products of factors, of which B holds 2."""

    def __init__(self, rank=0):
        random = np.random.default_rng(3)
        self.tasks, self.parameters, self.rank = ("movie", "news", "topic"), PARAMETERS, rank
        self.bases = {p.name: random.normal(size=p.shape).astype(np.float32) for p in PARAMETERS}
        keys = [(task, p) for task in self.tasks for p in PARAMETERS]
        self.pairs = {
            (task, p.name): (
                random.normal(size=(p.matrix_shape[0], rank)),
                random.normal(size=(rank, p.matrix_shape[1])),
            )
            for task, p in keys
            if rank and p.is_matrix
        }
        self.arrays = {(task, p.name): random.normal(size=p.shape).astype(np.float32) for task, p in keys}
        for task, p in keys:
            if (task, p.name) in self.pairs:
                left, right = self.pairs[task, p.name]
                product = (left @ right).T if p.input_axis == 0 else left @ right
                self.arrays[task, p.name] = product.astype(np.float32)

    def base(self, parameter, rows=None):
        tensor = torch.tensor(self.bases[parameter.name])
        return tensor if rows is None else tensor[rows]

    def expert(self, task, parameter, rows=None):
        return self.base(parameter, rows) + self.vector(task, parameter, rows)

    def vector(self, task, parameter, rows=None, base=None):
        tensor = torch.tensor(self.arrays[task, parameter.name])
        return tensor if rows is None else tensor[rows]

    def factors(self, task, parameter):
        pair = self.pairs.get((task, parameter.name))
        return None if pair is None else tuple(map(torch.tensor, pair))

    def scaling(self, task, parameter):
        return 2.0 if (task, parameter.name) in self.pairs else 1.0

    def without_factors(self, task):
        return None if self.rank else super().without_factors(task)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def adapted():
    return Source(rank=2)


@pytest.fixture
def arrays():
    """Task vectors of a source as arrays, by task and parameter; experts must be base plus vector, rows must fit."""

    def read(vectors):
        found = {}
        for parameter in vectors.parameters:
            for task in vectors.tasks:
                vector = vectors.vector(task, parameter)
                expert, base = vectors.expert(task, parameter), vectors.base(parameter)
                assert torch.allclose(expert, base + vector, rtol=1e-6, atol=1e-6)
                rows = slice(1, 3)
                assert vectors.vector(task, parameter, rows).equal(vector[rows])
                assert vectors.expert(task, parameter, rows).equal(expert[rows])
                found[task, parameter.name] = vector.numpy()
        return found

    return read
