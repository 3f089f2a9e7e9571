"""A moving average of weights, which often decodes better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of the parameters and buffers of a module; what is not of floats is copied.

    Free of bias: after n updates it is the mean of n states of the module, weighted by powers of `decay`, without the
    initial weights. Source: the correction is that of Kingma and Ba, "Adam" (2015), section 3.

    >>> module = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(decay=0.5)
    >>> for value in (3.0, 6.0):
    ...     _ = module.weight.data.fill_(value)
    ...     average.update(module)
    >>> with average.swapped_into(module):
    ...     module.weight.item()  # (3 * 0.5 + 6) / 1.5
    5.0
    >>> module.weight.item()
    6.0
    """

    def __init__(self, *, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} is not in [0, 1)")
        self.decay = decay
        self.num_updates = 0
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module as it is now into the average: once per optimizer step."""
        self.num_updates += 1
        share = (1.0 - self.decay) / (1.0 - self.decay**self.num_updates)
        averages, news = [], []
        for name, value in _tensors(module).items():
            if name not in self._values:
                self._values[name] = value.detach().clone()
            elif value.is_floating_point():
                averages.append(self._values[name])
                news.append(value.detach())
            else:
                self._values[name].copy_(value)
        if averages:
            torch._foreach_lerp_(averages, news, share)

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Within it the module has the averages; after it, its own weights again, bit for bit.

        ValueError before the first update.
        """
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        tensors = _tensors(module)
        if tensors.keys() != self._values.keys():
            raise ValueError("the average was not made of this module" if self._values else "nothing was averaged yet")
        for name, value in tensors.items():
            kept = value.detach().clone()
            value.copy_(self._values[name])
            self._values[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, for checkpoints; they are the average's own, not copies."""
        return {"num_updates": torch.tensor(self.num_updates), "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.num_updates = int(state["num_updates"])
        self._values = {name: value.clone() for name, value in state["values"].items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the module would hold: its own parameters and persistent buffers, shared ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            found[name] = value
            seen.add(id(value))
    return found
