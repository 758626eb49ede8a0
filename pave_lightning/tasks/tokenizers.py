"""The tokenizer of a model folder, ready to pad: which files it needs, which token pads, on which side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import PaveError, foreign
from pave_lightning.system.files import check_sizes
from pave_lightning.system.keeping import kept
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.weights.empty_models import read_config
from pave_lightning.weights.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Word starts that some tokenizers always have, however empty their vocabulary.
_MARKS = {"", "▁", "Ġ", "</w>", "##"}


def load_tokenizer(folder: Path, base: Path | None = None, *, words: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token, padding on the side that is exact for the model.

    A tokenizer without padding token pads with the token that ``config.json`` names, where that is a special one, or
    else with its end-of-text token. Padding stands on the right, where no token that a model reads comes behind it;
    only models that read the last place whatever stands there (XLNet) are padded on the left.

    Args:
        folder: folder of a model, or of an adapter.
        base: folder of the base model, whose tokenizer an expert without any tokenizer files has.
        words: whether it is given lists of words; those that tell a word by the space before it then put one there.

    Inside of `keeping` it is read once, and must not be changed.

    Raises:
        PaveError: there is none, it cannot be read, its vocabulary is empty, or it has no token to pad with.
    """
    place = tokenizer_folder(folder, base)
    configured = folder if (folder / "config.json").is_file() or base is None else base
    return kept(("tokenizer", place, configured, words), lambda: _usable(place, configured, words=words))


def _usable(place: Path, configured: Path, *, words: bool) -> PreTrainedTokenizerBase:
    config = read_config(configured)
    tokenizer = _read(place, config, {"add_prefix_space": True} if words else {})
    _refuse_missing_files(place, tokenizer)
    tokens = tokenizer.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    if not set(tokens) - added - _MARKS:
        raise PaveError(
            f"{place}: the vocabulary of its tokenizer is empty ({len(tokens)} tokens, all of them special), so every "
            "text would be read as unknown tokens; copy the tokenizer's files from the model that it was made of"
        )
    _choose_padding(place, tokenizer, config)
    return tokenizer


def tokenizer_folder(folder: Path, base: Path | None = None) -> Path:
    """Where the tokenizer of an expert lies: in its folder, or in that of its base where it has no tokenizer files."""
    return folder if base is None or has_tokenizer(folder) else base


def named_padding(config: PretrainedConfig) -> int | None:
    """The padding token that a configuration names; None where it names none of its vocabulary."""
    named, rows = getattr(text_config(config), "pad_token_id", None), getattr(text_config(config), "vocab_size", None)
    inside = isinstance(named, int) and named >= 0 and (not isinstance(rows, int) or named < rows)
    return named if inside else None


def padding_id(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills up batches: the one by which the model tells padding, or else the tokenizer's.

    Many heads find the last token of a text by comparing with ``pad_token_id`` of the configuration, so batches must be
    filled with that very token.
    """
    named = named_padding(config)
    return int(tokenizer.pad_token_id) if named is None else named


def set_padding(model: nn.Module, folder: Path, base: Path | None = None) -> None:
    """Let a model's configuration name the padding token of its tokenizer, where it names none itself.

    Models that read no tokens, such as those of images, have no tokenizer, and are left as they are.

    Args:
        model: a Hugging Face model.
        folder: its folder.
        base: as `load_tokenizer` takes it.

    Raises:
        PaveError: the tokenizer cannot be used.
    """
    config: Any = model.config
    if named_padding(config) is None and getattr(model, "main_input_name", TOKENS) == TOKENS:
        text_config(config).pad_token_id = config.pad_token_id = load_tokenizer(folder, base).pad_token_id


def padding_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to tell of the token that batches are padded with; None where it is one of its own."""
    token = tokenizer.special_tokens_map.get("pad_token")
    if token is None or token != tokenizer.special_tokens_map.get("eos_token"):
        return None
    return f"its tokenizer has no padding token of its own; batches are padded with its end-of-text token {token}"


def text_config(config: PretrainedConfig) -> Any:
    """The part of a configuration that is about text; all of it for models that read nothing else."""
    return config.get_text_config()


def _read(folder: Path, config: PretrainedConfig, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what it would say is told below
    check_sizes(folder)
    what, advice = f"{folder}: no tokenizer could be loaded", "put tokenizer.json and tokenizer_config.json there"
    try:
        with foreign(what, f"{advice}: {_advice(folder)}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False, **options
            )
            tokenizer.get_vocab()
            tokenizer(["a"], ["b"], truncation=True, max_length=8)  # which a file can be wrong for, too
    finally:
        transformers_logging.set_verbosity(verbosity)
    return tokenizer


def _advice(folder: Path) -> str:
    if not has_tokenizer(folder):
        return "the folder has no tokenizer files, which model.save_pretrained does not write"
    if (folder / "vocab.json").is_file() and not any((folder / n).is_file() for n in ("tokenizer.json", "merges.txt")):
        return "merges.txt is missing; copy it from the model that it was made of"
    pieces = sorted(file.name for file in folder.iterdir() if file.suffix in (".model", ".tiktoken", ".spm"))
    if pieces and not (folder / "tokenizer.json").is_file():
        return f"{pieces[0]} alone needs sentencepiece or tiktoken; load and save the tokenizer once where these are"
    return "copy them from the model that it was made of, or save the tokenizer again"


def _refuse_missing_files(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a tokenizer was made without the files that hold its vocabulary, which transformers does not tell."""
    names = dict(getattr(type(tokenizer), "vocab_files_names", {}))
    if not names or (folder / "tokenizer.json").is_file():  # some know all characters or bytes, and need no file
        return
    names.pop("tokenizer_file", None)
    known = [*names.values(), "tokenizer.model", "tekken.json"]
    there = [name for name in known if (folder / name).is_file()] + list(folder.glob("*.tiktoken"))
    if not there:
        raise PaveError(
            f"{folder} holds no vocabulary for its tokenizer, a {type(tokenizer).__name__} (looked for "
            f"{', '.join(['tokenizer.json', *names.values()])}), so every text would be read as unknown tokens; "
            "copy the tokenizer's files from the model that it was made of"
        )


def _choose_padding(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    reads_last = getattr(text_config(config), "summary_type", None) == "last"
    tokenizer.padding_side = "left" if reads_last else "right"
    known = tokenizer.special_tokens_map
    if known.get("pad_token") is not None:
        return
    named = getattr(text_config(config), "pad_token_id", None)
    special = set(tokenizer.all_special_ids)
    if isinstance(named, int) and named in special:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(named)
    elif known.get("eos_token") is not None:
        tokenizer.pad_token = known["eos_token"]
    else:
        raise PaveError(
            f"{folder}: its tokenizer has neither a padding token nor an end-of-text token to pad with, but rows of "
            "one batch must be padded to one length; set 'pad_token' in tokenizer_config.json to one of its tokens"
        )
