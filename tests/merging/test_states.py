"""How what several parts have gathered becomes one."""

import pytest
import torch

from pave_lightning.merging import MergeMethod, State, States, StaticMethod, merge_method, order_statistics
from pave_lightning.merging.states import joined


@pytest.mark.parametrize(
    ("values", "reduction", "expected"),
    [
        ([1.0, 2.5, -4.0], "sum", -0.5),
        ([1.0, 2.5, -4.0], "max", 2.5),
        ([1.0, 2.5, -4.0], "min", -4.0),
        ([3, 4], "sum", 7),
        # Rounded once: from the left it would be 0.
        ([1e16, 1.0, -1e16], "sum", 1.0),
        ([[1.0], [], [2.0, 3.0]], "concatenate", [1.0, 2.0, 3.0]),
        ([{"a": 1.0, "b": 2.0}, {"b": 5.0}, {}], "sum", {"a": 1.0, "b": 7.0}),
        ([{"a": {"x": [1.0]}}, {"a": {"x": [2.0], "y": [3.0]}}], "concatenate", {"a": {"x": [1.0, 2.0], "y": [3.0]}}),
        ([{}, {}], "sum", {}),
    ],
)
def test_numbers_lists_and_mappings(values, reduction, expected):
    assert joined(values, reduction) == expected


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("sum", [4.0, 2.0]), ("max", [3.0, 4.0]), ("min", [1.0, -2.0]), ("concatenate", [1.0, 4.0, 3.0, -2.0])],
)
def test_tensors(reduction, expected):
    values = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, -2.0])]
    assert joined(values, reduction).tolist() == expected
    assert values[0].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("values", "reduction", "message"),
    [([1.0, 2.0], "concatenate", "gather them in a list"), ([[1.0], [2.0]], "max", "only be concatenated")],
)
def test_what_cannot_be_reduced_so(values, reduction, message):
    with pytest.raises(ValueError, match=message):
        joined(values, reduction)


def test_a_state_is_reduced_once():
    states = [States(), States()]
    first = [one.add("first", torch.tensor([1.0]), "sum") for one in states]

    def reduce():
        gathered = [one.gathered() for one in states]
        for one in states:
            one.reduce(gathered)

    reduce()
    second = [one.add("second", 2.0, "max") for one in states]
    assert [one.gathered() for one in states] == [{"second": 2.0}] * 2
    reduce()
    assert [state.value.item() for state in first] == [2.0, 2.0]
    assert [state.value for state in second] == [2.0, 2.0]
    first[0].value += 1
    assert first[1].value.item() == 2.0, "each part has its own"


def test_a_name_is_free_again_after_the_reduction():
    states = States()
    states.add("total", 1.0, "sum")
    with pytest.raises(ValueError, match="two states are named 'total'"):
        states.add("total", 1.0, "sum")
    states.reduce([states.gathered()])
    assert states.add("total", 3.0, "sum") == State(3.0, "sum")


def test_order_statistics_of_one_part():
    states, values = States(), torch.tensor([3.0, -5.0, 4.0, 0.0])
    steps = order_statistics(states, "x", ["v"], lambda: iter([("v", values)]), lambda n: [1, n], magnitudes=True)
    found = None
    while found is None:
        try:
            next(steps)
            states.reduce([states.gathered()])
        except StopIteration as done:
            found = done.value
    assert found == {"v": [5.0, 0.0]}


def test_an_object_can_be_used_again_after_a_merge_that_broke_off(make_source):
    class Counting(StaticMethod):
        summary = source = "a test"
        broken = True

        def prepare(self, vectors):
            self.total = self.states.add("elements", sum(p.elements for p in vectors.parameters), "sum")
            if self.broken:
                raise RuntimeError("broken off")
            yield

        def merge(self, parameter, base, vectors):
            return base

    method, source = Counting(), make_source({"a": {"x": [1.0, 2.0]}, "b": {"x": [1.0, 2.0]}})
    with pytest.raises(RuntimeError, match="broken off"):
        method.begin(source, method.evidence)
    method.broken = False
    method.begin(source, method.evidence)
    assert method.total.value == 2


def test_a_method_that_is_not_parallel_says_why():
    class Serial(StaticMethod):
        summary = source = "a test"
        parallel = False

        def merge(self, parameter, base, vectors):
            return base

    with pytest.raises(TypeError, match="'serial' does not say why it is not parallel; set serial_because"):
        merge_method("serial")(Serial)
    assert MergeMethod.parallel
