"""What every merge method promises, asked of each registered one on a tiny model that can be run.

A new method is asked without a line here, with its default options. What is true of some methods only, and with which
options it shows, stands in the tables at the top.
"""

import gc
import random
from dataclasses import replace
from functools import cache, partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pave_lightning.errors import PaveError
from pave_lightning.merging import Cost, Evidence, Need, known_methods, merge, merge_per_task, merge_static
from pave_lightning.merging.passes import ForwardPasses
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, Parameter, ParameterKind

OURS = {name: kind for name, kind in sorted(known_methods().items()) if kind.__module__.startswith("pave_lightning.")}
# Options for a model of some hundred weights, where the defaults would keep nothing or everything.
SMALL = {
    "breadcrumbs": {"density": 0.4, "outliers": 0.2},
    "cabs": {"n": 1, "m": 4},
    "cat": {"directions": 1, "bias_channels": 1},
    "dare": {"seed": 3},
    "dare_ties": {"seed": 3, "density": 0.4},
    "dc_merge": {"keep_share": 0.4},
    "della": {"drop_rate": 0.5, "window": 0.4, "seed": 3},
    "devec": {"overlap": 0.5},
    "distillation": {"epochs": 1},
    "doge_ta": {"steps": 20},
    "iso_cts": {"common_share": 0.4},
    "knots": {"density": 0.4},
    "pcb": {"ratio": 0.4},
    "robust_merge": {"density": 0.5},
    "slerp": {"t": 0.3},
    "tatr": {"quantile": 0.7},
    "tatr_zero_shot": {"quantile": 0.7},
    "ties": {"density": 0.4},
    "wudi": {"steps": 20},
}
# Options with which a method gives back what all experts agree on, and how many times it does, with three of them.
AGREEMENT = {
    "ace": ({"prior": False, "gate": "never"}, 1),
    "average": ({}, 1),
    "awd": ({}, 3),
    "bmm": ({}, 1),
    "bmm_data_free": ({}, 1),
    "breadcrumbs": ({"density": 1.0, "outliers": 0.0}, 3),
    "consensus": ({}, 3),
    "core_space": ({"inner": "task_arithmetic", "others": "sum"}, 3),
    "dare": ({"drop_rate": 0.0}, 3),
    "dare_ties": ({"drop_rate": 0.0, "density": 1.0}, 1),
    "della": ({"drop_rate": 0.0, "window": 0.0}, 1),
    "devec": ({"shared_weight": 0.0}, 3),
    "distillation": ({"rate": 1e-6}, 1),
    "emr": ({}, 1),
    "featcal": ({"extrapolation": 1.0}, 1),
    "fisher": ({}, 1),
    "knots": ({"density": 1.0}, 1),
    "lot": ({}, 1),
    "model_stock": ({}, 1),
    "pcb": ({"ratio": 1.0, "tails": 0.0}, 1),
    "peft": ({"combination": "cat", "others": "sum"}, 3),
    "perturb_and_merge": ({}, 1),
    "regmean": ({}, 1),
    "regmean_plus_plus": ({}, 1),
    "robust_merge": ({"density": 1.0, "factor_weight": 1.0, "others": "sum"}, 3),
    "slerp": ({}, 1),
    "swudi": ({"time": 1e6, "others": "mean"}, 1),
    "tall_masks": ({}, 3),
    "task_arithmetic": ({}, 3),
    "tatr": ({"quantile": 1.0}, 3),
    "tatr_zero_shot": ({"quantile": 1.0}, 3),
    "ties": ({"density": 1.0}, 1),
    "tsv_c": ({"rank_share": 1.0}, 1),
    "weighted_average": ({}, 1),
}
# Options with which a third expert that equals the base changes nothing, or only how many experts a mean is over.
IDLE = {
    "ace": ({"others": "base"}, 1),
    "average": ({}, 2 / 3),
    "awd": ({}, 1),
    "breadcrumbs": (SMALL["breadcrumbs"], 1),
    "consensus": ({}, 1),
    "core_space": ({"inner": "task_arithmetic", "others": "sum"}, 1),
    "dare": (SMALL["dare"], 1),
    "dare_ties": (SMALL["dare_ties"], 1),
    "della": (SMALL["della"], 1),
    "emr": ({}, 1),
    "iso_c": ({"others": "sum"}, 1),
    "knots": (SMALL["knots"] | {"others": "sum"}, 1),
    "opcm": ({}, 2 / 3),
    "peft": ({"others": "sum"}, 1),
    "robust_merge": (SMALL["robust_merge"] | {"others": "sum"}, 1),
    "swudi": ({}, 1),
    "tall_masks": ({}, 1),
    "task_arithmetic": ({}, 1),
    "tatr_zero_shot": (SMALL["tatr_zero_shot"], 1),
    "ties": (SMALL["ties"], 1),
    "weighted_average": ({}, 2 / 3),
    "wudi": ({}, 1),
}
# Methods that merge two experts and no more.
PAIRS = {"slerp"}
# Methods that run models.
RUNNING = [name for name, kind in OURS.items() if Need.UNLABELLED_EXAMPLES in kind.needs]
# Choices with which the size of the weights matters, as it does to models that are run; options with which it does not.
WITH_UNIT = {"ace": {"form": "published"}, "esm": {"magnitude": "unit"}, "pcb": {"accord": "normalised_sum"}}
WITHOUT_UNIT = {"doge_ta": {"relative_eta": 1.0}, "pcb": {"ratio": 0.4, "accord": "normalised_pairs"}}
# Elementwise methods whose sums are rounded as the tasks come; those of the others are the same in any order.
ROUNDED = {"average", "dare", "dare_ties", "task_arithmetic", "ties"}
# Methods that look at rows as they are stored, or draw for each element by its place.
BY_STORAGE = {"breadcrumbs", "cabs", "dare", "dare_ties", "della"}
# What is told where something that a method needs is not there.
LACKING = {
    Need.ANCHOR: "in a recipe name that method's merge step with the key 'anchor'",
    Need.FISHER: "task 'one' has no Fisher information; `pave merge` takes it",
    Need.GRADIENTS: "task 'one' has no labelled gradients; `pave merge` takes it",
    Need.INPUT_MOMENTS: "task 'one' has no captured statistics; run `pave capture`",
    Need.LOW_RANK: "task 'one' has no low-rank adapters: these task vectors are no products of adapters",
    Need.NORM_MOMENTS: "task 'one' has no captured statistics; run `pave capture`",
    Need.UNLABELLED_EXAMPLES: "task 'one': unlabelled examples are needed, but none were given",
}
# Which part of the evidence serves which needs.
EVIDENCE = {
    "statistics": {Need.INPUT_MOMENTS, Need.NORM_MOMENTS},
    "passes": {Need.UNLABELLED_EXAMPLES},
    "anchor": {Need.ANCHOR},
    "fisher": {Need.FISHER},
    "gradients": {Need.GRADIENTS},
}
TASKS = ("one", "two", "three")


