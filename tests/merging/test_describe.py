"""What ``pave methods`` prints: nothing of it is cut, however wide the terminal."""

from io import StringIO

import pytest
from rich.console import Console

from pave_lightning.errors import PaveError
from pave_lightning.merging import known_methods, method_named
from pave_lightning.merging.describe import print_methods


def printed(width, name=None):
    console = Console(width=width, file=StringIO())
    print_methods(name, console)
    return console.file.getvalue()


def entries(text):
    """The words that stand in the cells of each row, by the name that stands in its first cell."""
    found = {}
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip("│┃ ").split("│")] if line.startswith("│") else []
        if not cells:
            continue
        # Lines on which a row goes on begin with an empty cell, which the stripping has taken away.
        if line[2] != " ":
            name = cells[0][0]
            found[name] = []
            cells = cells[1:]
        found[name] += [word for cell in cells for word in cell]
    return found


@pytest.mark.parametrize("width", [60, 80, 120, 139, 140, 200, 1000])
def test_names_and_sources_are_whole(width):
    text = printed(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    found = entries(text)
    assert sorted(found) == sorted(known_methods())
    for name, method in known_methods().items():
        for part in (method.summary, method.source, method.form, method.cost):
            assert {word.strip(";") for word in part.split()} <= {word.strip(";") for word in found[name]}, name


@pytest.mark.parametrize(("columns", "widest"), [("80", 80), ("160", 160), (None, 100)])
def test_another_program_gets_lines_of_a_readable_width(capsys, monkeypatch, columns, widest):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    print_methods()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= widest
    assert sorted(entries(text)) == sorted(known_methods())


def test_what_a_method_needs_is_told():
    found = {name: " ".join(words) for name, words in entries(printed(1000)).items()}
    assert "weights only elementwise" in found["task_arithmetic"]
    assert "weights only; the order of tasks matters" in found["cabs"]
    for name, others in (
        ("ties", ""),
        ("featcal", "an anchor, unlabelled examples"),
        ("regmean_plus_plus", "examples"),
    ):
        assert f"{others}; reads the weights more than once" in found[name], name
    assert "reads the weights" not in found["average"]
    assert "holds 1 whole model " in found["bmm"]


def test_scales():
    columns, paragraphs = entries(printed(1000)), entries(printed(80))
    source = method_named("average").source.split()
    assert columns["average"][-len(source) - 2 :] == ["elementwise", "-", *source]
    assert paragraphs["average"][-len(source) - 2 :] == ["no", "scale", *source]
    source = method_named("task_arithmetic").source.split()
    assert columns["task_arithmetic"][-len(source) - 1] == "0.3"
    assert paragraphs["task_arithmetic"][-len(source) - 2 :] == ["scale", "0.3", *source]


def test_one_method_with_its_options():
    text = printed(1000, "core_space")
    assert text.startswith("core_space: merge adapters by another method")
    assert "options.inner (default tsv_m): The method by which" in text
    assert "options.inner_options (default {}): Options of that method" in text


def test_an_unknown_method():
    with pytest.raises(PaveError, match="did you mean 'ties'"):
        printed(80, "tiess")
