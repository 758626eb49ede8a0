"""Names of classes as two sources write them."""

import pytest

from pave_lightning.tasks.labels import match_names


@pytest.mark.parametrize(
    ("names", "classes", "indices"),
    [
        (["neg", "pos"], ["neg", "pos"], [0, 1]),
        (["POS", "Neg "], ["neg", "pos"], [1, 0]),
        (["positive", "neg"], ["neg", "pos"], [None, 0]),
        (["us", "US"], ["US", "us"], [1, 0]),
        (["Us"], ["US", "us"], [None]),
        (["STRASSE"], ["straße", "weg"], [0]),
        ([], ["a", "b"], []),
    ],
)
def test_names_are_matched_without_regard_to_case_unless_it_tells_classes_apart(names, classes, indices):
    assert match_names(names, classes) == indices
