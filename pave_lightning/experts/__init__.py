"""Task experts: fine-tuned with Lightning, or loaded from where they are."""

from pave_lightning.experts.task_expert import TaskExpert

__all__ = ["TaskExpert"]
