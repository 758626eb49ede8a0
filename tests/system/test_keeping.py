"""What is made once while something larger is done."""

import pytest

from pave_lightning.system.keeping import keeping, kept


def test_within_a_block_the_same_object_is_given():
    with keeping():
        one = kept(("list", 1), list)
        assert kept(("list", 1), list) is one
        assert kept(("list", 2), list) is not one


def test_outside_of_a_block_it_is_made_each_time():
    assert kept("key", list) is not kept("key", list)
    with keeping():
        one = kept("key", list)
    assert kept("key", list) is not one
    with keeping():
        assert kept("key", list) is not one


def test_a_block_within_another_shares_what_is_kept():
    with keeping():
        one = kept("key", list)
        with keeping():
            assert kept("key", list) is one
        assert kept("key", list) is one


def test_what_fails_is_tried_again_and_nothing_stays_behind():
    with pytest.raises(ZeroDivisionError), keeping():
        kept("key", lambda: 1 / 0)
    with keeping():
        with pytest.raises(ZeroDivisionError):
            kept("key", lambda: 1 / 0)
        assert kept("key", lambda: 3) == 3
