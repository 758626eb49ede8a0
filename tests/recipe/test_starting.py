"""Starting recipes, written from what files look like."""

import csv
import json
import random
from pathlib import Path

import pytest

from pave_lightning.cli import main
from pave_lightning.errors import PaveError
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.starting import start_recipe

BASE = "owner/base"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows, one dictionary each, as a csv or jsonl file of this test's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def build(path, make, count=40):
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        made = [make(place) for place in range(count)]
        with file.open("w", newline="") as stream:
            if file.suffix == ".csv":
                writer = csv.DictWriter(stream, made[0].keys())
                writer.writeheader()
                writer.writerows(made)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in made)
        return path

    return build


def text(place, words=6):
    return " ".join(f"w{number}" for number in random.Random(place).choices(range(96), k=words))


def review(place):
    return {"id": place, "review": text(place), "sentiment": ("neg", "pos")[place % 2]}


def unclear(place):
    return {"a": text(place), "b": text(place + 1), "c": place % 2, "d": place % 3}


def refused(*arguments):
    with pytest.raises(PaveError) as caught:
        start_recipe(*arguments)
    headline, *told = str(caught.value).splitlines()
    assert headline == "no recipe has been written:"
    assert list(Path().glob("*.yaml")) == []
    return "\n".join(told)


def test_the_written_recipe_passes_its_plan(write, base_folder, capsys):
    for split in ("train", "dev", "test"):
        write(f"reviews/{split}.csv", review)
    write("stars.csv", lambda place: {"title": text(place, 1), "body": text(place), "stars": place % 5 + 1})
    words = ["O", "B-X", "I-X"]
    write(
        "tags.jsonl",
        lambda place: {"tokens": text(place, 5).split(), "tags": [words[(place + n) % 3] for n in range(5)]},
    )
    arguments = ["new", "mine", "--tasks", "reviews", "stars.csv", "tags.jsonl", "--base", str(base_folder)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "mine.yaml is written; check it, then run: pave plan mine.yaml\n"
    positions = json.loads((base_folder / "config.json").read_text())["max_position_embeddings"]
    written = Path("mine.yaml").read_text()
    assert written.startswith(f"# 3 tasks on {base_folder}.")
    for part in (
        "- name: reviews  # 40 rows in train.csv, 40 rows in dev.csv, 40 rows in test.csv\n",
        "    data: {train: reviews/train.csv, validation: reviews/dev.csv, test: reviews/test.csv}\n",
        "    text: review\n    label: sentiment\n    classes: [neg, pos]  # columns not used: 'id'\n",
        "    kind: regression  # found: 1 to 5;",
        "train: 'stars[:80%]', validation: 'stars[80%:90%]', test: 'stars[90%:]'}  # parts of a file\n",
        "    classes: [O, B-X, I-X]\n",
        f"max_length: {min(128, positions - 2)} ",
    ):
        assert part in written, part
    assert main(["plan", "mine.yaml"]) == 0
    assert "experts/tags" in capsys.readouterr().out


def test_a_recipe_that_exists_is_never_overwritten(write, capsys):
    write("reviews.csv", review)
    Path("mine.yaml").write_text("precious")
    assert main(["new", "mine.yaml", "--tasks", "reviews.csv", "absent.csv", "--base", BASE]) == 2
    told = capsys.readouterr().err
    assert "mine.yaml exists and is not overwritten; choose another name, or remove it" in told
    assert "there is no file absent.csv" in told
    assert Path("mine.yaml").read_text() == "precious"


def test_columns_of_all_files_are_asked_for_at_once(write):
    write("one.csv", unclear)
    write("two.jsonl", unclear)
    told = refused("mine", ["one.csv", "two.jsonl"], BASE)
    for name in ("one", "two"):
        assert f"answer with --set tasks.{name}.label=COLUMN --set tasks.{name}.text=COLUMN" in told
    assert told.count("which column is the label: 'c' (whole numbers: 0, 1), 'd' (whole numbers: 0, 1, 2)") == 2
    assert told.count("which column is the text (or [A, B], a pair of texts): 'a' (texts of 6 words), 'b'") == 2


def test_answers_are_taken(write):
    write("one.csv", unclear)
    answers = ["tasks.one.label=d", "tasks.one.text=[b, a]", "tasks.one.classes=[x, y, z]"]
    task = load_recipe(start_recipe("mine", ["one.csv"], BASE, answers)).task("one")
    assert (task.kind, task.label, task.text, task.classes) == ("text_classification", "d", ["b", "a"], ["x", "y", "z"])


def test_another_kind_may_be_named(write):
    write("alike.csv", lambda place: {"sentence1": text(place), "sentence2": text(place + 1), "score": place % 6})
    recipe = load_recipe(start_recipe("mine", ["alike.csv"], BASE, ["tasks.alike.kind=sentence_similarity"]))
    assert (recipe.task("alike").kind, recipe.task("alike").value_range) == ("sentence_similarity", (0, 5))
    assert load_recipe(start_recipe("other", ["alike.csv"], BASE)).task("alike").kind == "regression"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tasks.reviews.text=body", "there is no column 'body'; known are: id, review, sentiment"),
        ("tasks.review.text=review", "there is no task 'review'; did you mean 'reviews'?"),
        ("trainer.max_epochs=1", "expected tasks.NAME.KEY=VALUE; other keys can be changed in the file later"),
        ("tasks.reviews.text", "expected tasks.NAME.KEY=VALUE"),
        ("tasks.reviews.text=[", "the value is not valid YAML"),
        ("tasks.reviews.kind=classification", "text_classification"),
        ("tasks.reviews.labell=x", "labell: unknown option; did you mean 'label'?"),
        ("tasks.reviews.label=review", ""),
    ],
)
def test_answers_that_cannot_be_used(write, setting, told):
    write("reviews.csv", review)
    assert told in refused("mine", ["reviews.csv"], BASE, [setting])


