import logging
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import Field

from pave_lightning.errors import PaveError
from pave_lightning.merging import StaticMethod, known_methods, make_method, merge, merge_method, method_named, registry
from pave_lightning.merging.methods import ties
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.ties import Ties
from pave_lightning.system import plug_ins


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "propagate", True)


class Nothing(StaticMethod):
    summary = "nothing"
    source = "nowhere"

    def merge(self, parameter, base, vectors):
        return 0 * base


def test_a_registered_method_is_known_by_its_name():
    assert merge_method("nothing_at_all")(Nothing) is Nothing
    assert Nothing.name == "nothing_at_all"
    assert method_named("nothing_at_all") is Nothing
    assert known_methods()["nothing_at_all"] is Nothing


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="two merge methods are named 'ties': Ties and Nothing"):
        merge_method("ties")(Nothing)
    assert method_named("ties") is Ties


def test_the_same_class_may_be_registered_again():
    merge_method("average")(Average)
    assert method_named("average") is Average


def test_an_unknown_method_is_told_with_the_nearest_one():
    with pytest.raises(PaveError, match="unknown merge method 'task_arithmatic'; did you mean 'task_arithmetic'"):
        method_named("task_arithmatic")
    with pytest.raises(PaveError, match=r"known are: ace, average, awd, .*wudi"):
        method_named("qqqqqqqq")


def test_methods_of_other_packages_are_loaded(monkeypatch):
    class Entry(EntryPoint):
        def load(self):
            merge_method("from_elsewhere")(Nothing)

    def entry_points(*, group):
        return [Entry("elsewhere", "elsewhere.methods", group)] if group == "pave_lightning.methods" else []

    monkeypatch.setattr(plug_ins, "entry_points", entry_points)
    assert method_named("from_elsewhere") is Nothing


GOOD = """
from pave_lightning.merging import StaticMethod, merge_method

class Fine(StaticMethod):
    summary, source = "fine", "a plug-in"
    def merge(self, parameter, base, vectors):
        return 0 * base

merge_method("{name}")(Fine)
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise RuntimeError('an \\x1b[31m old torch is needed')", r"cannot be loaded \(an \\x1b\[31m old torch"),
        ("import no_such_package_at_all", "cannot be loaded .*no_such_package_at_all"),
        ("import sys; sys.exit(3)", r"cannot be loaded \(SystemExit: 3\)"),
        (GOOD.format(name="half") + GOOD.format(name="ties"), "two merge methods are named 'ties'"),
        ("answer = 42", "registers no merge method"),
        (
            "from pave_lightning.merging import merge_method\nmerge_method('none')(int)",
            "'none' is no complete merge method",
        ),
        (GOOD.replace("def merge", "def merg").format(name="abstract"), "'abstract' is no complete merge method"),
        (GOOD.replace("summary, source =", "a, b =").format(name="dumb"), "'dumb' does not say its summary, source"),
    ],
)
def test_a_broken_plug_in_is_named_and_left_out(monkeypatch, tmp_path, caplog, code, told):
    (tmp_path / "broken_plug_in.py").write_text(code)
    (tmp_path / "fine_plug_in.py").write_text(GOOD.format(name="fine"))
    monkeypatch.syspath_prepend(tmp_path)
    group = "pave_lightning.methods"
    entries = [EntryPoint("broken", "broken_plug_in", group), EntryPoint("fine", "fine_plug_in", group)]
    known = set(registry._registry._kinds)
    monkeypatch.setattr(plug_ins, "entry_points", lambda *, group: entries)
    try:
        with caplog.at_level("WARNING", logger="pave_lightning"):
            found = known_methods()
            known_methods()
    finally:
        for name in ("broken_plug_in", "fine_plug_in"):
            sys.modules.pop(name, None)
    assert set(found) - known == {"fine"}
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(told, message)
    assert "'broken'" in message
    assert "broken_plug_in" in message


def test_every_method_says_what_it_is():
    for name, method in known_methods().items():
        assert method.name == name
        assert method.form in ("static", "per-task")
        assert method.summary
        assert method.source
        assert method().options == method.Options()


def test_a_method_with_its_options():
    assert make_method("ties", {"density": 0.5}).options.density == 0.5
    assert make_method("ties", {}).options.density == 0.2
    assert isinstance(make_method("average", {}), Average)


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(PaveError) as caught:
        make_method("ties", {"densitty": 0.5, "density": 2})
    text = str(caught.value)
    assert "'ties'" in text
    assert "densitty: unknown option; did you mean 'density'?" in text
    assert "density: should be less than or equal to 1, found 2" in text


def test_options_are_frozen():
    options = make_method("ties", {}).options
    with pytest.raises(ValueError, match="frozen"):
        options.density = 1.0


def test_a_function_is_a_method_and_its_keywords_are_the_options(make_source):
    @merge_method("quantile", source="an example", elementwise=True, default_scale=0.5)
    def quantile(parameter, base, vectors, *, share: Annotated[float, Field(ge=0, le=1)] = 0.5):
        """A quantile of the task vectors.

        More about it.
        """
        return torch.stack(list(vectors.values())).quantile(share, dim=0)

    assert method_named("quantile") is quantile
    assert issubclass(quantile, StaticMethod)
    assert (quantile.summary, quantile.source) == ("A quantile of the task vectors", "an example")
    assert (quantile.elementwise, quantile.default_scale, quantile.form) == (True, 0.5, "static")
    source = make_source({"a": {"w": [1.0, 5.0]}, "b": {"w": [3.0, 1.0]}, "c": {"w": [2.0, 9.0]}})
    assert merge("quantile", source).vectors["w"].tolist() == [2, 5]
    assert merge(make_method("quantile", {"share": 1}), source).vectors["w"].tolist() == [3, 9]
    with pytest.raises(PaveError, match="share: should be less than or equal to 1, found 2"):
        make_method("quantile", {"share": 2})
    with pytest.raises(PaveError, match="shar: unknown option; did you mean 'share'"):
        make_method("quantile", {"shar": 1})


@pytest.mark.parametrize(
    ("facts", "told"),
    [({}, "does not say its source"), ({"source": "x", "elementvise": True}, "a method has no elementvise")],
)
def test_functions_that_say_too_little_or_too_much(facts, told):
    def nothing(parameter, base, vectors):
        """Nothing."""

    with pytest.raises(TypeError, match=told):
        merge_method("nothing_at_all", **facts)(nothing)


def test_a_class_says_its_facts_itself():
    with pytest.raises(TypeError, match="a class says source itself"):
        merge_method("nothing_at_all", source="x")(Nothing)


def test_every_file_of_methods_is_found_without_a_list():
    folder = Path(ties.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {kind.__module__.rpartition(".")[2] for kind in known_methods().values()} >= files