def choices(but=()):
    """Each method with its default options, then with every other value of an option that is a choice."""
    for name, kind in OURS.items():
        found = {name: {}}
        for option, field in kind.Options.model_fields.items():
            values = (True, False) if field.annotation is bool else get_args(field.annotation)
            # What becomes of other parameters is one function of all methods; half precision is not exact.
            if option not in ("others", "precision"):
                others = [value for value in values if isinstance(value, str | bool) and value != field.default]
                found |= {f"{name}-{option}={value}": {option: value} for value in others}
        yield from (pytest.param(name, choice, id=key) for key, choice in found.items() if name not in but)


def each_choice(but=()):
    return pytest.mark.parametrize(("name", "choice"), list(choices(but)))


def each_method(names=tuple(OURS)):
    return pytest.mark.parametrize("name", names)


WORDS, WIDTH, INNER = 10, 6, 8


class Block(nn.Module):
    """One weight is stored as ``(d_out, d_in)`` and one as ``(d_in, d_out)``; which is which, may be turned round."""

    def __init__(self, turned):
        super().__init__()
        self.up = Conv1D(INNER, WIDTH) if turned else nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH) if turned else Conv1D(WIDTH, INNER)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden):
        return self.norm(hidden + self.down(torch.tanh(self.up(hidden))))


