"""A source of task vectors in memory, and everything that is needed to write merged folders of a tiny BERT."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from pave_lightning.merging import Evidence
from pave_lightning.merging.folders import MergeContext
from pave_lightning.merging.passes import ForwardPasses
from pave_lightning.statistics import LayerMoment, NormMoment, TaskStatistics
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    ExpertTaskVectors,
    Parameter,
    ParameterKind,
    TaskVectors,
)
from pave_lightning.weights.parameters import kind_of


class ArrayVectors(TaskVectors):
    """Task vectors of plain arrays.

    ``elements`` forces blocks of about that size; ``matrices`` names parameters that are weights of linear layers, of
    which those in ``transposed`` are stored as (d_in, d_out). ``kinds`` says what other parameters are. With
    ``low_rank`` the matrices have factors, of full rank. The layer of a parameter bears its name.
    """

    def __init__(self, vectors, base=None, elements=None, matrices=(), transposed=(), kinds=None, low_rank=False):
        self.low_rank = low_rank
        first = next(iter(vectors.values()), {})
        self.tasks = tuple(vectors)
        self.parameters = tuple(
            Parameter(name, ParameterKind.LINEAR, np.shape(value), 0 if name in transposed else 1, name)
            if name in {*matrices, *transposed}
            else Parameter(name, (kinds or {}).get(name, ParameterKind.OTHER), np.shape(value), None, name)
            for name, value in sorted(first.items())
        )
        zeros = {name: np.zeros(np.shape(value)) for name, value in first.items()}
        self._base = {name: torch.tensor(value, dtype=torch.float32) for name, value in (base or zeros).items()}
        self._vectors = {
            task: {name: torch.tensor(value, dtype=torch.float32) for name, value in named.items()}
            for task, named in vectors.items()
        }
        self._elements = elements

    def base(self, parameter, rows=None):
        tensor = self._base[parameter.name]
        return tensor if rows is None else tensor[rows]

    def expert(self, task, parameter, rows=None):
        tensor = self._base[parameter.name] + self._vectors[task][parameter.name]
        return tensor if rows is None else tensor[rows]

    def factors(self, task, parameter):
        if not self.low_rank or not parameter.is_matrix:
            return None
        matrix = parameter.as_matrix(self.vector(task, parameter)).double()
        return matrix, torch.eye(matrix.shape[1], dtype=torch.float64)

    def without_factors(self, task):
        return None if self.low_rank else super().without_factors(task)

    def blocks(self, parameter, elements=None):
        wanted = elements or self._elements
        return super().blocks(parameter) if wanted is None else super().blocks(parameter, wanted)


@pytest.fixture(scope="session")
def make_source():
    """Build a source from ``{task: {name: array}}``."""
    return ArrayVectors


@pytest.fixture(scope="session")
def described():
    """The parameters of a module as checkpoints of it have them."""

    def describe(module):
        owners = {name: name.rpartition(".") for name, _ in module.named_parameters()}
        kinds = {name: kind_of(module.get_submodule(owner), leaf) for name, (owner, _, leaf) in owners.items()}
        shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
        return tuple(Parameter(name, kind, shapes[name], axis) for name, (kind, axis) in kinds.items())

    return describe


@pytest.fixture
def watched_source(make_source):
    """Build a source as `make_source` does, which notes in ``asked`` of which parameters experts are read."""

    class Watched(make_source):
        def __init__(self, vectors, **options):
            super().__init__(vectors, **options)
            self.asked = []

        def expert(self, task, parameter, rows=None):
            self.asked.append(parameter.name)
            return super().expert(task, parameter, rows)

    return Watched


@pytest.fixture
def adapted(make_source):
    """Build a source from ``{task: {name: (B, A)}}``; ``others`` are plain task vectors beside them."""

    class Adapted(make_source):
        def __init__(self, pairs, others=None, **options):
            self.pairs = pairs
            names = {name for named in pairs.values() for name in named}
            shapes = {n: (len(p[n][0]), p[n][1].shape[1]) for p in pairs.values() for n in p}
            turned = options.get("transposed", ())
            vectors = {task: dict((others or {}).get(task, {})) for task in pairs}
            for task, named in pairs.items():
                for name in names:
                    value = named[name][0] @ named[name][1] if name in named else np.zeros(shapes[name])
                    vectors[task].setdefault(name, value.T if name in turned else value)
            super().__init__(vectors, matrices=options.pop("matrices", names), **options)

        def factors(self, task, parameter):
            pair = self.pairs[task].get(parameter.name)
            return None if pair is None else tuple(torch.tensor(part, dtype=torch.float64) for part in pair)

        def without_factors(self, task):
            return None if self.pairs[task] else "none were given"

    return Adapted


@pytest.fixture(scope="session")
def draw():
    """Draw the factors of adapters."""

    def build(shapes, ranks, seed=0, tasks=("one", "two", "three")):
        """Random factors of each task; ``ranks`` is one rank for all, or one a task."""
        random = np.random.default_rng(seed)
        each = dict(zip(tasks, [ranks] * len(tasks) if isinstance(ranks, int) else ranks, strict=True))
        return {
            task: {
                name: (random.standard_normal((height, each[task])), random.standard_normal((each[task], width)))
                for name, (height, width) in shapes.items()
            }
            for task in tasks
        }

    return build


@pytest.fixture(scope="session")
def make_evidence():
    """Build evidence from ``{task: {layer: rows of inputs (n, d_in)}}``: exact second moments, stored as float32.

    ``norms`` holds, in the same form, the normalised activations ``(n, d)`` that the scales of norms multiply.
    """

    def build(inputs, norms=None):
        statistics = {}
        for task, layers in inputs.items():
            rows = {name: np.asarray(value, dtype=np.float64) for name, value in layers.items()}
            moments = {
                name: LayerMoment("input", torch.tensor(x.T @ x / len(x), dtype=torch.float32), len(x))
                for name, x in rows.items()
            }
            scaled = {name: np.asarray(value, dtype=np.float64) for name, value in (norms or {}).get(task, {}).items()}
            squares = {
                name: NormMoment(torch.tensor((z**2).mean(axis=0), dtype=torch.float32), len(z))
                for name, z in scaled.items()
            }
            statistics[task] = TaskStatistics(moments, examples=1, norms=squares)
        return Evidence(statistics=statistics)

    return build


@pytest.fixture(scope="session")
def random_vectors():
    """Three tasks' vectors of four parameters, multiples of 1/64: sums are exact in any order. Some are zero."""
    random = np.random.default_rng(7)
    shapes = {"a": (7, 5), "b": (11,), "c": (3, 2, 2), "d": ()}
    return {
        task: {name: random.integers(-40, 41, shape) / 64 for name, shape in shapes.items()}
        for task in ("one", "two", "three")
    }


