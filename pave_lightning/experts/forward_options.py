"""How a model's forward passes are run while it is trained: compiled, or with activations computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pave_lightning.experts.sharding import blocks
from pave_lightning.tasks.options import Compile, Training


def apply_forward_options(models: Sequence[nn.Module], options: Training) -> None:
    """Let models compute as their training asks for; before their weights are divided.

    Compiled is each block by itself, which is one graph for all of them, and composes with weights that are divided;
    hooks of a block's own stay outside of it. Names of modules and weights stay as they are.

    Args:
        models: models of transformers, or peft models around them; they may share modules.
        options: how they are trained.
    """
    if options.activation_checkpointing:
        for model in models:
            whole: Any = model
            # Called so by later releases of transformers.
            enable = getattr(whole, "activation_checkpointing_enable", None) or whole.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    if options.compile:
        chosen = options.compile if isinstance(options.compile, Compile) else Compile()
        for module in dict.fromkeys(one for model in models for one in blocks(model) or [model]):
            module.forward = torch.compile(module.forward, **chosen.model_dump())
