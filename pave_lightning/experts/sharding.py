"""Weights that the processes hold a part of each: FSDP2 under Lightning, by the structure of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pave_lightning.errors import PaveError, counted, listed

# What models are called by besides their forward pass, in which weights are gathered as well.
FURTHER_METHODS = ("generate",)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes: Lightning's ``ModelParallelStrategy`` without tensor parallelism.

    Checkpoints are single files, written by rank zero, of weights and optimiser states that are gathered one by one.
    """

    strategy_name = "fsdp2"

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """As many parts as there are processes, which are known only now."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of blocks that a model is made of, by name: lists of several modules that are no single layers.

    Lists inside of blocks are no stacks. What a block calls of them may depend on the data, as of a mixture's experts,
    so that processes would wait for each other in vain.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> list(block_stacks(nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})))
        ['layers']
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if all(any(True for _ in block.children()) for block in module):
            found[path] = module
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stacks of a model, each once, in their order."""
    return list(dict.fromkeys(block for stack in block_stacks(model).values() for block in stack))


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Divide the weights of a model's blocks over the processes; each block gathers its own when it is run.

    A block that shares a weight with anything outside of it stays whole. Once more it does nothing.

    Args:
        model: any module, with whole weights on the CPU or the mesh's device.
        mesh: the processes, with one axis.

    Returns:
        The blocks that are divided.
    """
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    divided = []
    for block in blocks(model):
        own: dict[nn.Parameter, int] = {}
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                own[parameter] = own.get(parameter, 0) + 1
        if not own or any(parameter.ndim == 0 or owners[parameter] != count for parameter, count in own.items()):
            continue
        divided.append(block)
        if not is_divided(block):
            # Said, since a block that is run by itself is taken for a whole model, which keeps what it has gathered.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return divided


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide all weights of a model over the processes, to train it; once more it does nothing.

    Args:
        model: what is called in a training step, with whole weights on the CPU or the mesh's device.
        mesh: the processes, with one axis.

    Raises:
        PaveError: a weight that is trained is a single number, which cannot be divided.
    """
    if is_divided(model):
        return
    numbers = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 0}
    trained = [name for name, parameter in numbers.items() if parameter.requires_grad]
    if trained:
        raise PaveError(
            f"trainer.strategy: fsdp2 cannot divide {counted(len(trained), 'weight')} that are single numbers "
            f"({listed(trained, 3)}); freeze them, or use strategy: ddp"
        )
    shard_blocks(model, mesh)
    # An argument that earlier releases of PyTorch do not know.
    left_out: dict[str, Any] = {"ignored_params": set(numbers.values())} if numbers else {}
    fully_shard(model, mesh=mesh, **left_out)
    for method in FURTHER_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def is_divided(module: nn.Module) -> bool:
    """Whether any weight of a module is held in parts by several processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; all processes have to ask for it where it is divided."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a weight of the same shape, of which each process keeps its part; nobody waits."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    local = target.to_local()
    moved = value.to(device=local.device, dtype=local.dtype)
    part = distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
    local.copy_(part.to_local())


class WholeWeights(Mapping[str, Tensor]):
    """Weights by name as whole tensors that may be written to, whether processes hold parts of them or not.

    What is written to the tensor of a divided weight reaches it when another one is asked for, or by `close`, so that
    no more than one is whole at a time. All processes have to ask for the same ones in the same order.

    Args:
        weights: weights, divided or whole.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._asked: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if not isinstance(weight, DTensor):
            return weight
        if self._asked is None or self._asked[0] != name:
            self.close()
            self._asked = name, whole(weight)
        return self._asked[1]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Copy a whole value into a weight."""
        if self._asked is not None and self._asked[0] == name:
            self._asked = None
        copy_whole(self._weights[name], value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def close(self) -> None:
        """Let the last weight have what was written."""
        if self._asked is not None:
            name, value = self._asked
            self._asked = None
            copy_whole(self._weights[name], value)
