"""The registry: what is imported when, and what of it is known."""

import sys
from importlib.metadata import EntryPoint

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.system import plug_ins
from pave_lightning.system.plug_ins import Registry

FILE = """
from {package}.register import registry

class {kind}:
    pass

registry.add("{name}", {kind})
"""


@pytest.fixture
def room(tmp_path, monkeypatch, request):
    """A folder with four files: of `ant` and `bee` as they are called, of `cat` elsewhere; and its registry."""
    package = f"room_of_{request.node.name.partition('[')[0]}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "register.py").write_text(
        "from pave_lightning.system.plug_ins import Registry\n"
        f"registry = Registry('animal', '{package}', 'animals', command='list animals')\n"
    )
    for file, name in (("ant", "ant"), ("bee", "bee"), ("others", "cat")):
        (folder / f"{file}.py").write_text(FILE.format(package=package, kind=name.title(), name=name))
    (tmp_path / f"{package}_elsewhere.py").write_text(FILE.format(package=package, kind="Dog", name="dog"))
    entries = [EntryPoint("more", f"{package}_elsewhere", "animals")]
    asked = []
    monkeypatch.setattr(plug_ins, "entry_points", lambda *, group: asked.append(group) or entries)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(f"{package}.register", fromlist=["registry"])
    yield module.registry, asked, lambda: {name.rpartition(".")[2] for name in sys.modules if name.startswith(package)}
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


def test_of_a_single_name_only_its_own_file_is_imported(room):
    registry, asked, imported = room
    assert registry.named("bee").__name__ == "Bee"
    assert {"ant", "others"} & imported() == set()
    assert asked == []


def test_a_name_that_no_file_has_is_found_in_the_others(room):
    registry, asked, imported = room
    assert registry.named("cat").__name__ == "Cat"
    assert {"ant", "bee"} <= imported()
    assert registry.named("dog").__name__ == "Dog"
    registry.known()
    assert asked == ["animals"]


def test_all_are_known_in_the_order_of_their_names_whatever_was_asked_before(room):
    registry, _, _ = room
    registry.named("bee")
    assert list(registry.known()) == ["ant", "bee", "cat", "dog"]
    registry.known().clear()
    assert list(registry.known()) == ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize("name", ["__init__", "register", "os.path", "../ant", "", "ant.py", "ants"])
def test_names_that_nothing_has_are_told_with_the_nearest(room, name):
    registry, _, _ = room
    with pytest.raises(PaveError, match=rf"^unknown animal '{name}'; .*\(see: list animals\)$"):
        registry.named(name)


def test_a_name_is_given_once(room):
    registry, _, _ = room
    ant = registry.named("ant")
    registry.add("ant", ant)
    with pytest.raises(ValueError, match="two animals are named 'ant': Ant and int"):
        registry.add("ant", int)
    assert registry.named("ant") is ant


def test_what_is_added_to_a_copy_is_not_known_elsewhere(room):
    registry, asked, _ = room
    copied = registry.copy()
    copied.add("int", int)
    assert list(copied.known()) == ["ant", "bee", "cat", "dog", "int"]
    assert "int" not in registry.known()
    assert len(asked) == 2


def test_a_file_that_cannot_be_imported_fails_each_time(tmp_path, monkeypatch):
    (tmp_path / "broken_room").mkdir()
    (tmp_path / "broken_room" / "one.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("animal", "broken_room")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            registry.known()
