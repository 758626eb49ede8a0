"""The frozen head of images that are classified by texts: embeddings of the classes, by a base's own text side."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import PaveError, counted, foreign, listed
from pave_lightning.system.files import replacing, write_tensors
from pave_lightning.system.keeping import kept
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.tokenizers import load_tokenizer, text_config
from pave_lightning.weights.backbones import part_named, unchanged_parts
from pave_lightning.weights.checkpoint import Checkpoint, model_digest, stored_tensors
from pave_lightning.weights.empty_models import auto_class, read_config
from pave_lightning.weights.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

# Raised when embeddings are made otherwise, so that older ones are not read.
FORMAT = 1
# How many prompts are embedded at a time.
AT_ONCE = 64
# Names in a file of a head, and in batches.
CLASSES, BIAS = "class_embeddings", "class_bias"
HEAD = (CLASSES, BIAS)
# How far an embedding may move when padding is added for padding not to be read.
UNMOVED = 1e-4


@dataclass(frozen=True)
class TextHead:
    """Logits of classes from the embedding of an image: of prompts, by the text side of a base, which is never trained.

    Of each class the embeddings of its prompts are normalised, averaged and normalised again (Radford et al.,
    *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021, section 3.1.4), and multiplied
    with the base's logit scale.

    Args:
        base: folder of the base.
        auto_model: name of the class of transformers that builds it.
        prompts: for each class its prompts, of all classes equally many.
    """

    base: Path
    auto_model: str
    prompts: tuple[tuple[str, ...], ...] = field(repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer.

        Raises:
            PaveError: there is none, or it cannot be used.
        """
        return load_tokenizer(self.base)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """`CLASSES`, float32 of shape ``(classes, width)``, and, where the base adds one, `BIAS`, ``(classes,)``.

        Embedded once for a base and its prompts, and kept in the folder of Hugging Face's caches.

        Raises:
            PaveError: the base cannot be loaded, or what it gives is not finite.
        """
        return kept(("text head", self.base, self.auto_model, self.prompts), self._found)

    @property
    def problem(self) -> str | None:
        """Prompts that are longer than what the base reads, in words; None where there are none."""
        most = getattr(text_config(read_config(self.base)), "max_position_embeddings", None)
        texts = [text for of_class in self.prompts for text in of_class]
        lengths = [len(found) for found in self.tokenizer(texts)[TOKENS]]
        long = [text for text, length in zip(texts, lengths, strict=True) if most is not None and length > most]
        if not long:
            return None
        return (
            f"{counted(len(long), 'prompt')} of its classes {'is' if len(long) == 1 else 'are'} longer than the {most} "
            f"tokens that the base reads ({listed([repr(text) for text in long], 2)}, {max(lengths)} tokens at most); "
            "shorten the templates or the names of classes"
        )

    def _found(self) -> dict[str, Tensor]:
        from huggingface_hub import cached_assets_path

        key = json.dumps([FORMAT, version("transformers"), model_digest(self.base), self.auto_model, self.prompts])
        file: Path | None = None
        with suppress(OSError, ValueError, PaveError):  # where nothing can be kept, it is embedded anew each time
            folder = cached_assets_path("pave-lightning", namespace="models", subfolder="class-embeddings")
            file = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
            if file.is_file():
                return {name: Checkpoint.read(stored) for name, stored in stored_tensors(file).items()}
        found = self._embedded()
        with suppress(OSError, PaveError):
            if file is not None:
                with replacing(file) as unfinished:
                    write_tensors(unfinished, found)
        return found

    def _embedded(self) -> dict[str, Tensor]:
        import torch

        with foreign(f"{self.base}: its text side could not be loaded"), quiet_transformers():
            model = auto_class(self.auto_model).from_pretrained(
                self.base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        frozen = unchanged_parts(model, self.auto_model)
        with torch.no_grad():
            texts = [text for of_class in self.prompts for text in of_class]
            options = self._padding(model)
            parts = [
                _embeddings(model, self.tokenizer(texts[start : start + AT_ONCE], return_tensors="pt", **options))
                for start in range(0, len(texts), AT_ONCE)
            ]
            single = torch.nn.functional.normalize(torch.cat(parts).double(), dim=-1)
            means = single.reshape(len(self.prompts), -1, single.shape[-1]).mean(dim=1)
            classes = torch.nn.functional.normalize(means, dim=-1)
            numbers = {name: part_named(model, name) for name in frozen if name in dict(model.named_parameters())}
            scale, bias = (_number(numbers, ending) for ending in ("scale", "bias"))
            found = {CLASSES: (classes * (1 if scale is None else scale.double().exp())).float().contiguous()}
            if bias is not None:
                found[BIAS] = bias.float().reshape(1).expand(len(self.prompts)).contiguous()
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            raise PaveError(f"{self.base}: its text side gives NaN or infinity for prompts of classes; fetch it again")
        return found

    def _padding(self, model: nn.Module) -> dict[str, Any]:
        """How prompts are padded: as the model was trained, where it reads the padding, else to the longest."""
        import torch

        most = getattr(text_config(model.config), "max_position_embeddings", None)
        shortest = min((text for of_class in self.prompts for text in of_class), key=len)
        alone = self.tokenizer([shortest], return_tensors="pt")
        length = alone[TOKENS].shape[1]
        if most is None or length >= most:
            return {"padding": True}
        padded = self.tokenizer([shortest], return_tensors="pt", padding="max_length", max_length=most)
        one, other = (torch.nn.functional.normalize(_embeddings(model, given), dim=-1) for given in (alone, padded))
        reads = bool((one - other).abs().max() > UNMOVED)
        return {"padding": "max_length", "max_length": most} if reads else {"padding": True}


class BatchesWithClasses:
    """Puts rows into batches, and the embeddings of the classes beside them.

    Args:
        collate: makes the batch.
        head: the classes.
    """

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]], head: TextHead) -> None:
        self.collate, self.shared = collate, head.tensors  # now, and not in every process that loads batches

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch, with `CLASSES` and, where the base has one, `BIAS`, which are the same in all batches."""
        return {**self.collate(rows), **self.shared}


def _embeddings(model: nn.Module, given: Any) -> Tensor:
    """What a model makes of tokenised texts, float32 of shape ``(n, width)``."""
    read: Any = model.get_text_features
    known = inspect.signature(read).parameters  # tokenizers give some models more than they take
    found = read(**{name: values for name, values in given.items() if name in known})
    pooled: Tensor = getattr(found, "pooler_output", found)
    return pooled.float()


def _number(numbers: dict[str, Any], ending: str) -> Tensor | None:
    """A parameter of one value, by the ending of its name (``logit_scale``)."""
    found = [value for name, value in numbers.items() if name.endswith(ending) and value.numel() == 1]
    return found[0].detach() if found else None
