"""The registry of transforms, and stacks of them."""

import logging
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from pave_lightning.config import Section
from pave_lightning.errors import PaveError
from pave_lightning.merging import Need
from pave_lightning.system import plug_ins
from pave_lightning.transforms import (
    Transform,
    base,
    known_transforms,
    make_transform,
    transform_named,
    transformed,
    vector_transform,
)
from pave_lightning.transforms.pave import Pave
from pave_lightning.transforms.task_weights import TaskWeights, TaskWeightsOptions
from pave_lightning.weights import DerivedTaskVectors


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", base._registry.copy())
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "propagate", True)


class Nothing(Transform[Section]):
    summary = "nothing"
    source = "nowhere"

    def apply(self, vectors, evidence, compute):
        return vectors


def test_every_file_of_the_room_registers_its_transform():
    assert {"dare", "depth_scale", "pave", "task_weights"} <= set(known_transforms())
    for name, kind in known_transforms().items():
        assert kind.name == name
        assert kind.summary
        assert "Source" in (kind.__doc__ or "")
        assert all(field.description for field in kind.Options.model_fields.values())


def test_a_registered_transform_is_known_by_its_name():
    assert vector_transform("nothing_at_all")(Nothing) is Nothing
    assert transform_named("nothing_at_all") is Nothing
    assert isinstance(make_transform("nothing_at_all", {}), Nothing)
    vector_transform("pave")(Pave)  # the same one again


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({}, ValueError, "two transforms are named 'pave': Pave and Changed"),
        ({"apply": Transform.apply}, TypeError, "'pave' is no complete transform: 'Changed'"),
        ({"summary": None}, TypeError, "transform 'pave' does not say its summary"),
        ({"needs": frozenset({Need.ANCHOR})}, TypeError, "needs an anchor"),
    ],
)
def test_what_cannot_be_registered(changes, error, told):
    with pytest.raises(error, match=told):
        vector_transform("pave")(type("Changed", (Nothing,), changes))
    with pytest.raises(TypeError, match="'number' is no complete transform"):
        vector_transform("number")(3)
    assert transform_named("pave") is Pave


def test_unknown_names_and_wrong_options_are_told():
    with pytest.raises(PaveError, match="unknown transform 'task_weight'; did you mean 'task_weights'"):
        make_transform("task_weight", {})
    with pytest.raises(PaveError) as caught:
        make_transform("depth_scale", {"frist": 0.5, "last": "much"})
    text = str(caught.value)
    assert "the options of transform 'depth_scale'" in text
    assert "frist: unknown option; did you mean 'first'?" in text
    assert "last: should be a valid number, found 'much'" in text
    with pytest.raises(PaveError, match=r"- rho: should be less than or equal to 1, found 2"):
        make_transform("pave", {"rho": 2.0})


GOOD = """
from pave_lightning.transforms import Transform, vector_transform

@vector_transform("{name}")
class Fine(Transform):
    summary, source = "fine", "a plug-in"
    def apply(self, vectors, evidence, compute):
        return vectors
"""


def test_plug_ins_are_loaded_and_a_broken_one_is_named_and_left_out(monkeypatch, tmp_path, caplog):
    (tmp_path / "broken_transforms.py").write_text(GOOD.format(name="half") + "raise RuntimeError('too old')\n")
    (tmp_path / "fine_transforms.py").write_text(GOOD.format(name="fine"))
    monkeypatch.syspath_prepend(tmp_path)
    group = "pave_lightning.transforms"
    entries = [EntryPoint("broken", "broken_transforms", group), EntryPoint("fine", "fine_transforms", group)]
    known = set(base._registry._kinds)
    monkeypatch.setattr(plug_ins, "entry_points", lambda *, group: entries if group == base.ENTRY_POINTS else [])
    try:
        with caplog.at_level("WARNING", logger="pave_lightning"):
            found = known_transforms()
    finally:
        for name in ("broken_transforms", "fine_transforms"):
            sys.modules.pop(name, None)
    assert set(found) - known == {"fine"}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the transform 'broken' of the package broken_transforms is left out" in message
    assert "too old" in message


def test_a_stack_is_applied_in_its_order(source, arrays):
    class Shifted(Transform[Section]):
        summary, source = "every expert moved by 1", "a test"

        def apply(self, vectors, evidence, compute):
            class Moved(DerivedTaskVectors):
                def vector(self, task, parameter, rows=None, base=None):
                    return vectors.vector(task, parameter, rows, base) + 1

                def expert(self, task, parameter, rows=None):
                    return self.base(parameter, rows) + self.vector(task, parameter, rows)

            return Moved(vectors)

    halved = TaskWeights(TaskWeightsOptions(movie=0.5, news=0.5, topic=0.5))
    plain = arrays(source)
    for stack, expected in (
        ([halved, Shifted()], {key: 0.5 * value + 1 for key, value in plain.items()}),
        ([Shifted(), halved], {key: 0.5 * (value + 1) for key, value in plain.items()}),
        ([], plain),
    ):
        found = arrays(transformed(source, stack))
        for key, value in expected.items():
            assert np.allclose(found[key], value, rtol=1e-6, atol=1e-6)
    assert transformed(source, []) is source


def test_a_transform_that_does_not_fit_is_refused_before_it_is_applied(source):
    with pytest.raises(PaveError) as caught:
        transformed(source, [TaskWeights(TaskWeightsOptions(movies=0.5, newz=1))])
    text = str(caught.value)
    assert "transform 'task_weights' cannot be used on these task vectors" in text
    assert "no task is named 'movies'; did you mean 'movie'?" in text
    assert "no task is named 'newz'; did you mean 'news'?" in text


def test_what_a_transform_gives_is_derived_of_what_it_is_given(source, adapted):
    class Other(Nothing):
        def apply(self, vectors, evidence, compute):
            return adapted

    with pytest.raises(TypeError, match="gives no DerivedTaskVectors, but Source"):
        transformed(source, [Other()])
    assert transformed(source, [Nothing()]) is source
