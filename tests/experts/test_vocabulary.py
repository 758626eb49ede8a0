"""Whether tokens mean the same, and have a row each."""

import pytest

from pave_lightning.experts.vocabulary import differing_tokens, row_problems, token_rows
from pave_lightning.weights import Architecture

BASE = {"[PAD]": 0, "a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    "own",
    [BASE, {**BASE, "[NEW]": 4}, {"[PAD]": 0, "a": 1, "b": 2}, {**BASE, "far": 63}, {"a": 1}],
    ids=["the same", "one more", "one less", "one far away", "one alone"],
)
def test_tokens_that_mean_the_same(own):
    assert list(differing_tokens("it", own, BASE)) == []


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({**BASE, "b": 3, "c": 2}, "2 tokens differ, first 'c', which is token 2 there, but token 3 in the base"),
        ({**BASE, "c": 4}, "1 token differs, first 'c', which is token 4 there, but token 3 in the base"),
        (
            {"[PAD]": 0, "x": 1, "b": 2, "c": 3},
            "first 'x', which is token 1 there, but not known, and token 1 is 'a' in the base",
        ),
        ({"[NEW]": 0, "[PAD]": 1, "a": 2, "b": 3, "c": 4}, "5 tokens differ, first '[NEW]'"),
    ],
)
def test_tokens_that_do_not(own, expected):
    (problem,) = differing_tokens("it", own, BASE)
    assert problem.startswith("it: its vocabulary is not the base's: ")
    assert expected in problem


def test_a_row_for_each_token(tiny_tokenizer):
    assert list(row_problems("it", None, None, tiny_tokenizer)) == []
    assert list(row_problems("it", 100, 100, tiny_tokenizer)) == []
    assert list(row_problems("it", 128, None, tiny_tokenizer)) == []
    (problem,) = row_problems("it", 99, 99, tiny_tokenizer)
    assert "its tokenizer has 100 tokens, but its embedding 99 rows, so token 99 could not be read" in problem
    (problem,) = row_problems("it", 128, 100, tiny_tokenizer)
    assert "its token embedding has 128 rows, but its config.json says vocab_size 100" in problem


def test_rows_are_read_from_the_file(base_folder, tmp_path):
    assert token_rows(base_folder, Architecture.of_folder(base_folder)) == 100