def test_a_test_split_without_labels_is_left_out(write):
    write("train.csv", review, 60)
    write("val.csv", review, 20)
    for path, rows in (
        ("test.csv", lambda place: {"review": text(place)}),
        ("test.csv", lambda p: {**review(p), "sentiment": ""}),
    ):
        write(path, rows, 20)
        written = start_recipe("mine", ["train.csv"], BASE)
        assert "# test.csv has no labels and is left out; parts of a file" in written.read_text()
        data = load_recipe(written).tasks[0].data
        assert (data.train, data.validation, data.test) == ("train[:90%]", "train[90%:]", "val")
        written.unlink()


def test_classes_are_those_of_all_splits(write):
    write("train.csv", lambda place: {"text": text(place), "label": ("b", "c")[place % 2]})
    write("test.csv", lambda place: {"text": text(place), "label": ("b", "c", "a")[place % 3]})
    write("dev.csv", lambda place: {"text": text(place), "label": ("b", "c")[place % 2]})
    assert load_recipe(start_recipe("mine", ["train.csv"], BASE)).tasks[0].classes == ["a", "b", "c"]


def test_many_classes_stand_below_each_other(write):
    write("intents.csv", lambda place: {"text": text(place), "label": f"a rather long intent {place % 10}"}, 200)
    path = start_recipe("mine", ["intents.csv"], BASE)
    assert "    classes:\n      - a rather long intent 0\n" in path.read_text()
    assert len(load_recipe(path).tasks[0].classes) == 10


def test_rows_that_are_sorted_are_refused(write):
    write("reviews.csv", lambda place: {"review": text(place), "sentiment": ("neg", "pos")[place // 20]})
    assert "its rows are sorted by 'sentiment'" in refused("mine", ["reviews.csv"], BASE)


def test_files_that_cannot_be_used(write):
    write("reviews.csv", review)
    Path("empty.csv").write_text("text,label\n")
    Path("broken.jsonl").write_text("{")
    told = refused("no/where", ["empty.csv", "broken.jsonl", "reviews.csv"], BASE)
    assert "there is no folder no" in told
    assert "there are no rows in empty.csv" in told
    assert "broken (broken.jsonl): line 1 cannot be read as JSON" in told
    assert "cannot be the name of a recipe" in refused("a b", ["reviews.csv"], BASE)


def test_separators_are_written_down(write):
    Path("a.csv").write_text("text;label\n" + "".join(f"{text(place)};{place % 2}\n" for place in range(40)))
    path = start_recipe("mine", ["a.csv"], BASE)
    assert load_recipe(path).tasks[0].data.delimiter == ";"


@pytest.mark.parametrize("name", ["yes: no", "[a]", "#1", "1e3", "null", "ä", 'quo"te', " blank "])
def test_names_that_yaml_takes_for_something_else(write, name):
    write("rows.jsonl", lambda place: {name: text(place), "label": ("on", "1")[place % 2]})
    task = load_recipe(start_recipe("mine", ["rows.jsonl"], BASE)).tasks[0]
    assert (task.text, task.classes) == ([name], ["1", "on"])


def test_folders_of_images(write):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val", "test"):
        for kind in ("cat", "dog"):
            folder = Path("pets") / split / kind
            folder.mkdir(parents=True)
            for number in range(3):
                image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    task = load_recipe(start_recipe("mine", ["pets"], BASE)).task("pets")
    assert (task.kind, task.classes) == ("image_classification", ["cat", "dog"])
    assert (task.data.train, task.data.validation, task.data.test) == ("pets/train", "pets/val", "pets/test")
    Path("pets/test").rename("pets/later")
    Path("mine.yaml").unlink()
    assert "there is no folder test beside train" in refused("mine", ["pets"], BASE)


def test_a_first_line_that_is_a_row_is_told(write):
    lines = [f"{text(place)},{('good', 'bad')[place % 2]}" for place in range(40)]
    Path("reviews.csv").write_text("\n".join(lines) + "\n")
    told = refused("mine", ["reviews.csv"], BASE)
    assert f"the first line looks like a row and not like the names of columns: '{text(0)}', 'good'" in told
    start_recipe("mine", ["reviews.csv"], BASE, ["tasks.reviews.label=good"])
    assert load_recipe("mine.yaml").tasks[0].label_columns == ("good",)


def test_a_column_may_be_named_like_one_of_its_classes(write):
    write("mails.csv", lambda place: {"mail": text(place), "spam": ("ham", "spam")[place % 2]})
    start_recipe("mine", ["mails.csv"], BASE)
    assert load_recipe("mine.yaml").tasks[0].label_columns == ("spam",)


def test_one_task_is_not_merged(write):
    write("reviews.csv", review)
    path = start_recipe("mine", ["reviews.csv"], BASE)
    assert not load_recipe(path).merge
    path.write_text(path.read_text().replace("# merge:", "merge:").replace("#   - ", "  - "))
    assert len(load_recipe(path).merge) == 3
    write("mails.csv", review)
    assert len(load_recipe(start_recipe("both", ["reviews.csv", "mails.csv"], BASE)).merge) == 3
