import logging
import re
import sys
from importlib.metadata import EntryPoint

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.merging import Average, StaticMethod, Ties, base, known_methods, make_method, method_named, register


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    monkeypatch.setattr(base, "_looked_at", set())
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "propagate", True)


class Nothing(StaticMethod):
    summary = "nothing"
    source = "nowhere"

    def merge(self, parameter, base, vectors):
        return 0 * base


def test_a_registered_rule_is_known_by_its_name():
    assert register("nothing_at_all")(Nothing) is Nothing
    assert Nothing.name == "nothing_at_all"
    assert method_named("nothing_at_all") is Nothing
    assert known_methods()["nothing_at_all"] is Nothing


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="two merge methods are named 'ties': Ties and Nothing"):
        register("ties")(Nothing)
    assert method_named("ties") is Ties


def test_the_same_class_may_be_registered_again():
    register("average")(Average)
    assert method_named("average") is Average


def test_an_unknown_rule_is_told_with_the_nearest_one():
    with pytest.raises(PaveError, match="unknown merge method 'task_arithmatic': did you mean 'task_arithmetic'"):
        method_named("task_arithmatic")
    with pytest.raises(PaveError, match=r"known are: ace, average, awd, .*wudi"):
        method_named("qqqqqqqq")


def test_rules_of_other_packages_are_loaded(monkeypatch):
    class Entry(EntryPoint):
        def load(self):
            register("from_elsewhere")(Nothing)

    def entry_points(*, group):
        return [Entry("elsewhere", "elsewhere.methods", group)] if group == "pave_lightning.methods" else []

    monkeypatch.setattr(base, "entry_points", entry_points)
    assert method_named("from_elsewhere") is Nothing


GOOD = """
from pave_lightning.merging import StaticMethod, register

class Fine(StaticMethod):
    summary, source = "fine", "a plug-in"
    def merge(self, parameter, base, vectors):
        return 0 * base

register("{name}")(Fine)
"""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise RuntimeError('an \\x1b[31m old torch is needed')", r"cannot be loaded \(an \\x1b\[31m old torch"),
        ("import no_such_package_at_all", "cannot be loaded .*no_such_package_at_all"),
        ("import sys; sys.exit(3)", r"cannot be loaded \(SystemExit: 3\)"),
        (GOOD.format(name="half") + GOOD.format(name="ties"), "two merge methods are named 'ties'"),
        ("answer = 42", "registers no merge method"),
        ("from pave_lightning.merging import register\nregister('none')(int)", "'none' is no complete merge method"),
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
    monkeypatch.setattr(base, "entry_points", lambda *, group: entries)
    known = set(base._registry)
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


def test_every_rule_says_what_it_is():
    for name, method in known_methods().items():
        assert method.name == name
        assert method.form in ("static", "per-task")
        assert method.summary
        assert method.source
        assert method().options == method.Options()


def test_a_rule_with_its_options():
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
