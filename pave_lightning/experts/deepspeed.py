"""DeepSpeed with checkpoints that are read without pickles: whole weights in one file, and no states to go on from."""

from __future__ import annotations

from typing import Any

import deepspeed  # type: ignore[import-not-found]
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import Tensor


class WholeDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy, whose checkpoints rank zero writes as one file of weights that are gathered one by one.

    DeepSpeed's own checkpoints are folders of pickles; without them a training that is stopped cannot go on.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Gather the weights and write them with what Lightning knows besides."""
        path = self.broadcast(filepath)
        weights: dict[str, Tensor] = {}
        module = self.lightning_module
        if module is None:
            raise RuntimeError("a strategy without a module has nothing to save")
        for name, tensor in module.state_dict(keep_vars=True).items():
            # Stage 3 divides frozen weights as well; buffers stay whole.
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.is_global_zero:
                    weights[name] = tensor.detach().to("cpu", copy=True)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint({**checkpoint, "state_dict": weights, "optimizer_states": []}, path)


def deepspeed_strategy(name: str) -> WholeDeepSpeedStrategy:
    """The strategy that Lightning has under a name, such as ``deepspeed_stage_3_offload``.

    Raises:
        KeyError: there is none of that name.
    """
    return WholeDeepSpeedStrategy(**StrategyRegistry[name]["init_params"])
