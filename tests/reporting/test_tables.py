import io
import math
import re

import pytest
from rich.console import Console

from pave_lightning.reporting.scores import Score, ScoreTable
from pave_lightning.reporting.tables import lines_of, render

METHODS = ("weight-average", "task-arithmetic", "ties", "iso-cts")


def scores(tasks, per_task=("emr",)):
    entries = []
    for index, task in enumerate(tasks):
        entries.append(Score("base", "", "base", task, "accuracy", True, 0.25, 10))
        entries.append(Score("experts", "", "expert", task, "accuracy", True, 0.8, 10))
        for form, names in (("static", METHODS), ("per-task", per_task)):
            for place, name in enumerate(names):
                for bonus, vectors in enumerate(("plain", "purified")):
                    value = 0.4 + 0.05 * place + 0.02 * bonus + 0.002 * index
                    entries.append(Score(name, vectors, form, task, "accuracy", True, value, 10))
    return ScoreTable(entries)


def shown(table, width=100, **options):
    file = io.StringIO()
    Console(file=file, width=width, **options).print(render(table, width))
    return file.getvalue()


def test_six_tasks_fit_in_100_columns():
    text = shown(scores([f"task{index}" for index in range(6)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = [line for line in lines if line.startswith("task-arithmetic  plain")]
    assert row.split() == [
        "task-arithmetic",
        "plain",
        *(f"{0.45 + 0.002 * index:.3f}" for index in range(6)),
        "0.455",  # (0.450 + 0.452 + ... + 0.460) / 6
        "0.569",  # 0.455 / 0.8
    ]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_every_task_is_shown_whole_at_any_width(width, count):
    tasks = [f"task{index}" for index in range(count)]
    text = shown(scores(tasks), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for task in tasks:
        assert text.count(f" {task} ") + text.count(f" {task}\n") == 1
    assert text.count("normalised  ") + text.count("normalised\n") == 1
    assert text.count("iso-cts") % 2 == 0


def test_long_names_are_broken_between_their_words():
    text = shown(scores([f"customer-support-intent-{index}" for index in range(4)]), 80)
    assert max(map(len, text.splitlines())) <= 80
    words = set(text.split())
    assert {"customer-", "support-", "intent-0", "intent-3"} <= words
    assert "0.456" in words


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("topic", ["topic"]),
        ("rotten_tomatoes", ["rotten_", "tomatoes"]),
        ("a.b.c-d", ["a.b.c-d"]),
        ("unpronounceable", ["unpronounceable"]),
        ("very-unpronounceable_x", ["very-", "unpronounceable_", "x"]),
        ("twelve-chars", ["twelve-chars"]),
        ("", [""]),
    ],
)
def test_lines_of_a_name(name, lines):
    assert lines_of(name, 12) == lines
    assert "".join(lines) == name


def test_a_word_that_no_line_holds_is_folded():
    text = shown(scores(["w" * 70]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("w") >= 70


def test_sections_and_caption():
    text = shown(scores(["a", "b"]))
    lines = text.splitlines()
    kinds = [line.split()[0] if line.strip() else "" for line in lines]
    between = kinds[kinds.index("experts") + 1], kinds[kinds.index("emr") - 1]
    assert all(set(rule) == {"─"} for rule in between)
    assert "1.000: as good as the expert" in text
    assert "keeps something extra for each task" in " ".join(text.split())
    assert "extra" not in shown(scores(["a"], per_task=()))


def test_best_static_normalised_average_is_bold():
    text = shown(scores(["a"]), force_terminal=True, color_system="standard")
    bold = [line for line in text.splitlines() if re.search(r"\x1b\[1m *0\.", line)]
    assert len(bold) == 1
    assert "iso-cts" in bold[0]
    assert "purified" in bold[0]


def test_controls_stand_apart_and_are_never_the_best():
    controls = [
        Score("joint", "", "static", "a", "accuracy", True, 0.9, 10, "own", True),
        Score("experts", "", "per-task", "a", "accuracy", True, 0.7, 10, "logits", True),
    ]
    text = shown(ScoreTable([*controls, *scores(["a"]).scores]), force_terminal=True, color_system="standard")
    bold = [line for line in text.splitlines() if re.search(r"\x1b\[1m *[01]\.", line)]
    assert len(bold) == 1
    assert "iso-cts" in bold[0]
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    begins = [line.split()[0] if line.strip() else "" for line in lines]
    place = begins.index("joint")
    assert lines[place].split()[:2] == ["joint", "°"]
    assert lines[place + 1].split()[:2] == ["experts", "*°"]
    assert begins[place - 2] == "experts"
    assert all(set(begins[line]) == {"─"} for line in (place - 1, place + 2))
    assert "° control: not merged" in " ".join("".join(lines).split())
    assert "°" not in shown(scores(["a"]))


def test_missing_values_and_markup():
    table = ScoreTable(
        [
            Score("[red]x[/red]", "plain", "static", "[bold]t", "accuracy", True, math.nan, 1),
            Score("y", "plain", "static", "u", "accuracy", True, 0.5, 1),
        ]
    )
    text = shown(table)
    assert "[red]x[/red]" in text
    assert "[bold]t" in text
    assert "nan" not in text
    assert shown(ScoreTable([]))


def test_tasks_that_are_left_out_are_told_below():
    table = scores(["a", "b"])
    assert "left out" not in shown(table)
    table = ScoreTable([*table.scores, Score("experts", "", "expert", "c", "pearson", True, -0.25, 10)])
    told = " ".join(shown(table).split())
    assert told.endswith("where the expert has no score above zero: c (pearson -0.25).")


def test_an_expert_that_learned_nothing_is_marked_and_told():
    text = shown(ScoreTable(scores(["good", "bad"]).scores, {"good": {"accuracy": 0.5}, "bad": {"accuracy": 0.8}}))
    (row,) = [line for line in text.splitlines() if line.startswith("experts")]
    assert row.split() == ["experts", "0.800", "0.800!", "0.800", "1.000"]
    assert "! Not learned: the expert of bad (accuracy 0.800, always the same answer 0.800)" in " ".join(text.split())
    assert "Not learned" not in shown(scores(["good", "bad"]))


def test_heads_that_have_seen_labels_are_marked():
    entries = [
        Score("ties", "plain", "static", "one", "accuracy", True, 0.5, 10, heads)
        for heads in ("expert", "logits", "labels-24", "labels")
    ]
    lines = shown(ScoreTable(entries)).splitlines()
    assert [line.split()[2:4] for line in lines if line.startswith("ties")] == [
        *(["expert", "0.500"], ["logits", "0.500"], ["labels-24", "†"], ["labels", "†"]),
    ]
    assert "† heads fitted to labelled rows" in " ".join(" ".join(lines).split())
    assert "†" not in shown(ScoreTable(entries[:2]))