class Backbone(nn.Module):
    """A table, a kernel of three axes, a single number, and two blocks with weights of both layouts."""

    def __init__(self, turned=False):
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList([Block(turned), Block(turned)])
        self.kernel, self.gain = nn.Parameter(torch.zeros(3, 2, 2)), nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids) * (1 + self.gain) + self.kernel.mean()
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Classifier(nn.Module):
    base_model_prefix = "backbone"

    def __init__(self, outputs, turned):
        super().__init__()
        self.backbone, self.head = Backbone(turned), nn.Linear(WIDTH, outputs)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.backbone(input_ids, attention_mask)[:, 0]))


def load(backbone, values):
    backbone.load_state_dict(values)
    return backbone.eval()


def drawn(seed):
    """A value for each parameter, some of them zero."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in Backbone().named_parameters()}
    return {name: 0.4 * rng.standard_normal(shape) * (rng.random(shape) > 0.05) for name, shape in shapes.items()}


def rounded(named):
    """The values rounded to multiples of 1/64: bfloat16 holds them, and sums of a few of them, exactly."""
    return {name: np.clip(np.round(value * 64), -40, 40) / 64 for name, value in named.items()}


def positive(rng, parameter):
    """Random values that are the same however a matrix is stored."""
    drawn = rng.exponential(size=parameter.matrix_shape if parameter.is_matrix else parameter.shape)
    values = torch.tensor(drawn, dtype=torch.float32)
    return parameter.from_matrix(values) if parameter.is_matrix else values


def turn(named):
    """The values for a model whose blocks are turned round."""
    return {key: value.T if key.endswith(("up.weight", "down.weight")) else value for key, value in named.items()}


BASE = drawn(99)
STILL = {name: 0 * value for name, value in BASE.items()}
GIVEN = {task: drawn(seed) for seed, task in enumerate(TASKS)}
OTHER = {task: drawn(seed) for seed, task in enumerate(TASKS, start=7)}


@pytest.fixture(scope="session")
def known(make_evidence, described):
    """What is known of each task's data, for weights in their usual layout or turned round: the same data in both."""

    @cache
    def build(turned):
        rng = np.random.default_rng(3)
        parameters = described(Backbone(turned))
        matrices = [parameter for parameter in parameters if parameter.is_matrix]
        scales = [parameter for parameter in parameters if parameter.kind is ParameterKind.NORM_SCALE]
        rows = {task: {p.layer: rng.standard_normal((40, p.matrix_shape[1])) for p in matrices} for task in TASKS}
        norms = {task: {p.layer: rng.standard_normal((40, *p.shape)) for p in scales} for task in TASKS}
        sizes = {task: {p.name: positive(rng, p) for p in parameters} for task in TASKS}
        batches = {}
        for task in TASKS:
            mask = torch.arange(6) < torch.tensor(rng.integers(2, 7, (3, 4)))[..., None]
            ids = torch.tensor(rng.integers(0, WORDS, (3, 4, 6)))
            batches[task] = [{"input_ids": i, "attention_mask": m.long()} for i, m in zip(ids, mask, strict=True)]
        evidence = replace(
            make_evidence(rows, norms),
            fisher={task: TaskGradients("fisher", named, examples=1) for task, named in sizes.items()},
            gradients={task: TaskGradients("absolute", named, examples=1) for task, named in sizes.items()},
        )
        return evidence, batches

    return build


