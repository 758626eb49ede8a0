"""One tokenizer with the tokens of several."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pave_lightning.errors import PaveError
from pave_lightning.tasks.union_tokenizer import union_problems, write_union_tokenizer, wrong_numbers

SPECIAL = ("<pad>", "<unk>")


def wrapped(model, *, added=()):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    found.add_tokens([AddedToken(token, normalized=False) for token in added])
    return found


def bpe(words, *, shuffled=False, added=()):
    """Byte pairs that make whole words, letter by letter from the left."""
    letters = sorted(set("abcdefgxyz"), reverse=shuffled)
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return wrapped(models.BPE(vocabulary, merges, unk_token="<unk>"), added=added)


def unigram(pieces, *, added=()):
    return wrapped(models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), *pieces], unk_id=1), added=added)


def joined(tmp_path, base, experts, *, first=None):
    known = base.get_vocab()
    new = dict.fromkeys(token for own in experts for token in sorted(own.get_vocab()) if token not in known)
    first = max(known.values()) + 1 if first is None else first
    numbers = {token: first + place for place, token in enumerate(new)}
    assert not list(union_problems(base, dict(enumerate(experts)), new))
    write_union_tokenizer(base, experts, numbers, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert wrong_numbers(found, {**known, **numbers}) is None
    return found


def test_merges_come_along(tmp_path):
    base, expert = bpe(["abc"]), bpe(["abc", "xyz"], shuffled=True)
    found = joined(tmp_path, base, [expert])
    assert found.tokenize("abc xyz") == ["abc", "xyz"]
    assert found("abc")["input_ids"] == base("abc")["input_ids"]
    assert base.tokenize("xyz") == ["x", "y", "z"]


@pytest.mark.parametrize("first", [None, 40])
def test_numbers_behind_rows_that_no_token_has(tmp_path, first):
    base, expert = bpe(["abc"]), bpe(["xy"], added=["<tool>"])
    found = joined(tmp_path, base, [expert], first=first)
    assert found.tokenize("abc <tool> xy") == ["abc", "<tool>", "xy"]
    assert min(found("<tool> xy")["input_ids"]) >= (first or len(base))


def test_scores_come_along(tmp_path):
    base = unigram([("a", -5.0), ("b", -5.0), ("x", -6.0), ("y", -6.0), ("ab", -3.0)])
    expert = unigram([("y", -6.0), ("x", -6.0), ("xy", -2.0)], added=["<tool>"])
    for name, first in (("close", None), ("apart", 12)):
        (tmp_path / name).mkdir()
        found = joined(tmp_path / name, base, [expert], first=first)
        assert found.tokenize("ab xy <tool>") == ["ab", "xy", "<tool>"]


def test_words_of_several_experts(tmp_path):
    base = wrapped(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    first = wrapped(models.WordLevel({"b": 0, "<unk>": 1, "<pad>": 2}, unk_token="<unk>"))
    second = wrapped(models.WordLevel({"<pad>": 0, "<unk>": 1, "c": 2, "b": 3}, unk_token="<unk>"))
    found = joined(tmp_path, base, [first, second])
    assert found("a b c d")["input_ids"] == [2, 3, 4, 1]


def test_what_stands_around_a_text_stays(tmp_path):
    base = wrapped(models.WordLevel({"<pad>": 0, "<unk>": 1, "[CLS]": 2, "a": 3}, unk_token="<unk>"))
    base.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    found = joined(tmp_path, base, [wrapped(models.WordLevel({"<unk>": 0, "<pad>": 1, "b": 2}, unk_token="<unk>"))])
    assert found("a b")["input_ids"] == [2, 3, 4]


def test_tokenizers_of_different_kinds(tmp_path):
    base, other = bpe(["abc"]), unigram([("xy", -2.0)], added=["<tool>"])
    (problem,) = union_problems(base, {"news": other}, ["xy", "<tool>"])
    assert problem == (
        "task 'news': vocabulary: union cannot join its tokenizer, a Unigram, with the base's, a BPE, since they split "
        "words in other ways; use vocabulary: base_rows"
    )
    assert not list(union_problems(base, {"news": other}, ["<tool>"]))  # which is found whatever the kind
    assert joined(tmp_path, base, [unigram([], added=["<tool>"])]).tokenize("abc <tool>") == ["abc", "<tool>"]


def test_a_tokenizer_without_a_file_of_its_own(tmp_path):
    from transformers import ByT5Tokenizer

    (problem,) = union_problems(ByT5Tokenizer(), {"a": bpe(["ab"])}, ["ab"])
    assert "union takes tokenizers that have a tokenizer.json" in problem
    with pytest.raises(
        PaveError, match=r"union takes a base whose tokenizer has a tokenizer\.json; use vocabulary: base_rows"
    ):
        write_union_tokenizer(ByT5Tokenizer(), [], {"ab": 999}, tmp_path)
