"""A source of a few small weights of all layouts, what its tasks saw, and their spectra by NumPy in float64."""

import numpy as np
import pytest
import torch

from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.weights import Parameter, ParameterKind, TaskVectors

DAMPING = 0.1
SIZE = 0.5
# Wide, tall, square, and stored transposed, so that d_out x d_in is 5 x 8; every width is another one.
LINEAR = {
    "block.wide": ((6, 10), 1),
    "block.tall": ((13, 7), 1),
    "end.square": ((9, 9), 1),
    "end.flipped": ((8, 5), 0),
}
PATCHES = Parameter("patches.weight", ParameterKind.CONVOLUTION, (6, 3, 2, 2), 1)
OVERLAPPING = Parameter("mixing.weight", ParameterKind.CONVOLUTION, (4, 2, 3, 3))


def values(name, shape):
    """Numbers that depend on the name alone, so that the order of tasks and layers does not matter."""
    return np.random.default_rng(list(name.encode())).normal(size=shape)


class SmallSource(TaskVectors):
    """Random weights in memory. Tasks of equal letters (``b`` and ``bb``) have equal experts.

    ``unchanged`` lists (task, layer) whose expert is the base; ``layers`` replaces the linear ones.
    """

    def __init__(self, tasks=("a", "b", "c"), *, unchanged=(), convolutions=False, layers=None):
        linear = LINEAR if layers is None else layers
        self.tasks = tuple(tasks)
        self.parameters = (
            Parameter("words.weight", ParameterKind.EMBEDDING, (11, 6)),
            *(Parameter(f"{name}.weight", ParameterKind.LINEAR, *found) for name, found in linear.items()),
            *(Parameter(f"{name}.bias", ParameterKind.BIAS, (3,)) for name in linear),
            Parameter("end.norm.weight", ParameterKind.NORM_SCALE, (6,)),
            *((PATCHES, OVERLAPPING) if convolutions else ()),
        )
        self.unchanged = set(unchanged)

    def base(self, parameter, rows=None):
        tensor = torch.tensor(values(parameter.name, parameter.shape), dtype=torch.float32)
        return tensor if rows is None else tensor[rows]

    def expert(self, task, parameter, rows=None):
        tensor = self.base(parameter)
        if (task, parameter.layer) not in self.unchanged:
            update = values(f"{task[0]}/{parameter.name}", parameter.shape)
            tensor = (tensor.double() + SIZE * torch.tensor(update)).float()
        return tensor if rows is None else tensor[rows]

    def named(self, layer):
        """The weight of a layer."""
        return next(p for p in self.parameters if p.name == f"{layer}.weight")

    def matrices(self, layer):
        """The base's weight and each task's as ``d_out x d_in`` in float64, laid out by NumPy."""
        parameter = self.named(layer)
        found = {None: self.base(parameter), **{task: self.expert(task, parameter) for task in self.tasks}}
        arrays = {task: tensor.double().numpy() for task, tensor in found.items()}
        upright = {t: a.T if parameter.input_axis == 0 else a.reshape(len(a), -1) for t, a in arrays.items()}
        return upright.pop(None), upright


def inputs_of(task, layer, width, rows=40):
    """What a layer sees in a task: float32 rows whose directions differ in strength, in each task in another way."""
    strength = np.exp(-np.arange(width) * (ord(task[0]) % 3 + 1) / width)
    mixing = values(f"{task[0]} mixes {layer}", (width, width)) * strength
    return (values(f"{task[0]} sees {layer}", (rows, width)) @ mixing.T).astype(np.float32)


@pytest.fixture(scope="session")
def make_source():
    return SmallSource


@pytest.fixture(scope="session")
def capture():
    """Build the statistics of a source's tasks, in any kind of moment; ``rows`` is how many inputs there were.

    ``replace`` maps (task, layer) to another matrix of that kind, or to None where nothing was captured.
    """

    def build(source, kind="input", *, rows=40, replace=None, convolutions=False, tasks=None):
        replace = replace or {}
        kinds = {ParameterKind.LINEAR} | ({ParameterKind.CONVOLUTION} if convolutions else set())
        result = {}
        for task in source.tasks if tasks is None else tasks:
            moments = {}
            for parameter in source.parameters:
                if not parameter.is_matrix or parameter.kind not in kinds:
                    continue
                seen = inputs_of(task, parameter.layer, parameter.matrix_shape[1], rows).astype(np.float64)
                told = seen @ source.matrices(parameter.layer)[1][task].T
                matrix = {
                    "input": seen.T @ seen / rows,
                    "rows": seen / np.sqrt(rows),
                    "cross": told.T @ seen / rows,
                    "output": told.T @ told / rows,
                }[kind]
                matrix = replace.get((task, parameter.layer), matrix)
                if matrix is not None:
                    matrix = torch.tensor(np.asarray(matrix), dtype=torch.float32)
                    moments[parameter.layer] = LayerMoment(kind, matrix, rows)
            result[task] = TaskStatistics(moments, examples=5)
        return result

    return build


@pytest.fixture(scope="session")
def seen_through():
    """Left singular vectors and values of ``matrix (C + damping I)``, with the covariance that statistics hold."""

    def svd(matrix, statistics, layer, damping=DAMPING):
        covariance = statistics[layer].matrix.double().numpy()
        directions, strengths, _ = np.linalg.svd(matrix @ (covariance + damping * np.eye(len(covariance))))
        return directions[:, : len(strengths)], strengths

    return svd


@pytest.fixture(scope="session")
def same_everywhere():
    """Whether two sources give the same tensors for every task and parameter: bit for bit, or within ``abs``."""

    def check(one, other, abs=None):
        for parameter in one.parameters:
            for task in one.tasks:
                left, right = one.expert(task, parameter), other.expert(task, parameter)
                if abs is None:
                    assert torch.equal(left, right), (task, parameter.name)
                else:
                    assert left.numpy() == pytest.approx(right.numpy(), abs=abs), (task, parameter.name)

    return check


@pytest.fixture(scope="session")
def upright():
    """A purified weight as ``d_out x d_in`` in float64."""

    def read(vectors, task, parameter):
        array = vectors.expert(task, parameter).double().numpy()
        assert array.shape == parameter.shape
        return array.T if parameter.input_axis == 0 else array.reshape(len(array), -1)

    return read


@pytest.fixture(scope="module")
def source(make_source):
    """The plain task vectors of the tests here."""
    return make_source()


@pytest.fixture(scope="module")
def statistics(source, capture):
    """What their experts saw."""
    return capture(source)
