"""One tokenizer with the tokens of several."""

import json
from copy import deepcopy

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pave_lightning.errors import PaveError
from pave_lightning.tasks.union_tokenizer import (
    joined_problems,
    union_problems,
    write_union_tokenizer,
    wrong_numbers,
)

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


PROSE = [
    *("the", "film", "was", "good", "and", "its", "acting", "better", "than", "expected"),
    *("although", "story", "is", "thin", "ending", "weak"),
]
NETS = [
    *("tensor", "gradient", "backward", "optimizer", "learning", "transformer", "attention"),
    *("gradients", "tensors", "optimizers", "learnings"),
]


def trained(kind, words, size):
    """A tokenizer as they are in use, learned from texts of these words."""
    if kind == "byte-level BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=[*SPECIAL], unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer, backend.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL], show_progress=False)
    backend.train_from_iterator([" ".join(words[start:] + words[:start]) for start in range(len(words))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


KINDS = ["byte-level BPE", "unigram", "WordPiece"]


def numbers_of(base, *experts):
    known = base.get_vocab()
    new = dict.fromkeys(token for own in experts for token in sorted(own.get_vocab()) if token not in known)
    return {token: max(known.values()) + 1 + place for place, token in enumerate(new)}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_added_leave_all_else_as_it_was(tmp_path, kind):
    base = trained(kind, PROSE, 90)  # once, since what is learned depends on chance among equals
    first, second = deepcopy(base), deepcopy(base)
    first.add_tokens(["<tool>", "zebra"])
    second.add_tokens([AddedToken("<call>", normalized=False)])
    assert not list(joined_problems(base, {"a": first, "b": second}, numbers_of(base, first, second)))
    found = joined(tmp_path, base, [first, second])
    text = "the acting <tool> was weak zebra film"
    assert found.tokenize(text) == first.tokenize(text)
    assert found.tokenize("good <call> story") == second.tokenize("good <call> story")
    assert found.tokenize("the film was good") == base.tokenize("the film was good")


def extended(base, word):
    """A byte-level tokenizer with further merges behind its own, which make one more word whole, from the left."""
    content = json.loads(base.backend_tokenizer.to_str())
    whole, *rest = base.tokenize(word)
    for piece in rest:
        content["model"]["merges"].append([whole, piece])
        whole += piece
        content["model"]["vocab"].setdefault(whole, len(content["model"]["vocab"]))
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def test_merges_behind_the_bases_are_read_as_the_expert_reads_them(tmp_path):
    base = trained("byte-level BPE", PROSE, 60)
    expert = extended(extended(base, " tensor"), "gradient")
    assert not list(joined_problems(base, {"a": expert}, numbers_of(base, expert)))
    found = joined(tmp_path, base, [expert])
    for text in ("the tensor was good", "gradient ending tensor", *PROSE):
        assert found.tokenize(text) == expert.tokenize(text)
    for text in PROSE:
        assert found(text)["input_ids"] == base(text)["input_ids"]


def test_vocabularies_that_were_learned_apart_are_refused():
    base, expert = trained("byte-level BPE", PROSE, 90), trained("byte-level BPE", NETS + PROSE, 150)
    (problem,) = joined_problems(base, {"a": expert}, numbers_of(base, expert))
    assert problem.startswith("vocabulary: union: the joined tokenizer splits ")
    assert "texts of the tokens of task 'a' in other ways than its own does, such as '" in problem
    assert problem.endswith("their vocabularies were learned apart: use vocabulary: base_rows")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_refused_reads_the_tokens_of_both_as_both_did(tmp_path, kind):
    for size in (40, 60, 90):
        base, expert = trained(kind, PROSE, size), trained(kind, NETS, size)
        numbers = numbers_of(base, expert)
        if list(joined_problems(base, {"a": expert}, numbers)):
            continue
        (tmp_path / str(size)).mkdir()
        found = joined(tmp_path / str(size), base, [expert])
        for own in (base, expert):
            for token in own.get_vocab():
                text = own.convert_tokens_to_string([token.removeprefix("##")]).strip()
                if text and "\ufffd" not in text and token not in SPECIAL:
                    assert found.tokenize(text) == own.tokenize(text)