@pytest.fixture(scope="session")
def case_of(make_source, described, known):
    """Source and evidence, with all that any method needs, from a method's name and ``{task: {name: task vector}}``."""

    def build(name, given=GIVEN, base=BASE, *, turned=False, low_rank=True, **options):
        given = {task: given[task] for task in list(given)[: 2 if name in PAIRS else None]}
        source = make_source(given, base=base, low_rank=low_rank, **options)
        source.parameters = described(Backbone(turned))
        evidence, batches = known(turned)

        def backbone():
            with torch.random.fork_rng():
                return load(Backbone(turned), source._base)

        def classifier(task):
            with torch.random.fork_rng():
                made = Classifier(2 + TASKS.index(task), turned)
                torch.manual_seed(7)
                made.head.reset_parameters()
            load(made.backbone, {p.name: source.expert(task, p) for p in source.parameters})
            return made.eval()

        mean = {
            p.name: torch.stack([source.vector(task, p) for task in sorted(source.tasks)]).mean(dim=0)
            for p in source.parameters
        }
        passes = ForwardPasses(backbone, source, batches, classifier=classifier)
        return source, replace(evidence, passes=passes, anchor=mean)

    return build


@pytest.fixture(scope="session")
def usual(case_of):
    """What a method makes of the usual task vectors, with one choice; merged once."""
    found = {}

    def result(name, **choice):
        key = name, *choice.items()
        if key not in found:
            found[key] = run(name, case_of(name), **choice)
        return found[key]

    return result


@pytest.fixture
def stored(tmp_path):
    """The same task vectors, read from files in another precision, which holds all their values exactly."""

    def build(source, dtype):
        found = {}
        for task in ("base", *source.tasks):
            (folder := tmp_path / str(dtype) / task).mkdir(parents=True)
            read = source.base if task == "base" else partial(source.expert, task)
            save_file({p.name: read(p).to(dtype) for p in source.parameters}, folder / "model.safetensors")
            found[task] = Checkpoint(folder, "")
        parameters = {parameter.name: parameter for parameter in source.parameters}
        files = ExpertTaskVectors(found.pop("base"), found, Architecture("", "", parameters))
        # Of the files' experts no adapters are known.
        files.factors, files.without_factors = source.factors, source.without_factors
        return files

    return build


def make(name, options=None, **choice):
    kind = OURS[name]
    return kind(kind.Options.model_validate((SMALL.get(name, {}) if options is None else options) | choice))


