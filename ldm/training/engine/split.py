"""Networks in parts, one in each of the processes that train together: weights, gradients and the optimizer's state.

Rajbhandari et al. 2020 (ZeRO, stage 3), by PyTorch's `fully_shard`: a block's weights are whole only while it is run.
Reading the numbers of a split tensor is work for all processes at once, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.training.engine.memory_saving import BLOCKS


def split(networks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Leave each process its part of these networks, which from now on are only called, by all processes alike.

    device: where they are; dtype: in which weights are sent round before a block is run. Gradients are averaged over
    the processes in float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    sent = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for network in networks:
        blocks = [module for module in network.modules() if isinstance(module, BLOCKS)]
        for part in (*blocks, network):
            # Told so, the network itself lets go of whole weights too: else those of a look would be trained with.
            fully_shard(part, mesh=mesh, mp_policy=sent, reshard_after_forward=True)


def is_split(module: nn.Module) -> bool:
    """Whether this process has but its part of the module's trained parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters() if parameter.requires_grad)


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole value, which all processes have, into a tensor, or this process's part of it into its part."""
    target.copy_(part_of(value, target))


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole value, if `like` is split; else the value. It is where `like` is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The same tensors, those that are split put together one after another in the CPU's memory.

    keep: False for a process that only lends its parts; it gets none
    """
    found = {}
    for name, tensor in tensors.items():
        put_together = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = put_together.cpu() if isinstance(tensor, DTensor) else put_together
    return found
