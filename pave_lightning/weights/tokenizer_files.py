"""Which files of a model folder are a tokenizer's."""

from __future__ import annotations

from pathlib import Path

# What tokenizers keep their vocabulary and settings in; `*.json` and `*.txt` files that may be others' are named.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json"),
    *("vocab*.txt", "merges.txt", "dict.txt", "bpe.codes", "tekken.json", "byte_maps.json", "entity_vocab.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.tokenizer"),
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds files of a tokenizer; ``model.save_pretrained`` alone leaves none."""
    return any(next(folder.glob(pattern), None) is not None for pattern in TOKENIZER_FILES)
