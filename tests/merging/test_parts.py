"""All methods: neither the division of the parameters into parts, nor their order, nor that of blocks matters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import (
    Evidence,
    MergedVectors,
    MergeMethod,
    Need,
    PartOfVectors,
    PerTaskMethod,
    SequentialMethod,
    StaticMethod,
    begin_parts,
    known_methods,
    merge,
    reduce_states,
)
from pave_lightning.merging.running import within
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.weights import ParameterKind

OURS = {name: kind for name, kind in sorted(known_methods().items()) if kind.__module__.startswith("pave_lightning.")}
SHAPES = {
    "layers.0.dense": (9, 7),
    "layers.1.dense": (9, 7),
    "layers.2.dense": (9, 7),
    "table": (13, 6),
    "bias": (11,),
    "norm": (8,),
    "kernel": (3, 2, 2),
    "number": (),
    "turned": (8, 10),
}
MATRICES = ("layers.0.dense", "layers.1.dense", "layers.2.dense")
TURNED = ("turned",)
TASKS = ("one", "two", "three")
# Methods that merge two experts and no more.
PAIRS = ("slerp",)
# Options under which a method gathers something, or does so in another way; and some that suit models as small as this.
OPTIONS = {
    "ties": [{"density": 0.4}],
    "dare": [{}, {"rescale": "l1"}],
    "dare_ties": [{"density": 0.4}, {"density": 0.4, "rescale": "l1"}],
    "della": [{"drop_rate": 0.5, "window": 0.4, "seed": 3}],
    "breadcrumbs": [{"density": 0.4, "outliers": 0.2}, {"density": 0.4, "per": "tensor"}],
    "cabs": [{"n": 1, "m": 4}],
    "cat": [{"directions": 1, "bias_channels": 1}],
    "consensus": [{}, {"multi_task": "ties", "density": 0.4}],
    "core_space": [{}, {"inner": "ties", "inner_options": {"density": 0.4}}],
    "dc_merge": [{"keep_share": 0.4}],
    "devec": [{"overlap": 0.5}],
    "doge_ta": [{}, {"relative_eta": 0.25}],
    "emr": [{}, {"rescaler": "per_tensor_mean"}],
    "fisher": [{}, {"normalise": False}],
    "iso_cts": [{"common_share": 0.4}],
    "knots": [{"density": 0.4}, {"density": 0.4, "drop_rate": 0.3}, {"density": 1.0}],
    "model_stock": [{}, {"filter_wise": True}],
    "pcb": [{"ratio": 0.4}, {"ratio": 0.4, "accord": "normalised_sum"}, {"ratio": 0.4, "accord": "normalised_pairs"}],
    "peft": [{}, {"combination": "dare_ties_svd", "density": 0.5}],
    "perturb_and_merge": [{}, {"per": "tensor"}],
    "robust_merge": [{"density": 0.5}],
    "slerp": [{"t": 0.3}],
    "tall_masks": [{}, {"multi_task": "ties", "density": 0.4}],
    "tatr": [{"quantile": 0.7}, {"quantile": 1.0}],
    "tatr_zero_shot": [{"quantile": 0.7}],
}
# Where the order of a parameter's blocks differs, too, some sums within the parameter round differently.
ROUNDED = {"awd": 1e-5, "fisher": 1e-6, "opcm": 1e-6, "perturb_and_merge": 1e-5}
EXAMPLES = [name for name, kind in OURS.items() if Need.UNLABELLED_EXAMPLES in kind.needs]
CASES = [(name, options) for name in OURS if name not in EXAMPLES for options in OPTIONS.get(name, [{}])]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])


def make(name, options):
    kind = OURS[name]
    return kind(kind.Options.model_validate(options))


@pytest.fixture(scope="module")
def source_of(make_source):
    """The same task vectors, with the parameters and their blocks in another order, or with blocks of another size."""
    random = np.random.default_rng(5)
    vectors = {task: {n: 0.1 * random.standard_normal(shape) for n, shape in SHAPES.items()} for task in TASKS}
    base = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    kinds = {"norm": ParameterKind.NORM_SCALE, "bias": ParameterKind.BIAS, "table": ParameterKind.EMBEDDING}

    class Turned(make_source):
        def blocks(self, parameter, elements=None):
            return reversed(list(super().blocks(parameter, elements)))

    def build(name, elements=None, *, turned=False):
        few = {task: vectors[task] for task in TASKS[: 2 if name in PAIRS else 3]}
        kind = Turned if turned else make_source
        made = kind(few, base=base, matrices=MATRICES, transposed=TURNED, kinds=kinds, low_rank=True, elements=elements)
        if turned:
            made.parameters = tuple(reversed(made.parameters))
        return made

    return build


@pytest.fixture(scope="module")
def evidence(make_evidence):
    random = np.random.default_rng(6)
    widths = {name: SHAPES[name][1] for name in MATRICES} | {name: SHAPES[name][0] for name in TURNED}
    rows = {task: {layer: random.standard_normal((40, width)) for layer, width in widths.items()} for task in TASKS}
    norms = {task: {"norm": random.standard_normal((40, *SHAPES["norm"]))} for task in TASKS}

    def gradients(kind):
        drawn = {name: torch.tensor(random.exponential(size=shape)).float() for name, shape in SHAPES.items()}
        return TaskGradients(kind, drawn, examples=1)

    return replace(
        make_evidence(rows, norms),
        fisher={task: gradients("fisher") for task in TASKS},
        gradients={task: gradients("absolute") for task in TASKS},
        anchor={name: torch.tensor(0.1 * random.standard_normal(shape)).float() for name, shape in SHAPES.items()},
    )


def merge_part(method, source):
    """All that a method makes of the parameters of one part, block by block; factors and rescalers come later."""
    result = MergedVectors(masks={t: {} for t in source.tasks}, factors={t: {} for t in source.tasks})
    for parameter in source.parameters:
        result.vectors[parameter.name] = torch.empty(parameter.shape)
        for rows in source.blocks(parameter) if method.in_blocks(parameter) else [None]:
            found = method.merge(parameter.block(rows), *source.read(parameter, rows))
            if isinstance(method, PerTaskMethod):
                for task, mask in found.masks.items():
                    whole = torch.empty(parameter.shape, dtype=torch.bool)
                    result.masks[task].setdefault(parameter.name, whole)[within(rows)] = mask
                for task, factors in found.factors.items():
                    result.factors[task][parameter.name] = factors
                found = found.shared
            result.vectors[parameter.name][within(rows)] = found
    return result


def merge_in_parts(methods, source, evidence, *, reduced=True):
    """What the objects make of a source that is divided among them; each brings its own rescalers."""
    parts = [PartOfVectors(source, source.parameters[index :: len(methods)]) for index in range(len(methods))]
    if reduced:
        begin_parts(methods, parts, evidence)
    else:
        for method, part in zip(methods, parts, strict=True):
            method.begin(part, evidence)
    found = [merge_part(method, part) for method, part in zip(methods, parts, strict=True)]
    if reduced:
        reduce_states(methods)
    for method, part, result in zip(methods, parts, found, strict=True):
        if isinstance(method, PerTaskMethod):
            result.rescalers = method.rescalers()
        elif isinstance(method, StaticMethod) and method.rescales:
            for parameter in part.parameters:
                result.vectors[parameter.name] *= method.factor(parameter)
    return found


def together(parts):
    """The results of several parts as one; what all of them know must be the same."""
    assert all(part.rescalers == parts[0].rescalers for part in parts)
    result = MergedVectors(rescalers=parts[0].rescalers)
    for part in parts:
        result.vectors |= part.vectors
        for task in part.masks:
            result.masks[task] = result.masks.get(task, {}) | part.masks[task]
            result.factors[task] = result.factors.get(task, {}) | part.factors[task]
    return result


def differences(found, expected, source, rounding=0.0):
    """Names of the parameters in which two results differ by more than rounding; none where they agree."""
    assert found.vectors.keys() == expected.vectors.keys() == set(SHAPES)

    def differ(one, other):
        return not torch.allclose(one, other, rtol=rounding, atol=rounding * 0.1)

    wrong = set()
    for parameter, vector in expected.vectors.items():
        if differ(found.vectors[parameter], vector):
            wrong.add(parameter)
        for task in source.tasks:
            masks = [result.masks.get(task, {}).get(parameter) for result in (found, expected)]
            factors = [result.factors.get(task, {}).get(parameter) for result in (found, expected)]
            if masks[1] is not None and not torch.equal(*masks):
                wrong.add(parameter)
            if factors[1] is not None and differ(factors[0].tensor(vector.shape), factors[1].tensor(vector.shape)):
                wrong.add(parameter)
    if found.rescalers != pytest.approx(expected.rescalers, rel=1e-12 if rounding else 0.0, abs=0.0):
        wrong.add("the rescalers")
    return wrong


@each_case
@pytest.mark.parametrize("count", [2, 3, len(SHAPES) + 2])
def test_parts_of_the_parameters_give_what_all_of_them_give(name, options, count, source_of, evidence):
    source = source_of(name, elements=12)
    single, methods = make(name, options), [make(name, options) for _ in range(count)]
    expected = merge(single, source, evidence)
    found = together(merge_in_parts(methods, source, evidence))
    assert not differences(found, expected, source)
    if isinstance(single, SequentialMethod):
        assert all(method.state() == single.state() for method in methods)


@each_case
def test_processes_that_share_a_merge_each_come_to_know_all_of_it(name, options, in_processes, source_of, evidence):
    expected = merge(make(name, options), source_of(name, elements=12), evidence)
    for found in in_processes(2, lambda group: merge(make(name, options), source_of(name, 12), evidence, group)):
        assert not differences(found, expected, source_of(name))


def test_states_matter(source_of, evidence):
    """That the parts agree shows something only if methods that gather anything do not agree without reduction."""
    gathering, differing = set(), set()
    for name, options in CASES:
        source, method = source_of(name), make(name, options)
        for _ in method.begin_part(source, evidence):
            method.states.reduce([method.states.gathered()])
            gathering.add(name)
        if method.states.gathered():
            gathering.add(name)
        expected = merge(make(name, options), source, evidence)
        apart = merge_in_parts([make(name, options) for _ in range(2)], source, evidence, reduced=False)
        apart[1].rescalers = apart[0].rescalers
        if differences(together(apart), expected, source):
            differing.add(name)
    assert gathering == differing
    assert {"awd", "consensus", "dare_ties", "doge_ta", "emr", "esm", "fisher", "knots", "opcm", "pcb"} <= gathering
    assert {"perturb_and_merge", "tall_masks", "tatr", "tatr_zero_shot", "ties"} <= gathering


def test_experts_may_be_added_in_parts(source_of, evidence):
    facts = {"method": "opcm", "merged": 4, "divisor": 1.7, "norms": 5.0}
    source, methods = source_of("opcm"), [make("opcm", {}) for _ in range(3)]
    for method in methods:
        method.start_from(facts)
    expected = merge(methods[0], source, evidence)
    state = methods[0].state()
    found = together(merge_in_parts(methods, source, evidence))
    assert not differences(found, expected, source)
    assert methods[2].state() == state


@each_case
@pytest.mark.parametrize("elements", [None, 5, 30])
def test_neither_order_nor_size_of_what_is_merged_matters(name, options, elements, source_of, evidence):
    expected = merge(make(name, options), source_of(name, elements=12), evidence)
    source = source_of(name, elements, turned=True)
    found = merge(make(name, options), source, evidence)
    assert list(found.vectors) == list(reversed(expected.vectors))
    assert not differences(found, expected, source, ROUNDED.get(name, 0.0))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_order_of_parameters_does_not_matter_to_methods_that_run_models(name, walkable):
    source, evidence = walkable
    expected = merge(make(name, {}), source, evidence)
    source.parameters = tuple(reversed(source.parameters))
    found = merge(make(name, {}), source, evidence)
    for parameter, vector in expected.vectors.items():
        assert torch.equal(found.vectors[parameter], vector), parameter


@pytest.mark.parametrize("name", EXAMPLES)
def test_methods_that_cannot_be_divided_say_why(name, walkable):
    source, evidence = walkable
    kind = OURS[name]
    assert not kind.parallel
    parts = [PartOfVectors(source, source.parameters[index::2]) for index in range(2)]
    message = f"'{name}' cannot be divided among 2 parts of the parameters: {kind.serial_because}"
    with pytest.raises(PaveError, match=message):
        begin_parts([make(name, {}), make(name, {})], parts, evidence)


def test_all_others_can_be_divided():
    assert {name for name, kind in OURS.items() if not kind.parallel} == set(EXAMPLES)


@pytest.mark.parametrize("name", OURS)
def test_no_method_is_a_special_case_of_another(name):
    """What methods share are functions and bases, so that one can be read without the others."""
    registered = set(known_methods().values())
    ancestors = [kind for kind in OURS[name].__mro__[1:] if issubclass(kind, MergeMethod)]
    assert not registered & set(ancestors)
    # One line of descent: nothing is mixed in.
    assert all(len([base for base in kind.__bases__ if issubclass(base, MergeMethod)]) <= 1 for kind in ancestors)
    assert len([base for base in OURS[name].__bases__ if issubclass(base, MergeMethod)]) == 1


def test_parts_that_are_not_at_the_same_point_are_told(source_of):
    methods = [make("emr", {}), make("ties", {})]
    steps = [method.begin_part(source_of("emr"), Evidence()) for method in methods]
    assert [next(step, "done") for step in steps] == ["done", None]
    with pytest.raises(ValueError, match="not gathered the same states: own magnitudes, masked magnitudes; magnitudes"):
        reduce_states(methods)


def test_a_part_has_the_sources_factors(source_of):
    source = source_of("peft")
    part = PartOfVectors(source, source.parameters[:1])
    first = source.parameters[0]
    assert part.parameters == (first,)
    assert part.scaling("one", first) == source.scaling("one", first)
    found, expected = (vectors.factors("one", source.parameters[3]) for vectors in (part, source))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
