"""The page as HTML: whole, escaped, readable without seeing it, and without a network."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from pave_lightning.reporting.page import Page, write_page
from pave_lightning.reporting.page.content import Cell, Code, Column, Figure, Panels, Rows, Section, Table, Text
from pave_lightning.reporting.page.rendering import html_of

NASTY = "<script>alert('&')</script>"
VOID = {"meta", "link", "wbr", "br", "hr", "img", "input"}


class Elements(HTMLParser):
    """All elements with their attributes; every one that is opened must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def page():
    table = Table(
        f"Scores {NASTY}",
        [Column("model"), Column(NASTY, "accuracy", True)],
        [Rows([[Cell(NASTY), Cell("0.5", "±.1", True)]], NASTY)],
    )
    figure = Figure(
        "A figure", [{"type": "bar", "x": [1.0, None], "name": NASTY}], {"xaxis": {}}, table, least_width=500
    )
    blocks = [
        table,
        figure,
        Panels("Two", [figure]),
        Text([NASTY], True, NASTY),
        Text([NASTY]),
        Code(NASTY, NASTY),
        Code("a: 1", "b", "yaml", True),
    ]
    return Page(NASTY, [NASTY], [Section("scores", NASTY, blocks), Section("empty", "Empty", [])], {"a b.csv": "rows"})


def test_nothing_that_users_wrote_becomes_markup(page):
    text = html_of(page)
    elements = Elements(text)
    assert NASTY not in text
    assert [attributes.get("type") for attributes in elements.all("script")] == [
        "application/json",
        "application/octet-stream",
        None,
    ]
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text).group(1))
    assert figures[0]["data"] == [{"type": "bar", "x": [1.0, None], "name": NASTY}]
    assert len(figures) == 2


def test_structure_can_be_read_without_seeing_it(page):
    elements = Elements(html_of(page))
    assert [attributes["scope"] for attributes in elements.all("th")][:4] == ["col", "col", "rowgroup", "row"]
    assert all("scope" in attributes for attributes in elements.all("th"))
    assert len(elements.all("caption")) == len(elements.all("table")) == 3
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    drawings = [attributes for attributes in elements.all("div") if attributes.get("role") == "img"]
    assert [attributes["id"] for attributes in drawings] == ["figure-1", "figure-2"]
    assert all(attributes["aria-label"] for attributes in drawings)
    assert elements.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"] for attributes in elements.all("a")}
    assert anchors == {"#content", "#scores", "a%20b.csv"}


def test_nothing_is_loaded_from_elsewhere(page):
    text = html_of(page)
    elements = Elements(text)
    assert not [attributes for _, attributes in elements.found if "src" in attributes]
    assert [attributes["href"] for attributes in elements.all("link")] == ["data:,"]
    assert "@import" not in text
    assert "url(" not in text


def test_a_page_without_figures_is_small(page, tmp_path):
    words = Page("title", ["One."], [Section("a", "A", [Text(["b"])])])
    path = write_page(words, tmp_path / "new" / "report.html")
    assert path.stat().st_size < 20_000
    assert "<script" not in path.read_text(encoding="utf-8")
    assert len(html_of(page)) < 2_500_000


def test_numbers_that_json_lacks_are_refused():
    figure = Figure("A", [{"x": [float("nan")]}])
    with pytest.raises(ValueError, match="JSON"):
        html_of(Page("title", [], [Section("a", "A", [figure])]))


def test_figures_are_figures_of_plotly(page):
    plotly = pytest.importorskip("plotly.graph_objects")
    (figure,) = page.sections[0].blocks[2].figures
    plotly.Figure(data=figure.traces, layout=figure.layout)
