"""A model folder that brings heads of its own, instead of those of the experts."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pave_lightning.evaluation.candidates import CheckpointCandidate
from pave_lightning.merging.folders import HEAD_FILE
from pave_lightning.weights import Checkpoint
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import backbone_of, with_backbone
from pave_lightning.weights.checkpoint import stored_tensors
from pave_lightning.weights.empty_models import empty_model


class OwnHeadsCandidate(CheckpointCandidate):
    """One checkpoint for all tasks, with the heads that lie beside it.

    Args:
        checkpoint: the backbone; its folder has ``heads/TASK`` for every task, as `write_surroundings` writes them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._heads = checkpoint.folder / "heads"

    def adapt(self, model: nn.Module, task: str) -> nn.Module:
        """The model's backbone under the task's own head, with what of the backbone belongs to that head."""
        own, backbone = _head(self._heads / task), backbone_of(model)
        for name, child in backbone_of(own).named_children():
            tensors = list(child.parameters())
            if tensors and not any(tensor.is_meta for tensor in tensors):
                setattr(backbone, name, child)
        return with_backbone(own, backbone)


def _head(folder: Path) -> nn.Module:
    """A model of which there is only what lies in the folder of a head; the rest is on the meta device."""
    model, names = empty_model(folder), Architecture.of_folder(folder).stored_names
    head = stored_tensors(folder / HEAD_FILE, "train it again")
    values = {names.get(name, name): Checkpoint.read(tensor).float() for name, tensor in head.items()}
    model.load_state_dict(values, strict=False, assign=True)
    return model