def bytes_of(root, apart_from):
    """What the tensors take that can be reached from an object, without those of others."""
    seen, found, left = {id(one) for one in apart_from}, {}, [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | FunctionType | ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        left += gc.get_referents(one)
    return sum(found.values())


def run(name, case, options=None, **choice):
    return merge(make(name, options, **choice), *case)


def differing(found, expected, *, exact=False, factor=1.0):
    """Names of the parameters of which some task's own task vectors are not a factor times the expected ones."""
    assert found.vectors.keys() == expected.vectors.keys()

    def agree(first, second):
        return torch.equal(first, second) if exact else torch.allclose(first, second, rtol=1e-4, atol=1e-5)

    return [
        name
        for name in expected.vectors
        if not all(agree(found.own(task, name) / factor, expected.own(task, name)) for task in TASKS)
    ]


@each_choice()
def test_the_result_is_whole_and_finite(name, choice, case_of, usual):
    (source, _), found = case_of(name), usual(name, **choice)
    assert list(found.vectors) == [parameter.name for parameter in source.parameters]
    for parameter in source.parameters:
        vector = found.vectors[parameter.name]
        assert (vector.shape, vector.dtype) == (parameter.shape, torch.float32)
        assert torch.isfinite(vector).all()
    assert any(found.own(task, key).any() for task in source.tasks for key in found.vectors)
    assert found.per_task == (OURS[name].form == "per-task")
    assert isinstance(OURS[name].cost, Cost)
    assert set(found.rescalers) == (set(source.tasks) if found.per_task else set())
    assert all(mask.dtype == torch.bool for masks in found.masks.values() for mask in masks.values())


@each_choice()
def test_blocks_of_rows_give_what_whole_tensors_give(name, choice, case_of, usual):
    whole = usual(name, **choice)
    for elements in (4, 12):
        parts = run(name, case_of(name, elements=elements), **choice)
        assert all(torch.equal(vector, whole.vectors[key]) for key, vector in parts.vectors.items())
        assert parts.rescalers == pytest.approx(whole.rescalers, rel=1e-12)
        assert not differing(parts, whole)


@each_choice()
def test_what_is_handed_over_stays_as_it_is_and_what_comes_back_fits(name, choice, case_of, monkeypatch):
    source, evidence = case_of(name, elements=5)
    method, sizes, plain = make(name, **choice), {}, OURS[name].merge

    def watched(self, parameter, base, vectors):
        assert list(vectors) == list(source.tasks)
        given = {"base": base, **vectors}
        assert all(tensor.shape == base.shape and tensor.dtype == torch.float32 for tensor in given.values())
        before = {key: tensor.clone() for key, tensor in given.items()}
        merged = plain(self, parameter, base, vectors)
        assert all(torch.equal(tensor, before[key]) for key, tensor in given.items())
        shared = merged if isinstance(merged, torch.Tensor) else merged.shared
        assert (shared.shape, shared.dtype) == (base.shape, torch.float32)
        sizes.setdefault(parameter.name, []).append(base.numel())
        return merged

    def contents():
        weights = [source._base, *source._vectors.values(), evidence.anchor]
        gradients = [*evidence.fisher.values(), *evidence.gradients.values()]
        moments = [moment.matrix for statistics in evidence.statistics.values() for moment in statistics.values()]
        tensors = [tensor for named in (*weights, *gradients) for tensor in named.values()]
        return [tensor.clone() for tensor in tensors + moments]

    monkeypatch.setattr(OURS[name], "merge", watched)
    before = contents()
    merge(method, source, evidence)
    assert all(map(torch.equal, before, contents()))
    for parameter in source.parameters:
        assert sum(sizes[parameter.name]) == parameter.elements
        # A block is at least one row, and the longest row of what may be cut has six elements.
        assert max(sizes[parameter.name]) <= (6 if method.in_blocks(parameter) else parameter.elements)


@each_choice()
def test_the_order_of_tasks_matters_only_where_a_method_says_so(name, choice, case_of, usual):
    tasks, expected = case_of(name)[0].tasks, usual(name, **choice)
    found = run(name, case_of(name, {task: GIVEN[task] for task in reversed(tasks)}), **choice)
    if OURS[name].ordered:
        assert differing(found, expected)
    else:
        assert not differing(found, expected, exact=OURS[name].elementwise and name not in ROUNDED)
        assert found.rescalers == pytest.approx(expected.rescalers, rel=1e-12)


@each_choice()
def test_the_size_of_the_weights_matters_only_where_it_is_known_to(name, choice, case_of):
    """Multiples of base and experts give that multiple of the result, also where task vectors are as small as usual."""
    options = WITHOUT_UNIT.get(name)
    expected = run(name, case_of(name, GIVEN, BASE), options, **choice)
    for factor in (2.0**-12, 8.0):
        *given, base = ({key: factor * value for key, value in named.items()} for named in (*GIVEN.values(), BASE))
        found = run(name, case_of(name, dict(zip(TASKS, given, strict=True)), base), options, **choice)
        assert bool(differing(found, expected, factor=factor)) == (name in RUNNING or choice == WITH_UNIT.get(name))


@each_choice(but=BY_STORAGE)
def test_how_a_weight_is_stored_does_not_matter(name, choice, case_of, usual):
    given = {task: turn(named) for task, named in GIVEN.items()}
    found = run(name, case_of(name, given, turn(BASE), turned=True), **choice)
    for task in TASKS:
        expected = turn({key: usual(name, **choice).own(task, key) for key in found.vectors})
        assert all(torch.allclose(found.own(task, key), expected[key], rtol=1e-4, atol=1e-4) for key in expected)


@each_choice()
def test_experts_that_equal_the_base_give_the_base(name, choice, case_of):
    merged = run(name, case_of(name, dict.fromkeys(TASKS, STILL)), **choice)
    rounding = 1e-5 if name in RUNNING else 0
    assert all(float(merged.own(task, key).abs().max()) <= rounding for task in TASKS for key in STILL)


@each_method()
def test_an_expert_that_equals_the_base_takes_nothing_from_the_others(name, case_of):
    source, evidence = case_of(name, {"one": GIVEN["one"], "two": STILL, "three": GIVEN["three"]})
    options, factor = IDLE.get(name, (None, None))
    merged = run(name, (source, evidence), options)
    assert all(torch.isfinite(merged.own(task, key)).all() for task in source.tasks for key in STILL)
    assert any(merged.own("one", key).any() for key in STILL)
    if merged.per_task:
        assert not any(merged.own("two", key).any() for key in STILL)
    if factor is not None:
        alone = run(name, case_of(name, {"one": GIVEN["one"], "three": GIVEN["three"]}), options)
        for task in ("one", "three"):
            pairs = [(merged.own(task, key), factor * alone.own(task, key)) for key in STILL]
            assert all(torch.allclose(found, expected, rtol=1e-4, atol=1e-5) for found, expected in pairs)


@each_method()
def test_what_all_experts_agree_on_is_not_turned_away(name, case_of):
    source, evidence = case_of(name, dict.fromkeys(TASKS, GIVEN["one"]))
    options, times = AGREEMENT.get(name, (None, None))
    merged = run(name, (source, evidence), options)
    for task in source.tasks:
        pairs = [(merged.own(task, p.name), source.vector(task, p)) for p in source.parameters]
        if times is None:
            assert sum(float((own * vector).sum()) for own, vector in pairs) > 0
        else:
            rounding = 1e-4 if name in RUNNING else 2e-6
            assert all(torch.allclose(own, times * vector, atol=rounding) for own, vector in pairs)


@each_method()
def test_chance_comes_from_the_seed_alone(name, case_of, usual):
    """Twice the same, bit for bit, whatever was drawn elsewhere; and what is drawn elsewhere stays what it is."""

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    case = case_of(name)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(12345)
    before = states()
    found = run(name, case)
    assert states() == before
    assert not differing(found, usual(name), exact=True)
    assert found.rescalers == usual(name).rescalers


@each_method()
def test_experts_in_half_precision_are_read_as_float32(name, case_of, stored):
    given = {task: rounded(named) for task, named in GIVEN.items()}
    source, evidence = case_of(name, given, rounded(BASE))
    expected = run(name, (source, evidence))
    for dtype in (torch.bfloat16, torch.float16):
        assert not differing(run(name, (stored(source, dtype), evidence)), expected, exact=True)


@each_choice()
def test_a_second_merge_with_one_object_begins_anew(name, choice, case_of, usual):
    method = make(name, **choice)
    merge(method, *case_of(name, OTHER))
    assert not differing(merge(method, *case_of(name)), usual(name, **choice), exact=True)


@each_method()
def test_a_merge_that_was_broken_off_does_not_shift_the_next(name, case_of, usual):
    method = make(name)
    next((merge_per_task if OURS[name].form == "per-task" else merge_static)(method, *case_of(name, OTHER)))
    assert not differing(merge(method, *case_of(name)), usual(name), exact=True)


@each_method()
def test_what_is_lacking_is_told_with_what_to_do(name, case_of):
    source, _ = case_of(name, low_rank=Need.LOW_RANK not in OURS[name].needs)
    if not OURS[name].needs:
        assert run(name, (source, Evidence())).vectors
        return
    with pytest.raises(PaveError) as caught:
        run(name, (source, Evidence()))
    assert all(LACKING[need] in str(caught.value) for need in make(name).wanted)


@each_method()
def test_nothing_is_used_but_what_is_asked_for(name, case_of, usual):
    source, evidence = case_of(name)
    wanted = make(name).wanted
    given = {part: getattr(evidence, part) for part, needs in EVIDENCE.items() if needs & wanted}
    assert not differing(run(name, (source, Evidence(**given))), usual(name), exact=True)


@each_method()
def test_the_weights_are_read_beforehand_only_where_a_method_says_so(name, case_of, monkeypatch):
    source, evidence = case_of(name)
    # The factors of adapters are small, and lie in files of their own.
    factors = {(task, p.name): source.factors(task, p) for task in source.tasks for p in source.parameters}
    monkeypatch.setattr(source, "factors", lambda task, parameter: factors[task, parameter.name])
    read, plain = [], source.expert

    def expert(task, parameter, rows=None):
        read.append(parameter.name)
        return plain(task, parameter, rows)

    monkeypatch.setattr(source, "expert", expert)
    make(name).begin(source, evidence)
    assert bool(read) == OURS[name].whole_model_pass


@each_method(RUNNING)
def test_which_examples_share_a_batch_matters_only_where_a_method_says_so(name, case_of, usual):
    source, evidence = case_of(name)
    cuts = slice(0, 1), slice(1, 4)
    parts = {
        task: [{key: value[cut] for key, value in batch.items()} for batch in batches for cut in cuts]
        for task, batches in evidence.passes.batches.items()
    }
    found = run(name, (source, replace(evidence, passes=replace(evidence.passes, batches=parts))))
    assert bool(differing(found, usual(name))) == OURS[name].batched


@each_method()
def test_no_more_models_are_held_than_a_method_says(name, case_of, monkeypatch):
    source, evidence = case_of(name)
    method, held, plain = make(name), [], OURS[name].merge

    def watched(self, *given):
        merged = plain(self, *given)
        held.append(bytes_of(self, apart_from=(source, evidence)))
        return merged

    monkeypatch.setattr(OURS[name], "merge", watched)
    merge(method, source, evidence)
    model = 4 * sum(parameter.elements for parameter in source.parameters)
    assert max(held) <= model * (method.held_models + 0.1)
    assert method.held_models or not getattr(method, "rescales", False)


@each_choice(but=RUNNING)
def test_tensors_without_elements(name, choice, case_of):
    """They come back as they are, or are refused by name."""
    source, evidence = case_of(name)
    empty = {"nothing": torch.zeros(0, 4), "narrow.weight": torch.zeros(3, 0)}
    for named in (source._base, *source._vectors.values()):
        named.update(empty)
    source.parameters += (Parameter("nothing", ParameterKind.OTHER, (0, 4)),)
    narrow = Parameter("narrow.weight", ParameterKind.LINEAR, (3, 0), 1)
    gradients = {
        part: {task: TaskGradients(one.kind, {**one, **empty}, examples=1) for task, one in found.items()}
        for part, found in (("fisher", evidence.fisher), ("gradients", evidence.gradients))
    }
    evidence = replace(evidence, anchor=evidence.anchor | empty, **gradients)
    assert run(name, (source, evidence), **choice).vectors["nothing"].shape == (0, 4)
    source.parameters += (narrow,)
    refusals = list(make(name, **choice).problems(source, evidence))
    if refusals:
        assert all("narrow.weight" in refusal for refusal in refusals)
    else:
        assert run(name, (source, evidence), **choice).vectors["narrow.weight"].shape == (3, 0)
