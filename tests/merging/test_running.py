"""What holds for every method."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import Cost, Evidence, MatrixMethod, MatrixOptions, Need, StaticMethod, known_methods, merge
from pave_lightning.merging.methods.average import Average
from pave_lightning.statistics.gradients import TaskGradients

OURS = {name: kind for name, kind in sorted(known_methods().items()) if kind.__module__.startswith("pave_lightning.")}
# Options for models of a few dozen weights, where the defaults would keep nothing or everything.
SMALL = {
    "breadcrumbs": {"density": 0.4, "outliers": 0.2},
    "cabs": {"n": 1, "m": 4},
    "della": {"drop_rate": 0.5, "window": 0.4, "seed": 3},
    "pcb": {"ratio": 0.4},
    "slerp": {"t": 0.3},
    "cat": {"directions": 1, "bias_channels": 1},
    "ties": {"density": 0.4},
    "dare": {"drop_rate": 0.5, "seed": 3},
    "dare_ties": {"drop_rate": 0.5, "seed": 3, "density": 0.4},
    "dc_merge": {"keep_share": 0.4},
    "knots": {"density": 0.4},
    "robust_merge": {"density": 0.5},
    "devec": {"overlap": 0.5},
    "iso_cts": {"common_share": 0.4},
}
# Options with which a method gives back what experts agree on, and how many times it does.
HARMLESS = {
    "ace": ({"prior": False, "gate": "never"}, 1),
    "average": ({}, 1),
    "awd": ({}, 3),
    "breadcrumbs": ({"density": 1.0, "outliers": 0.0}, 3),
    "consensus": ({}, 3),
    "della": ({"drop_rate": 0.0, "window": 0.0}, 1),
    "fisher": ({}, 1),
    "model_stock": ({}, 1),
    "pcb": ({"ratio": 1.0, "tails": 0.0}, 1),
    "perturb_and_merge": ({}, 1),
    "slerp": ({}, 1),
    "tall_masks": ({}, 3),
    "weighted_average": ({}, 1),
    "tatr": ({"quantile": 1.0}, 3),
    "tatr_zero_shot": ({"quantile": 1.0}, 3),
    "swudi": ({"time": 1e6, "others": "mean"}, 1),
    "task_arithmetic": ({}, 3),
    "ties": ({"density": 1.0}, 1),
    "emr": ({}, 1),
    "dare": ({"drop_rate": 0.0}, 3),
    "dare_ties": ({"drop_rate": 0.0, "density": 1.0}, 1),
    "core_space": ({"inner": "task_arithmetic", "others": "sum"}, 3),
    "devec": ({"shared_weight": 0.0}, 3),
    "knots": ({"density": 1.0}, 1),
    "lot": ({}, 1),
    "peft": ({"combination": "cat", "others": "sum"}, 3),
    "regmean": ({}, 1),
    "robust_merge": ({"density": 1.0, "factor_weight": 1.0, "others": "sum"}, 3),
    "tsv_c": ({"rank_share": 1.0}, 1),
}
# Methods that run models or calibrate merged ones, on a model that can be run.
CALIBRATING = [name for name, kind in OURS.items() if {Need.UNLABELLED_EXAMPLES, Need.ANCHOR} & kind.needs]
RUN_HERE = [name for name in OURS if name not in CALIBRATING]
each_rule = pytest.mark.parametrize("rule", RUN_HERE)
each_calibrating_rule = pytest.mark.parametrize("rule", CALIBRATING)
MATRIX = "a"
# Methods that merge two experts and no more.
PAIRS = ("slerp",)


def make(rule, options=None):
    kind = OURS[rule]
    return kind(kind.Options.model_validate(SMALL.get(rule, {}) if options is None else options))


@pytest.fixture
def evidence(make_evidence, random_vectors):
    random = np.random.default_rng(3)
    rows = {
        task: {MATRIX: random.standard_normal((40, named[MATRIX].shape[1]))} for task, named in random_vectors.items()
    }

    def gradients(kind, named):
        drawn = {name: torch.tensor(random.exponential(size=value.shape)).float() for name, value in named.items()}
        return TaskGradients(kind, drawn, examples=1)

    return replace(
        make_evidence(rows),
        fisher={task: gradients("fisher", named) for task, named in random_vectors.items()},
        gradients={task: gradients("absolute", named) for task, named in random_vectors.items()},
    )


@pytest.fixture
def source_of(make_source):
    def build(vectors, **options):
        return make_source(vectors, matrices=[MATRIX], low_rank=True, **options)

    return build


def chosen(rule, vectors):
    """The tasks that a method can merge."""
    return dict(list(vectors.items())[:2]) if rule in PAIRS else vectors


def agree(first, second, exact):
    """Whether two tensors agree, to the bit or as well as decompositions of float32 matrices do."""
    return torch.equal(first, second) if exact else torch.allclose(first, second, rtol=1e-4, atol=1e-5)


@each_rule
def test_the_order_of_tasks_does_not_matter(rule, source_of, random_vectors, evidence):
    random_vectors = chosen(rule, random_vectors)
    turned = {task: random_vectors[task] for task in sorted(random_vectors, reverse=True)}
    first = merge(make(rule), source_of(random_vectors), evidence)
    second = merge(make(rule), source_of(turned), evidence)
    if OURS[rule].ordered:
        assert any(not torch.equal(vector, second.vectors[name]) for name, vector in first.vectors.items())
        return
    for name, vector in first.vectors.items():
        assert agree(vector, second.vectors[name], OURS[rule].elementwise)
        for task in random_vectors:
            assert agree(first.own(task, name), second.own(task, name), OURS[rule].elementwise)
    assert first.rescalers == second.rescalers


@each_rule
@pytest.mark.parametrize("elements", [1, 4, 7, 12])
def test_blocks_of_rows_give_what_whole_tensors_give(rule, elements, source_of, random_vectors, evidence):
    random_vectors = chosen(rule, random_vectors)
    whole = merge(make(rule), source_of(random_vectors), evidence)
    parts = merge(make(rule), source_of(random_vectors, elements=elements), evidence)
    for name, vector in whole.vectors.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, parts.vectors[name])
        for task in random_vectors:
            assert torch.allclose(whole.own(task, name), parts.own(task, name), rtol=1e-6)
    assert parts.rescalers == pytest.approx(whole.rescalers, rel=1e-12)


@each_rule
def test_rules_are_fed_blocks_where_they_allow_it(rule, source_of, random_vectors, evidence, monkeypatch):
    random_vectors = chosen(rule, random_vectors)
    method, sizes = make(rule), {}
    plain = type(method).merge

    def watched(self, parameter, base, vectors):
        sizes.setdefault(parameter.name, []).append(base.numel())
        assert all(vector.shape == base.shape for vector in vectors.values())
        return plain(self, parameter, base, vectors)

    monkeypatch.setattr(type(method), "merge", watched)
    source = source_of(random_vectors, elements=5)
    merge(method, source, evidence)
    for parameter in source.parameters:
        assert sum(sizes[parameter.name]) == parameter.elements
        limit = 5 if method.in_blocks(parameter) else parameter.elements
        assert max(sizes[parameter.name]) <= limit


def test_rules_that_are_not_elementwise_get_whole_tensors(make_source, random_vectors):
    shapes = []

    class Whole(Average):
        elementwise = False

        def merge(self, parameter, base, vectors):
            shapes.append(tuple(base.shape))
            return super().merge(parameter, base, vectors)

    merge(Whole(), make_source(random_vectors, elements=2))
    assert shapes == [(7, 5), (11,), (3, 2, 2), ()]


@pytest.mark.parametrize("rule", HARMLESS)
def test_what_all_experts_agree_on_is_kept(rule, source_of, random_vectors, evidence):
    options, times = HARMLESS[rule]
    source = source_of(dict.fromkeys(chosen(rule, random_vectors), random_vectors["one"]))
    merged = merge(make(rule, options), source, evidence)
    for parameter in source.parameters:
        for task in source.tasks:
            expected = times * source.vector(task, parameter)
            assert torch.allclose(merged.own(task, parameter.name), expected, atol=1e-6)


@each_rule
def test_experts_that_equal_the_base_give_the_base(rule, source_of, random_vectors, evidence):
    random_vectors = chosen(rule, random_vectors)
    still = {task: {name: 0 * value for name, value in random_vectors["one"].items()} for task in random_vectors}
    merged = merge(make(rule), source_of(still, base=random_vectors["two"]), evidence)
    for name in random_vectors["one"]:
        for task in still:
            assert not merged.own(task, name).any()


@pytest.fixture
def calibrated(walkable, make_evidence):
    """The toy model with everything that any method needs to calibrate a merged one."""
    source, evidence = walkable
    random = np.random.default_rng(3)
    matrices = [parameter for parameter in source.parameters if parameter.is_matrix]
    rows = {task: {p.layer: random.standard_normal((40, p.shape[1])) for p in matrices} for task in source.tasks}
    return source, replace(evidence, statistics=make_evidence(rows).statistics)


@each_calibrating_rule
def test_the_order_of_tasks_does_not_matter_to_a_calibration(rule, calibrated):
    source, evidence = calibrated
    first = merge(make(rule), source, evidence)
    source.tasks = tuple(reversed(source.tasks))
    second = merge(make(rule), source, evidence)
    for name, vector in first.vectors.items():
        assert agree(vector, second.vectors[name], exact=False)
        assert vector.any()


@each_calibrating_rule
def test_experts_and_an_anchor_that_equal_the_base_are_calibrated_to_the_base(rule, calibrated):
    source, evidence = calibrated
    for task in source.tasks:
        for vector in source._vectors[task].values():
            vector.zero_()
    anchor = {name: torch.zeros_like(vector) for name, vector in evidence.anchor.items()}
    merged = merge(make(rule), source, replace(evidence, anchor=anchor))
    for name, vector in merged.vectors.items():
        assert torch.allclose(vector, torch.zeros_like(vector), atol=1e-6), name


@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_experts(rule, count, make_source, random_vectors):
    few = dict(list(random_vectors.items())[:count])
    with pytest.raises(PaveError, match=f"merging needs at least two experts, found {count}"):
        merge(make(rule), make_source(few))


@pytest.mark.parametrize("rule", OURS)
def test_nothing_in_common(rule, make_source):
    with pytest.raises(PaveError, match="share no floating-point tensor"):
        merge(make(rule), make_source({"a": {}, "b": {}}))


@pytest.mark.parametrize("rule", [name for name in RUN_HERE if Need.INPUT_MOMENTS in OURS[name].needs])
def test_missing_moments_are_told_with_what_makes_them(rule, source_of, random_vectors):
    with pytest.raises(PaveError, match="task 'one' has no captured statistics; run `pave capture`"):
        merge(make(rule), source_of(random_vectors), Evidence())


def test_what_is_no_matrix_is_averaged_summed_or_left(source_of, random_vectors):
    class Matrices(MatrixMethod):
        summary = source = "a test"

        def merge_matrix(self, parameter, base, vectors):
            return torch.full_like(base, 7.0).double()

    source = source_of(random_vectors)
    total = sum(named["b"] for named in random_vectors.values())
    for others, expected in (("mean", total / 3), ("sum", total), ("base", 0 * total)):
        merged = merge(Matrices(MatrixOptions(others=others)), source)
        assert np.allclose(merged.vectors["b"].numpy(), expected, atol=1e-6)
        assert (merged.vectors[MATRIX] == 7).all()
        assert merged.vectors[MATRIX].dtype == torch.float32


def test_transposed_weights_are_merged_as_output_by_input(make_source, random_vectors):
    seen = []

    class Matrices(MatrixMethod):
        summary = source = "a test"

        def merge_matrix(self, parameter, base, vectors):
            seen.append(tuple(base.shape))
            return sum(vectors.values())

    merged = merge(Matrices(), make_source(random_vectors, transposed=[MATRIX]))
    assert seen == [(5, 7)]
    assert np.allclose(merged.vectors[MATRIX], sum(named[MATRIX] for named in random_vectors.values()))


def test_a_rule_may_rescale_once_it_has_seen_everything(make_source, random_vectors):
    class Rescaled(Average):
        rescales = True

        def prepare(self, vectors):
            self.largest = 0.0

        def merge(self, parameter, base, vectors):
            merged = super().merge(parameter, base, vectors)
            self.largest = max(self.largest, float(merged.abs().max()))
            return merged

        def factor(self, parameter):
            return 1 / self.largest

    plain, scaled = merge(Average(), make_source(random_vectors)), merge(Rescaled(), make_source(random_vectors))
    largest = max(float(vector.abs().max()) for vector in plain.vectors.values())
    for name, vector in plain.vectors.items():
        assert torch.allclose(scaled.vectors[name], vector / largest)


def test_a_rule_tells_everything_that_is_wrong_before_it_begins(make_source, random_vectors):
    class Choosy(StaticMethod):
        name = "choosy"
        summary = source = "a test"

        def problems(self, vectors, evidence):
            yield "first"
            yield "second"

        def prepare(self, vectors):
            raise AssertionError("begun")

        def merge(self, parameter, base, vectors):
            raise AssertionError("begun")

    with pytest.raises(PaveError, match=r"merge method 'choosy' cannot merge these experts:\n  - first\n  - second"):
        merge(Choosy(), make_source(random_vectors))


def test_every_rule_says_what_it_costs():
    assert all(isinstance(kind.cost, Cost) for kind in OURS.values())


def test_a_rule_may_be_called_by_its_name(source_of, random_vectors):
    source = source_of(random_vectors)
    for name, rule in (("ties", OURS["ties"]()), ("emr", OURS["emr"]())):
        found, expected = merge(name, source), merge(rule, source)
        assert found.vectors.keys() == expected.vectors.keys() != set()
        assert all(torch.equal(found.vectors[key], value) for key, value in expected.vectors.items())
        assert found.rescalers == expected.rescalers
    with pytest.raises(PaveError, match="unknown merge method 'tiess': did you mean 'ties'"):
        merge("tiess", source)
    with pytest.raises(TypeError, match=r"expected a merge method such as Ties\(\), or the name of one, found <class"):
        merge(OURS["ties"], source)
