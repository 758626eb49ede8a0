"""Language models of transformers."""

import torch
import transformers as hf
from torch import Tensor

from families.pretrained import Pretrained

STANDARD = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def words(seed: int) -> dict[str, Tensor]:
    """Token ids, three texts of them padded on the right."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    return {"input_ids": torch.randint(3, 60, mask.shape, generator=random) * mask, "attention_mask": mask.long()}


FAMILIES = [
    Pretrained("BERT", lambda: hf.BertConfig(**STANDARD), "BertModel", "BertForSequenceClassification", words, "bert"),
]
