"""A family of transformers: tiny random checkpoints, captured, purified, merged, saved and loaded again."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from families.matrix import Row
from families.reference import CONVOLUTIONS, answers, check_moments, matrix_view, of_used, projected, scrambled, watched
from pave_lightning import PaveCallback, PurifiedTaskVectors, Purify, TaskStatistics, load_merged, task_vectors
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.merging.methods.average import Average
from pave_lightning.weights import Architecture
from pave_lightning.weights.coverage import Coverage

OPTIONS = Purify(rho=0.8, nearest_budget=True)
# How names of layers end whose weight is used without calling them.
USED = (".mixer.dt_proj", "head.attention.out_proj")


class Expert(L.LightningModule):
    """What a user writes around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: Any, _: int) -> None:
        self.model(**batch) if isinstance(batch, dict) else self.model(batch)


def capture(model: nn.Module, batches: list[Any], backbone: str) -> TaskStatistics:
    """The statistics of a model over some batches, as a user takes them."""
    callback = PaveCallback(backbone=backbone, convolutions=True, rows=None)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=callback, **quiet)
        trainer.validate(Expert(model), DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return callback.statistics


def multiplying(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that multiply all of their input with one matrix; a shared one once."""
    kinds = (nn.Linear, Conv1D, *CONVOLUTIONS)
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    }


def kinds_of(layers: dict[str, nn.Module]) -> dict[str, int]:
    """How many layers there are of each kind."""
    kinds: dict[str, int] = {}
    for layer in layers.values():
        size = "x".join(map(str, layer.kernel_size)) if isinstance(layer, CONVOLUTIONS) else ""
        kind = f"{type(layer).__name__} {size}".strip()
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


@dataclass(frozen=True)
class Pretrained:
    """A family of transformers.

    Attributes:
        name: what it is called on the page.
        config: makes a tiny configuration.
        base: class of the base model, of which its checkpoint is.
        expert: class of the experts.
        inputs: a batch from a seed, as keywords of the model.
        backbone: name of the backbone inside of an expert, empty where it is the model itself.
        heads: names of what each expert has for itself, in front of which stands no backbone.
        sizes: how the experts' configurations differ.
        slow: whether it is left to the long tests.
        parts: last part of a fused layer's name -> names of what it fuses -> which rows of so many these are.
    """

    name: str
    config: Callable[[], Any]
    base: str
    expert: str
    inputs: Callable[[int], dict[str, Tensor]]
    backbone: str = ""
    heads: tuple[str, ...] = ("classifier",)
    sizes: tuple[dict[str, Any], dict[str, Any]] = ({"num_labels": 2}, {"num_labels": 3})
    slow: bool = False
    parts: Mapping[str, Mapping[str, Callable[[int], Any]]] = field(default_factory=dict)

    def walk(self, folder: Path) -> Row:
        """Go all the way from checkpoints to a merged one, and compare each step with its definition."""
        logging.set_verbosity_error()
        experts = self._experts(folder)
        batches = [self.inputs(seed) for seed in range(3)]
        places = {task: str(folder / task) for task in experts}
        source = task_vectors(str(folder / "base"), places)
        statistics, reference = {}, {}
        seen: dict[str, dict[str, Tensor]] = {}
        for task, expert in experts.items():
            inside = self._inside(expert)
            layers = multiplying(inside)
            with self._watched(inside, layers, batches[0]) as rows:
                statistics[task] = capture(expert, batches, f"model.{self.backbone}".rstrip("."))
            seen[task] = {name: torch.cat(found) for name, found in rows.items() if found}
            assert {name for name in statistics[task] if name not in seen[task]} == {
                name for name in layers if name.endswith(USED)
            }
            seen[task] |= of_used(statistics[task], seen[task])
            check_moments(statistics[task], partial(self._matrix, inside), seen[task])
            reference[task] = deepcopy(expert)
        purified = PurifiedTaskVectors(source, statistics, OPTIONS)
        plain_model = self._merged(folder / "plain", source, folder)
        purified_model = self._merged(folder / "purified", purified, folder)
        untouched = {name: reason for (_, name), reason in purified.untouched.items()}
        own = {matrix.layer for p in purified.layers for matrix in p.matrices if matrix.name not in untouched}
        assert own
        for (task, name), kept in purified.ranks.items():
            layer, index = self._part(name)
            matrix = self._matrix(self._inside(reference[task]), layer)
            part = slice(None) if index is None else index(len(matrix))
            matrix[part] = projected(matrix[part].double(), seen[task][layer], kept.rank, OPTIONS.damping).float()
        for models, found in ((experts, plain_model), (reference, purified_model)):
            self._check_merged(models, found, batches[0])
        architecture = Architecture.of_folder(folder / "first")
        coverage = Coverage.of(architecture.checkpoint(folder / "base"), architecture, convolutions=True)
        layers = {name: layer for name, layer in multiplying(self._inside(experts["first"])).items() if name in own}
        return Row(
            model=self.expert,
            captured=kinds_of(layers) | self._further_kinds(purified),
            layers=len({matrix.layer for p in source.parameters for matrix in p.matrices}),
            purified=len(own),
            merged=len(source.parameters),
            apart=dict(coverage.not_merged),
            reload="transformers",
            left={**coverage.not_purified, **untouched},
        )

    def _experts(self, folder: Path) -> dict[str, nn.Module]:
        torch.manual_seed(0)
        base = scrambled(getattr(hf, self.base)(self.config()), 1)
        base.save_pretrained(folder / "base")
        made = {}
        for seed, (task, size) in enumerate(zip(("first", "second"), self.sizes, strict=True), 2):
            expert = scrambled(getattr(hf, self.expert).from_pretrained(folder / "base", **size), seed)
            expert.save_pretrained(folder / task)
            found, info = getattr(hf, self.expert).from_pretrained(folder / task, output_loading_info=True)
            assert not info["missing_keys"]
            made[task] = found.eval()
        return made

    def _inside(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.backbone)

    @staticmethod
    def _watched(inside: nn.Module, layers: dict[str, nn.Module], batch: Any) -> Any:
        """What layers are given, by the batch's masks."""
        return watched(layers, [value for name, value in batch.items() if name.endswith("attention_mask")])

    def _part(self, name: str) -> tuple[str, Callable[[int], Any] | None]:
        """The layer of a purified matrix, and which rows of so many are its own; None for all."""
        layer, _, part = name.rpartition(".")
        index = self.parts.get(layer.rpartition(".")[2], {}).get(part)
        return (name, None) if index is None else (layer, index)

    @staticmethod
    def _matrix(inside: nn.Module, layer: str) -> Tensor:
        """The weight of a layer as ``(d_out, d_in)``, a view."""
        return matrix_view(inside.get_submodule(layer))

    @staticmethod
    def _further_kinds(purified: PurifiedTaskVectors) -> dict[str, int]:
        untouched = {name for _, name in purified.untouched}
        parts = sum(matrix.name not in untouched for p in purified.layers if p.parts for matrix in p.matrices)
        return {"fused parts": parts} if parts else {}

    def _is_head(self, name: str) -> bool:
        inside = not self.backbone or name.startswith(f"{self.backbone}.")
        return not inside or any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def _merged(self, folder: Path, source: Any, experts: Path) -> dict[str, nn.Module]:
        """Each task's model, loaded from a merged folder."""
        folder.mkdir()
        architecture = Architecture.of_folder(experts / "first")
        checkpoints = {task: source.checkpoint(task) for task in source.tasks}
        base = architecture.checkpoint(experts / "base")
        context = MergeContext(str(experts / "base"), base, checkpoints, architecture, {})
        write_merged(folder, Average(), source, None, context)
        return {task: load_merged(folder, task) for task in source.tasks} | {"": self._reloaded(folder)}

    def _reloaded(self, folder: Path) -> nn.Module:
        reader = hf.AutoModel if self.backbone or self.base != self.expert else getattr(hf, self.expert)
        model, info = reader.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"], info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.eval()

    def _check_merged(self, models: dict[str, nn.Module], found: dict[str, nn.Module], batch: Any) -> None:
        """Each task's model should be the mean of both backbones with the task's own head, and give its answers."""
        states = [model.state_dict() for model in models.values()]
        for task, model in models.items():
            mean = deepcopy(model)
            state = mean.state_dict()
            for name, value in state.items():
                if not self._is_head(name) and value.is_floating_point():
                    value.copy_(sum(own[name] for own in states) / 2)
            for expected, own in zip(answers(mean, batch), answers(found[task], batch), strict=True):
                torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-3)
            assert type(found[task]) is type(model)
            inside = self._inside(mean)
            if type(inside) is type(found[""]):
                for expected, own in zip(answers(inside, batch), answers(found[""], batch), strict=False):
                    torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-3)
