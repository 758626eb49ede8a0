"""Kinds of task, one file each; they are found without a list, see `pave_lightning.tasks.task`."""
