import pyarrow as pa
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.tasks.labels import LabelValues, as_labels, label_reading, match_names, number_in, own_reading


@pytest.mark.parametrize(
    ("names", "classes", "found"),
    [
        (["POS", "NEG"], ["neg", "pos"], [1, 0]),
        (["neg", "other"], ["neg", "pos"], [0, None]),
        ([" pos "], ["neg", "pos"], [1]),
        # Two classes differ by case alone, so case counts.
        (["may", "MAY", "May"], ["May", "may"], [1, None, 0]),
        (["STRASSE"], ["straße", "x"], [0]),
        (["True", "false"], ["false", "true"], [1, 0]),
        ([], ["a", "b"], []),
        # One character or two for the same letter.
        (["cafe\N{COMBINING ACUTE ACCENT}"], ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "tea"], [0]),
    ],
)
def test_names_are_matched_ignoring_case_where_that_is_clear(names, classes, found):
    assert match_names(names, classes) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 1", 1), ("+1.50", 1.5), ("-.5e1", -5), ("1_0", None), ("0x1", None), ("", None), ("nan", None), ("one", None)],
)
def test_what_is_a_number(text, number):
    assert number_in(text) == number


TEXTS, NUMBERS, TRUTHS = ("texts", "numbers", "booleans")


@pytest.mark.parametrize(
    ("classes", "columns", "reading"),
    [
        # Texts: every one a name, else every one an index, else neither.
        (["neg", "pos"], [(TEXTS, ["pos", "NEG"])], "names"),
        (["neg", "pos"], [(TEXTS, ["1", "0"])], "indices"),
        (["neg", "pos"], [(TEXTS, ["1", "neg"])], None),
        (["neg", "pos"], [(TEXTS, ["1", "2"])], None),
        (["1", "0"], [(TEXTS, ["0", "1"])], "names"),
        (["1", "2"], [(TEXTS, ["1", "2"])], "names"),
        (["1", "2"], [(TEXTS, ["1", "0"])], "indices"),
        # One split alone could be names; with the others it cannot.
        (["1", "2"], [(TEXTS, ["1"]), (TEXTS, ["0", "1"])], "indices"),
        (["1", "2"], [(TEXTS, ["1", "2"]), (TEXTS, ["0", "1"])], None),
        (["1", "other"], [(TEXTS, ["1", "other"])], "names"),
        # Texts that spell the number of a class otherwise, as pandas writes whole numbers beside a missing one.
        (["1", "0"], [(TEXTS, ["1.0", "0.0"])], "names"),
        (["1", "0"], [(TEXTS, ["01", "00"])], "names"),
        (["1", "2", "3", "4", "5"], [(TEXTS, ["1.0", "5.0"])], "names"),
        (["1000.0", "2"], [(TEXTS, ["1e3", "2"])], "names"),
        (["1", "2"], [(TEXTS, ["1.0", "0.0"])], "indices"),
        (["neg", "pos"], [(TEXTS, ["1.0", "0.0"])], "indices"),
        # Numbers: indices, unless the names look like numbers.
        (["neg", "pos"], [(NUMBERS, [0, 1])], "indices"),
        (["neg", "pos"], [(NUMBERS, [0.0, 1.0])], "indices"),
        (["neg", "pos"], [(NUMBERS, [0, 2])], None),
        (["1", "2", "3"], [(NUMBERS, [1, 2, 3])], "names"),
        (["1", "2", "3"], [(NUMBERS, [1.0, 3.0])], "names"),
        (["1", "2", "3"], [(NUMBERS, [0, 1, 2])], "indices"),
        (["1", "2", "3"], [(NUMBERS, [1, 2]), (NUMBERS, [3])], "names"),
        (["0", "1"], [(NUMBERS, [0, 1])], "indices"),
        (["-1", "1"], [(NUMBERS, [-1, 1])], "names"),
        (["0.5", "1.5"], [(NUMBERS, [0.5, 1.5])], "names"),
        # Truth values are names and never indices.
        (["false", "true"], [(TRUTHS, [False, True])], "names"),
        (["True", "False"], [(TRUTHS, [False, True])], "names"),
        (["neg", "pos"], [(TRUTHS, [False, True])], None),
    ],
)
def test_how_labels_are_read(classes, columns, reading):
    assert label_reading([LabelValues(form, tuple(values)) for form, values in columns], classes) == reading


@pytest.mark.parametrize(
    ("classes", "values"), [(["1", "2", "3"], [1, 2]), (["1", "0"], [0, 1]), (["2", "1", "0"], [0.0, 2.0])]
)
def test_numbers_that_could_be_either_are_refused(classes, values):
    with pytest.raises(PaveError, match=r"names of classes .* as well as indices of other classes"):
        label_reading([LabelValues("numbers", tuple(values))], classes)
    # Nobody writes an index as a text where it is a name.
    assert label_reading([LabelValues("texts", tuple(map(str, map(int, values))))], classes) == "names"


@pytest.mark.parametrize(
    ("names", "classes", "reading"),
    [
        (["no", "yes"], ["No", "Yes"], "indices"),
        (["no", "yes"], ["yes", "no"], "names"),
        (["no", "yes"], ["bad", "good"], "indices"),
        (["no", "yes", "perhaps"], ["no", "yes", "other"], "indices"),
        (["1", "0"], ["0", "1"], "names"),
    ],
)
def test_columns_with_names_of_their_own(names, classes, reading):
    assert own_reading(names, classes) == reading


def test_names_at_another_place_beside_unknown_ones_are_refused():
    with pytest.raises(PaveError, match="in the order no, yes, perhaps, but 'classes' in the order no, other, yes"):
        own_reading(["no", "yes", "perhaps"], ["no", "other", "yes"])


def test_labels_become_names_as_the_task_spells_them_or_whole_indices():
    column = pa.chunked_array([["POS", "neg"], ["pos"]])
    values = LabelValues("texts", ("POS", "neg", "pos"))
    assert as_labels(column, values, "names", ["neg", "pos"]).to_pylist() == ["pos", "neg", "pos"]
    column = pa.chunked_array([["1", "0"], ["1.0"]])
    found = as_labels(column, LabelValues("texts", ("1", "0", "1.0")), "indices", ["neg", "pos"])
    assert found.to_pylist() == [1, 0, 1]
    assert found.type == pa.int64()
    own = LabelValues("numbers", (0, 1), ("pos", "neg"))
    assert as_labels(pa.chunked_array([[0, 1, 1]]), own, "names", ["neg", "pos"]).to_pylist() == ["pos", "neg", "neg"]


def test_texts_that_spell_a_class_otherwise_are_that_class():
    classes = ["1", "0"]
    values = LabelValues("texts", ("1.0", "0.0", "1"))
    column = pa.chunked_array([["1.0", "0.0", "1", "1.0"]])
    assert as_labels(column, values, "names", classes).to_pylist() == ["1", "0", "1", "1"]
