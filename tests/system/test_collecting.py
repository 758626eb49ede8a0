"""How often Python looks for garbage."""

import gc

import pytest

from pave_lightning.system.collecting import seldom_collected


def test_the_limits_are_put_back_whatever_happens():
    before = gc.get_threshold()
    with seldom_collected():
        assert gc.get_threshold()[0] > 10 * before[0]
    assert gc.get_threshold() == before
    with pytest.raises(ZeroDivisionError), seldom_collected():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == before
