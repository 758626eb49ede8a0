"""What files look like, and which kind of task is surest of them."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pave_lightning.tasks.file_profiles import FileColumns, profile_of_files, read_columns
from pave_lightning.tasks.profiles import Holds, profile_of
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.task import known_kinds

DRAW = random.Random(0)
WORDS = [f"w{number}" for number in range(60)]


def text(words=8):
    return " ".join(DRAW.choices(WORDS, k=words))


def tags():
    words = text(DRAW.randrange(3, 7)).split()
    return {"tokens": words, "ner": [DRAW.choice(["O", "B-X", "I-X"]) for _ in words]}


def answered(place):
    context = text(12)
    word = context.split()[place % 12]
    return {"question": text(4), "context": context, "answers": {"text": [word], "answer_start": [context.index(word)]}}


def rows(make, count=40):
    return [make(place) for place in range(count)]


CASES = {
    "classes": (
        lambda place: {"id": place, "review": text(), "sentiment": ("neg", "pos")[place % 2]},
        "text_classification",
        {"text": ["review"], "label": "sentiment", "classes": ["neg", "pos"]},
    ),
    "indices": (
        lambda place: {"sentence1": text(), "sentence2": text(), "label": place % 3},
        "text_classification",
        {"text": ["sentence1", "sentence2"], "label": "label", "classes": 3},
    ),
    "numbers that count from 1": (
        lambda place: {"text": text(), "label": place % 3 + 1},
        "text_classification",
        {"text": ["text"], "label": "label", "classes": [1, 2, 3]},
    ),
    "true or false": (
        lambda place: {"text": text(), "spam": place % 2 == 0},
        "text_classification",
        {"text": ["text"], "label": "spam", "classes": ["false", "true"]},
    ),
    "amounts": (
        lambda place: {"text": text(), "score": DRAW.random()},
        "regression",
        {"text": ["text"], "label": "score"},
    ),
    "stars": (
        lambda place: {"title": text(2), "body": text(), "stars": place % 5 + 1},
        "regression",
        {"text": ["body"], "label": "stars"},
    ),
    "words": (lambda place: tags(), "token_classification", {"words": "tokens", "label": "ner"}),
    "endings": (
        lambda place: {
            "sent1": text(),
            "sent2": text(2),
            **{f"ending{n}": text(3) for n in range(4)},
            "label": place % 4,
        },
        "multiple_choice",
        {"text": ["sent1", "sent2"], "choices": [f"ending{n}" for n in range(4)], "label": "label"},
    ),
    "letters": (
        lambda place: {
            "question": text(),
            "choices": {"text": [text(2)] * 3, "label": [*"ABC"]},
            "answerKey": "ABC"[place % 3],
        },
        "multiple_choice",
        {"text": ["question"], "choices": "choices.text", "label": "answerKey", "choice_names": ["A", "B", "C"]},
    ),
    "answers": (answered, "question_answering", {"question": "question", "context": "context", "answer": "answers"}),
    "unanswerable": (
        lambda place: {**answered(place), **({"answers": {"text": [], "answer_start": []}} if place % 4 == 0 else {})},
        "question_answering",
        {"unanswerable": True},
    ),
    "lists of classes": (
        lambda place: {"text": text(), "tags": [["a", "b"], ["b"], []][place % 3]},
        "multi_label",
        {"text": ["text"], "labels": "tags", "classes": ["a", "b"]},
    ),
    "flags": (
        lambda place: {"comment": text(), "insult": place % 2, "threat": place // 2 % 2},
        "multi_label",
        {"text": ["comment"], "labels": ["insult", "threat"]},
    ),
    "prompts": (
        lambda place: {"instruction": text(), "output": text()},
        "causal_lm",
        {"prompt": "instruction", "response": "output"},
    ),
    "chats": (
        lambda place: {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]},
        "causal_lm",
        {"messages": "messages"},
    ),
    "images": (
        lambda place: {"file_name": f"{place}.png", "label": place % 2},
        "image_classification",
        {"image": "file_name", "label": "label", "classes": 2},
    ),
}


def as_profile(made, base=None):
    columns = {name: [row[name] for row in made] for name in made[0]}
    return profile_of_files([FileColumns(columns, len(made))], base)


def surest(profile, given=()):
    found = {name: one for name, kind in known_kinds().items() if (one := kind.suggested(profile, dict(given)))}
    return max(found.items(), key=lambda named: named[1].certainty) if found else (None, None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_each_kind_knows_its_rows(name, ending, tmp_path):
    make, kind, options = CASES[name]
    made, path = rows(make), tmp_path / f"rows{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    else:
        pq.write_table(pa.Table.from_pylist(made), path)
    found, suggestion = surest(profile_of_files([read_columns(path)]))
    assert found == kind
    assert {key: suggestion.options[key] for key in options} == options


@pytest.mark.parametrize("name", ["classes", "indices", "amounts", "stars", "flags", "endings", "images", "prompts"])
def test_the_same_rows_from_csv_with_any_separator(name, tmp_path):
    make, kind, options = CASES[name]
    made = rows(make)
    for separator, ending in ((",", ".csv"), (";", ".csv"), ("\t", ".tsv")):
        lines = [separator.join(map(str, row)) for row in [made[0], *(row.values() for row in made)]]
        path = tmp_path / f"rows{ending}"
        path.write_text("\n".join(lines) + "\n")
        read = read_columns(path)
        assert read.delimiter == (";" if separator == ";" else None)
        found, suggestion = surest(profile_of_files([read]))
        assert found == kind
        assert {key: suggestion.options[key] for key in options} == options


def test_encoder_decoder_bases_make_prompts_sequence_to_sequence():
    made = rows(CASES["prompts"][0])
    kind, suggestion = surest(as_profile(made, {"is_encoder_decoder": True}))
    assert kind == "seq2seq"
    assert suggestion.options == {"prompt": "instruction", "response": "output"}


def test_what_could_be_several_things_is_left_open():
    made = rows(lambda place: {"a": text(), "b": text(), "c": place % 2, "d": place % 3})
    profile = as_profile(made)
    assert surest(profile) == (None, None)
    assert surest(profile, {"label": "d"}.items()) == (None, None)
    kind, suggestion = surest(profile, {"label": "d", "text": ["b", "a"]}.items())
    assert kind == "text_classification"
    assert suggestion.options == {"text": ["b", "a"], "label": "d", "classes": 3}


def test_class_names_of_the_hub_are_taken(tmp_path):
    path = tmp_path / "rows.parquet"
    feature = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": [text() for _ in range(20)], "label": [0, 1] * 10})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), path)
    _, suggestion = surest(profile_of_files([read_columns(path)]))
    assert suggestion.options["classes"] == ["bad", "good"]


@pytest.mark.parametrize(
    ("values", "spelled", "holds"),
    [
        (["1", "2.0"], True, Holds.WHOLE_NUMBERS),
        (["1", "2.5"], True, Holds.NUMBERS),
        (["1", "x"], True, Holds.TEXTS),
        (["1", "2"], False, Holds.TEXTS),
        ([1, 2.0], False, Holds.WHOLE_NUMBERS),
        ([True, None], False, Holds.FLAGS),
        ([None], False, Holds.NOTHING),
        ([["a"], []], False, Holds.LISTS_OF_TEXTS),
        ([["a"], [1]], False, Holds.OTHER),
        ([[]], False, Holds.OTHER),
        ([{"a": 1}], False, Holds.OBJECTS),
        (["a", 1], False, Holds.OTHER),
        (["a.png", "b.JPG"], True, Holds.IMAGES),
    ],
)
def test_what_a_column_holds(values, spelled, holds):
    assert profile_of("x", values, spelled=spelled).holds is holds


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "", "there"),
        ("a.jsonl", "[1]\n", "holds no object"),
        ("a.jsonl", "{", "cannot be read as JSON"),
        ("a.parquet", "x", "no parquet file"),
        ("a.xlsx", "x", "expected a file ending in"),
    ],
)
def test_damaged_files(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_text(content)
    if told == "there":
        assert read_columns(path).rows == 0
        return
    with pytest.raises(UnreadableError, match=told):
        read_columns(path)
