"""Vision models of transformers."""

import torch
import transformers as hf
from torch import Tensor

from families.pretrained import Pretrained

STANDARD = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


def images(size: int = 16):
    def batch(seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(4, 3, size, size, generator=random)}

    return batch


FAMILIES = [
    Pretrained("ViT", lambda: hf.ViTConfig(**STANDARD), "ViTModel", "ViTForImageClassification", images(), "vit"),
]
