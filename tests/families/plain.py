"""Models of plain torch, and of timm where it can be imported, handed over as modules."""

from collections.abc import Callable, Container
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from families.matrix import Row
from families.pretrained import OPTIONS, capture, kinds_of, multiplying
from families.reference import answers, check_moments, matrix_view, of_used, projected, scrambled, watched
from pave_lightning import PurifiedTaskVectors, merge, task_vectors
from pave_lightning.weights.coverage import purification_reasons


class Attention(nn.Module):
    """Self-attention with query, key and value in one layer, as timm has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, length, width = inputs.shape
        heads = self.qkv(inputs).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*heads)
        out: Tensor = self.proj(found.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs + self.attn(self.norm1(inputs))
        out: Tensor = inputs + self.mlp(self.norm2(inputs))
        return out


class VisionTransformer(nn.Module):
    """A ViT as timm builds it: class token and position table are bare parameters."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        rows = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            rows = block(rows)
        out: Tensor = self.head(self.norm(rows)[:, 0])
        return out


class LayerNorm2d(nn.LayerNorm):
    """Normalises over the channels of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = LayerNorm2d(width)
        self.fc1, self.fc2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, images: Tensor) -> Tensor:
        inner = self.fc2(nn.functional.gelu(self.fc1(self.norm(self.conv_dw(images)))))
        out: Tensor = images + self.gamma[:, None, None] * inner
        return out


class ConvNeXt(nn.Module):
    """A ConvNeXt as timm builds it: depthwise convolutions, layer scales, norms over channels."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), LayerNorm2d(16))
        self.stages = nn.Sequential(
            ConvNeXtBlock(16), LayerNorm2d(16), nn.Conv2d(16, 24, 3, stride=2, padding=1), ConvNeXtBlock(24)
        )
        self.head = nn.Linear(24, classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))
        return out


class ConvNet(nn.Module):
    """A small convolutional net with batch norms."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.GELU()),
            *(nn.Conv2d(16, 16, 3, stride=2, dilation=2, padding=2), nn.BatchNorm2d(16), nn.GELU()),
            *(nn.Conv2d(16, 24, 3, groups=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(24, classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images))
        return out


class Recurrent(nn.Module):
    """Words through an embedding, a recurrent layer and attention of torch's own."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.recurrent(self.words(words))[0]).mean(dim=1))
        return out


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def words(seed: int) -> Tensor:
    return torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(seed))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    fused = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.MultiheadAttention)}
    return multiplying(model) | fused


def _matrix(model: nn.Module, layer: str) -> Tensor:
    return matrix_view(model.get_submodule(layer))


def _part(name: str, layers: Container[str]) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The layer of a purified matrix, and what picks its rows: a third of fused attention."""
    if name in layers:
        return name, lambda matrix: matrix
    layer, _, part = name.rpartition(".")
    return layer, lambda matrix: matrix.chunk(3)[("query", "key", "value").index(part)]


@dataclass(frozen=True)
class Plain:
    """A family of modules that no library need know.

    Attributes:
        name: what it is called on the page.
        build: makes an untrained module with a head of so many classes.
        inputs: a batch from a seed.
        head: name of the head.
        slow: whether it is left to the long tests.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[int], Tensor] = images
    head: str = "head"
    slow: bool = False

    def walk(self, folder: Path) -> Row:
        """Go all the way from modules to a merged one in a file, and compare each step with its definition."""
        torch.manual_seed(0)
        base = scrambled(self.build(classes=3), 1).eval()
        experts: dict[str, nn.Module] = {}
        for seed, (task, classes) in enumerate((("first", 2), ("second", 5)), 2):
            expert = self.build(classes=classes)
            own = expert.state_dict()
            state = {name: value for name, value in base.state_dict().items() if value.shape == own[name].shape}
            expert.load_state_dict(state, strict=False)
            experts[task] = scrambled(expert, seed).eval()
        batches = [self.inputs(seed) for seed in range(3)]
        source = task_vectors(base=base, experts=experts, heads=[self.head])
        statistics, reference = {}, {}
        seen: dict[str, dict[str, Tensor]] = {}
        for task, expert in experts.items():
            with watched(_layers(expert), ()) as rows:
                statistics[task] = capture(expert, batches, "model")
            seen[task] = {name: torch.cat(found) for name, found in rows.items() if found}
            check_moments(
                statistics[task], lambda name, model=expert: matrix_view(model.get_submodule(name)), seen[task]
            )
            seen[task] |= of_used(statistics[task], seen[task])
            reference[task] = deepcopy(expert)
        purified = PurifiedTaskVectors(source, statistics, OPTIONS)
        merged = merge("average", purified)
        untouched = {layer: reason for (_, layer), reason in purified.untouched.items()}
        for (task, name), kept in purified.ranks.items():
            layer, part = _part(name, seen[task])
            own = part(_matrix(reference[task], layer))
            own.copy_(projected(own.double(), seen[task][layer], kept.rank, OPTIONS.damping))
        for models, found in ((experts, merge("average", source)), (reference, merged)):
            for task, expert in experts.items():
                model = found.model(task)
                save_model(model, str(folder / "merged.safetensors"))
                loaded = deepcopy(expert)
                load_model(loaded, str(folder / "merged.safetensors"))
                self._check(models, task, loaded, batches[0])
        matrices = {matrix.layer for p in source.parameters for matrix in p.matrices}
        reached = {matrix.layer for p in purified.layers for matrix in p.matrices} - untouched.keys()
        return Row(
            model=type(base).__name__,
            captured=kinds_of({name: layer for name, layer in _layers(experts["first"]).items() if name in reached}),
            layers=len(matrices),
            purified=len(reached),
            merged=len(source.parameters),
            apart=dict.fromkeys((name for name, _ in source.running_statistics()), "running statistics, averaged"),
            reload="safetensors",
            left={**dict(purification_reasons(source.parameters)), **untouched},
        )

    def _check(self, models: dict[str, nn.Module], task: str, found: nn.Module, batch: Tensor) -> None:
        mean = deepcopy(models[task])
        states = [model.state_dict() for model in models.values()]
        for name, value in mean.state_dict().items():
            if not name.startswith(f"{self.head}.") and value.is_floating_point():
                value.copy_(sum(state[name] for state in states) / 2)
        for expected, own in zip(answers(mean, batch), answers(found, batch), strict=True):
            torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-3)


FAMILIES = [
    Plain("plain torch: ViT as in timm", VisionTransformer),
    Plain("plain torch: ConvNeXt as in timm", ConvNeXt),
    Plain("plain torch: convolutions and batch norms", ConvNet),
    Plain("plain torch: recurrent layer, attention", Recurrent, words),
]
