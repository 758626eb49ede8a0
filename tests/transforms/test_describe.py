"""What ``pave transforms`` prints: all that is known, and nothing of it is cut."""

from io import StringIO

import pytest
from rich.console import Console

from pave_lightning.config import Section
from pave_lightning.errors import PaveError
from pave_lightning.transforms import Transform, base, known_transforms, vector_transform
from pave_lightning.transforms.describe import print_transforms


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(base, "_registry", base._registry.copy())


def printed(width, name=None):
    console = Console(width=width, file=StringIO())
    print_transforms(name, console)
    return console.file.getvalue()


class ShiftedOptions(Section):
    """Options of a shift."""

    by: float
    """How far."""
    twice: bool = False
    """Whether it is done again."""


class Shifted(Transform[ShiftedOptions]):
    """Move every expert."""

    summary, source = "every expert moved", "[a plug-in], 2026"
    ordered = True
    Options = ShiftedOptions

    def apply(self, vectors, evidence, compute):
        return vectors


@pytest.mark.parametrize("width", [60, 80, 139, 140, 1000])
def test_all_of_them_are_listed_whole(width):
    vector_transform("shifted")(Shifted)
    text = printed(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("│", " ").split()
    for name, kind in known_transforms().items():
        assert name in words
        assert set(kind.source.split()) <= set(words)


def test_needs_and_what_becomes_of_adapters():
    vector_transform("shifted")(Shifted)
    rows = {line.split()[1]: line for line in printed(1000).splitlines() if line.startswith("│")}
    assert "weights only; the order of tasks matters" in rows["shifted"]
    assert "low rank is lost" in rows["shifted"]
    assert "input moments or second moments" in rows["pave"]
    assert "low rank is kept" in rows["depth_scale"]


def test_one_with_its_options():
    vector_transform("shifted")(Shifted)
    lines = printed(1000, "shifted").splitlines()
    assert lines == [
        "shifted: every expert moved ([a plug-in], 2026)",
        "Move every expert.",
        "Options: in a stack of the section vectors, such as {mine: [{shifted: {...}}]}",
        "  by (required): How far.",
        "  twice (default False): Whether it is done again.",
    ]


def test_options_of_a_section_and_options_by_task():
    assert "Options: in the section purify, or in a stack" in printed(1000, "pave")
    assert "  rho (default 0.97): " in printed(1000, "pave")
    assert "  A factor for each task, under the task's name; 1 for tasks that are not named." in printed(
        1000, "task_weights"
    )


def test_an_unknown_one():
    with pytest.raises(PaveError, match=r"unknown transform 'pavee'; did you mean 'pave'\? \(see: pave transforms\)"):
        printed(80, "pavee")
