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


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
STAGES = {"depths": [1, 2], "num_stages": 2, "hidden_sizes": [8, 16]}


def pairs(seed: int) -> dict[str, Tensor]:
    """Images, and texts of one length."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (3, 7), generator=random)
    ids[:, -1] = 2
    return {"input_ids": ids, **images()(seed)}


def clip() -> hf.CLIPConfig:
    return hf.CLIPConfig(text_config=TEXT, vision_config=STANDARD, projection_dim=8)


def siglip() -> hf.SiglipConfig:
    return hf.SiglipConfig(text_config=TEXT, vision_config=STANDARD)


def swin() -> hf.SwinConfig:
    return hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)


def resnet(kind: str) -> hf.ResNetConfig:
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type=kind)


def of_images(name: str, config, model: str, size: int = 16, inside: str = "", **more) -> Pretrained:
    """A row of image classifiers on a bare model."""
    return Pretrained(name, config, f"{model}Model", f"{model}ForImageClassification", images(size), inside, **more)


BOTH = ({}, {})
FAMILIES = [
    of_images("ViT", lambda: hf.ViTConfig(**STANDARD), "ViT", inside="vit"),
    of_images("DeiT", lambda: hf.DeiTConfig(**STANDARD), "DeiT", inside="deit", slow=True),
    of_images("BEiT", lambda: hf.BeitConfig(**STANDARD), "Beit", inside="beit", slow=True),
    of_images("DINOv2", lambda: hf.Dinov2Config(**STANDARD), "Dinov2", inside="dinov2", slow=True),
    of_images("Swin", swin, "Swin", inside="swin", slow=True),
    of_images("ConvNeXt", lambda: hf.ConvNextConfig(**STAGES), "ConvNext", 32, inside="convnext"),
    of_images("ResNet, basic", lambda: resnet("basic"), "ResNet", 32, inside="resnet"),
    of_images("ResNet, bottleneck", lambda: resnet("bottleneck"), "ResNet", 32, inside="resnet", slow=True),
    of_images(
        "MobileNetV2",
        lambda: hf.MobileNetV2Config(depth_multiplier=0.25),
        "MobileNetV2",
        32,
        inside="mobilenet_v2",
        slow=True,
    ),
    Pretrained("CLIP", clip, "CLIPModel", "CLIPModel", pairs, heads=(), sizes=BOTH, slow=True),
    of_images("CLIP, image classifiers", clip, "CLIP"),
    Pretrained(
        "CLIP, vision encoder",
        lambda: hf.CLIPVisionConfig(**STANDARD),
        "CLIPVisionModel",
        "CLIPVisionModel",
        images(),
        heads=(),
        sizes=BOTH,
        slow=True,
    ),
    Pretrained(
        "CLIP, its vision encoder alone fine-tuned",
        clip,
        "CLIPModel",
        "CLIPVisionModel",
        images(),
        heads=(),
        sizes=BOTH,
    ),
    Pretrained("SigLIP", siglip, "SiglipModel", "SiglipModel", pairs, heads=(), sizes=BOTH, slow=True),
    of_images("SigLIP, image classifiers", siglip, "Siglip"),
    Pretrained(
        "SigLIP, vision encoder",
        lambda: hf.SiglipVisionConfig(**STANDARD),
        "SiglipVisionModel",
        "SiglipVisionModel",
        images(),
        heads=(),
        sizes=BOTH,
        slow=True,
    ),
]
