"""What benchmarks share that need models of RoBERTa's shapes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def roberta(blocks: int, vocabulary: int) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A configuration, and the shapes of the weights of its classifier by name."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": vocabulary, "num_hidden_layers": blocks}
    config = RobertaConfig(**sizes, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    config.architectures = [type(model).__name__]
    return config, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of two tokens: merged folders hold one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    backend = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
