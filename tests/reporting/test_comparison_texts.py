"""Where two models write different texts."""

import numpy as np

from pave_lightning.reporting.comparison import columns_of, disagreements
from pave_lightning.tasks.predictions import TaskPredictions, as_objects

RIGHT = as_objects([("yes", "yeah"), ("no",), ("no",), ("yes",)])


def of_texts(*texts):
    return TaskPredictions.ordered(np.arange(4), as_objects(texts), RIGHT)


def test_texts_that_are_right_but_for_blanks_are_no_mistakes():
    one, other = of_texts("yeah", "yes", "no", "what"), of_texts(" yes\n", "no", "maybe", "else")
    found = disagreements(one, other)
    assert (found.first, found.second) == (1, 1)
    assert found.places.tolist() == [1, 2, 0, 3]
    assert found.nearer.tolist() == [2, 1, 0, 0]
    columns = columns_of("mine", one, other, found.first_ones(3), [])
    assert columns["target_class"] == ["no", "no", "yes | yeah"]
    assert columns["a_class"] == ["yes", "no", "yeah"]
    assert np.isnan(columns["a"]).all()
    assert columns["nearer"] == ["b", "a", "neither"]
