"""One tokenizer that knows the tokens of several, as long as they split texts in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from pave_lightning.errors import PaveError, listed, shortened

# In the place of numbers that no token has, where a vocabulary is a list.
UNUSED = "<unused:{}>"
# Scores are logarithms of probabilities; no text is split into a piece like this.
UNUSED_SCORE = -1e6
# Share of the texts of its tokens that a joined tokenizer may split in other ways than the one that they are of.
TOLERATED = 0.01


def union_problems(
    base: PreTrainedTokenizerBase, experts: Mapping[str, PreTrainedTokenizerBase], new: Iterable[str]
) -> Iterator[str]:
    """Why a tokenizer cannot take in the tokens of others.

    Args:
        base: the tokenizer.
        experts: the others, by task.
        new: the tokens that it lacks.
    """
    kinds = {"": _kind(base)} | {task: _kind(own) for task, own in experts.items()}
    wanted = set(new)
    for task, own in experts.items():
        if not (lacking := wanted & set(own.get_vocab())):
            continue
        if kinds[task] is None or kinds[""] is None:
            yield (
                f"task '{task}': vocabulary: union takes tokenizers that have a tokenizer.json, and this one or the "
                "base's has none; save them with a fast tokenizer, or use vocabulary: base_rows"
            )
        elif kinds[task] != kinds[""] and lacking - _added(own):
            yield (
                f"task '{task}': vocabulary: union cannot join its tokenizer, a {kinds[task]}, with the base's, a "
                f"{kinds['']}, since they split words in other ways; use vocabulary: base_rows"
            )


def write_union_tokenizer(
    base: PreTrainedTokenizerBase,
    experts: Iterable[PreTrainedTokenizerBase],
    numbers: Mapping[str, int],
    folder: Path,
) -> None:
    """Write the base's tokenizer with the new tokens of experts in it.

    Added tokens stay added ones. Others become entries of the vocabulary as they are in the expert's: with its merges
    (BPE), which come behind the base's own and so change no word that these make whole, or with its scores (Unigram).

    Args:
        base: the base's tokenizer.
        experts: those of the experts; of a token that several have, the first one's form counts.
        numbers: the new tokens and their numbers, above all of the base's.
        folder: an existing folder.

    Raises:
        PaveError: the tokenizers do not fit together, see `union_problems`, or the result reads other numbers.
    """
    base.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if not numbers:
        return
    if not file.is_file():
        raise PaveError(
            "vocabulary: union takes a base whose tokenizer has a tokenizer.json; use vocabulary: base_rows"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    left = dict(numbers)
    for own in experts:
        found = {token: number for token, number in left.items() if token in own.get_vocab()}
        if found:
            _take_in(content, json.loads(own.backend_tokenizer.to_str()), found)
        left = {token: number for token, number in left.items() if token not in found}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def wrong_numbers(tokenizer: PreTrainedTokenizerBase, numbers: Mapping[str, int]) -> str | None:
    """What a written tokenizer has under other numbers than it should; None where all are right."""
    known = tokenizer.get_vocab()
    wrong = [token for token, number in numbers.items() if known.get(token) != number]
    return (
        f"the joined tokenizer has other numbers for {listed([shortened(repr(t)) for t in wrong], 3)}"
        if wrong
        else None
    )


def joined_problems(
    base: PreTrainedTokenizerBase,
    experts: Mapping[str, PreTrainedTokenizerBase],
    numbers: Mapping[str, int],
) -> Iterator[str]:
    """Why the joined tokenizer would not read what the base and the experts were trained on; joins them to see.

    It must split the texts of each tokenizer's own tokens as that does, alone and behind a space. Vocabularies that
    were learned apart seldom pass: merges (BPE) begin with the base's, pieces (Unigram) compete by their scores.

    Args:
        base: the base's tokenizer.
        experts: those of the experts, by task; see `union_problems`.
        numbers: the new tokens and their numbers.
    """
    from transformers import AutoTokenizer  # which takes plans a third of a second that need none of it

    with TemporaryDirectory(prefix="pave-tokenizer-") as folder:
        write_union_tokenizer(base, experts.values(), numbers, Path(folder))
        joined = AutoTokenizer.from_pretrained(folder)
    wrong = wrong_numbers(joined, {**base.get_vocab(), **numbers})
    if wrong is not None:
        yield f"vocabulary: union: {wrong}; use vocabulary: base_rows"
        return
    for whose, own in {"the base": base, **{f"task '{task}'": own for task, own in experts.items()}}.items():
        texts = _texts_of(own)
        expected, found = _split(own, texts), _split(joined, texts)
        # What a token that was added by hand is part of is meant to be split otherwise.
        added = [token for token in _added(joined) if token not in own.get_vocab()]
        differ = [
            (text, before, after)
            for text, before, after in zip(texts, expected, found, strict=True)
            if before != after and not any(token in text for token in added)
        ]
        if len(differ) > TOLERATED * len(texts):
            text, before, after = differ[0]
            yield (
                f"vocabulary: union: the joined tokenizer splits {len(differ):,} of {len(texts):,} texts of the tokens "
                f"of {whose} in other ways than its own does, such as {shortened(repr(text))} "
                f"({listed(after, 5)} in place of {listed(before, 5)}); their vocabularies were learned apart: use "
                "vocabulary: base_rows"
            )


def _texts_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token that is no added one stands for, alone and behind a space; without parts of characters."""
    added = _added(tokenizer)
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
    tokens = [token for token in sorted(tokenizer.get_vocab()) if token not in added]
    decoded = (str(tokenizer.convert_tokens_to_string([token.removeprefix(prefix)])).strip() for token in tokens)
    words = dict.fromkeys(text for text in decoded if text and "\N{REPLACEMENT CHARACTER}" not in text)
    return [text for word in words for text in (word, f" {word}")]


def _split(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[str]]:
    """The tokens of each text."""
    found = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.tokens for encoding in found]


def _take_in(content: dict[str, Any], own: dict[str, Any], numbers: Mapping[str, int]) -> None:
    """Put tokens of one tokenizer's JSON into another's."""
    added = [entry for entry in own.get("added_tokens", ()) if entry["content"] in numbers]
    content["added_tokens"] = [
        *content.get("added_tokens", ()),
        *({**entry, "id": numbers[entry["content"]]} for entry in added),
    ]
    model, theirs = content["model"], own["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        scores = dict(map(tuple, theirs["vocab"])) if isinstance(theirs["vocab"], list) else {}
        for token, number in sorted(numbers.items(), key=lambda pair: pair[1]):
            vocabulary += [[UNUSED.format(place), UNUSED_SCORE] for place in range(len(vocabulary), number)]
            vocabulary.append([token, scores.get(token, UNUSED_SCORE)])
        return
    # Added tokens too: what is not in the vocabulary is numbered anew when it is read.
    vocabulary.update(numbers)
    if "merges" in model:
        ordinary = set(numbers) - {entry["content"] for entry in added}
        model["merges"] += [pair for pair in theirs.get("merges", ()) if "".join(_halves(pair)) in ordinary]


def _halves(pair: Any) -> list[str]:
    """The two parts of a merge, which older files write as one text."""
    return pair.split(" ") if isinstance(pair, str) else list(pair)


def _kind(tokenizer: PreTrainedTokenizerBase) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else type(backend.model).__name__


def _added(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values()}