@pytest.fixture(scope="session")
def draw_vectors():
    """Let hypothesis draw task vectors of few distinct values, multiples of 1 / parts: many ties and many zeros."""

    def build(data, shapes, *, tasks, parts):
        def values(shape):
            size = int(np.prod(shape))
            drawn = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
            return np.array(drawn).reshape(shape) / parts

        return {f"task{index}": {name: values(shape) for name, shape in shapes.items()} for index in range(tasks)}

    return build


@pytest.fixture(scope="session")
def context_of():
    """Source and context of merged folders from folders of a base and its experts."""

    def build(base_folder, expert_folders, **facts):
        architecture = Architecture.of_folder(next(iter(expert_folders.values())))
        base = Checkpoint(base_folder, architecture.prefix)
        experts = {task: Checkpoint(folder, architecture.prefix) for task, folder in expert_folders.items()}
        source = ExpertTaskVectors(base, experts, architecture)
        return source, MergeContext(str(base_folder), base, experts, architecture, facts)

    return build


WIDTH, WORDS = 5, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, eps=1e-3)

    def forward(self, hidden, scale):
        return self.norm(hidden + torch.tanh(self.dense(hidden)) * scale)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, scale=1.5)
        return hidden


class Classifier(nn.Module):
    """A head on the first token."""

    base_model_prefix = "backbone"

    def __init__(self, outputs):
        super().__init__()
        self.backbone, self.dropout, self.head = Backbone(), nn.Dropout(0.5), nn.Linear(WIDTH, outputs)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.dropout(self.backbone(input_ids, attention_mask)[:, 0])))


@pytest.fixture
def walkable(make_source):
    """Two experts of a toy stack of blocks, an anchor and examples; every value is random and far from the others.

    The first expert's head has three classes, the second one's is of a regression.
    """
    torch.manual_seed(0)
    base = {name: p.detach().numpy() for name, p in Backbone().named_parameters()}
    random = np.random.default_rng(1)

    def vectors():
        return {name: 0.3 * random.standard_normal(value.shape) for name, value in base.items()}

    matrices = [name for name in base if name.endswith("dense.weight")]
    source = make_source({"one": vectors(), "two": vectors()}, base=base, matrices=matrices)
    anchor = {name: torch.tensor(value, dtype=torch.float32) for name, value in vectors().items()}
    batches = {}
    for task, lengths in (("one", (4, 6)), ("two", (3, 6))):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        batches[task] = [
            {"input_ids": torch.randint(WORDS, (2, 6)), "attention_mask": mask.long(), "labels": torch.zeros(2)}
            for _ in range(3)
        ]

    def backbone():
        made = Backbone().eval()
        made.load_state_dict({name: torch.tensor(value) for name, value in base.items()})
        return made

    def classifier(task):
        torch.manual_seed(7)
        made = Classifier({"one": 3, "two": 1}[task])
        weights = {p.name: source.expert(task, p) for p in source.parameters}
        made.backbone.load_state_dict(weights)
        return made.eval()

    passes = ForwardPasses(backbone, source, batches, classifier=classifier)
    return source, Evidence(passes=passes, anchor=anchor)


@pytest.fixture
def random_source(make_source):
    """Task vectors of matrices, tables and norms, for two tasks or more."""

    def build(tasks, *, low_rank=True):
        random = np.random.default_rng(1)
        shapes = {
            "layers.0.dense": (9, 7),
            "layers.1.dense": (9, 7),
            "table": (13, 6),
            "bias": (11,),
            "turned": (8, 10),
        }
        vectors = {
            f"t{task}": {name: 0.1 * random.standard_normal(shape) for name, shape in shapes.items()}
            for task in range(tasks)
        }
        kinds = {"bias": ParameterKind.BIAS, "table": ParameterKind.EMBEDDING}
        base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
        return make_source(
            vectors,
            base=base,
            kinds=kinds,
            matrices=("layers.0.dense", "layers.1.dense"),
            transposed=("turned",),
            low_rank=True,
        )

    return build
