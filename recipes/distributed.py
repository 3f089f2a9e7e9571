"""Several processes that train as one with all their batches would.

Each process computes gradients of its own batch; these are averaged once, before a step, so that all take the same one.
`DistributedDataParallel` averages during the backward pass instead, and so asks for one forward and one backward of
every parameter per step; a step here has several (discriminators twice, a balancer one per loss), and some parameters
are left out of some steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor


class AllReduceStrategy(DDPStrategy):
    """Lightning's DDP without its wrapper: everything begins as on process 0, and gradients are averaged by hand."""

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict(keep_vars=True).values():
            torch.distributed.broadcast(tensor.detach(), src=0)


def num_processes(trainer: Mapping[str, Any]) -> int:
    """How many processes these settings of a trainer ask for."""
    devices, accelerator = trainer.get("devices", "auto"), trainer.get("accelerator", "auto")
    if devices in ("auto", -1, "-1"):
        num_devices = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 1
    elif isinstance(devices, str):
        num_devices = devices.count(",") + 1 if "," in devices else int(devices)
    else:
        num_devices = devices if isinstance(devices, int) else len(devices)
    return max(1, num_devices) * int(trainer.get("num_nodes", 1))


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and of how many."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share_of(values: Tensor) -> Tensor:
    """What falls to this process of draws [B * processes] for the items of all: item i belongs to process i mod n."""
    rank, size = rank_and_size()
    return values[rank::size]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes; those without a gradient must be the same everywhere."""
    size = rank_and_size()[1]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if size == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= size
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def any_process(flag: bool, device: torch.device) -> bool:
    """True where it is true on any process; all must ask."""
    if rank_and_size()[1] == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(votes)
    return bool(votes > 0)
