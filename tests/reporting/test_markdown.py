"""Pieces of markdown."""

from pave_lightning.reporting.markdown import escaped, table


def test_a_table():
    assert table(["a", "b"], [("1", "2"), ("3", "")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


def test_text_stays_in_its_cell():
    assert escaped("a_b|c\n *d*") == r"a\_b\|c \*d\*"
