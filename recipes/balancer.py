"""A balancer of losses: each gets its share of the gradient at the output, whatever its scale.

Source: Défossez et al., "High fidelity neural audio compression" (EnCodec, 2022), section 3.4, "Balancer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor


class Balancer:
    """Scales the gradients of losses at the output of a network to shares of `weights`, then sends them through it.

    With g the gradient of a loss at the output, and n the moving average of the mean over items of its L2 norm, the
    network gets the sum of `weight / sum of weights * total_norm * g / n` over the losses that are given. The average
    starts without bias and, under torch.distributed, is over all processes, weighted by their batch sizes.

    >>> output = torch.zeros(1, 1, 4, requires_grad=True)
    >>> losses = {"small": 1e-3 * output.sum(), "large": -1e3 * output.sum()}
    >>> norms = Balancer({"small": 3.0, "large": 1.0}).backward(losses, output)
    >>> output.grad  # three quarters up, one quarter down, of a vector of norm 1
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.999, total_norm: float = 1.0) -> None:
        if not weights or min(weights.values()) <= 0.0:
            raise ValueError(f"balanced losses need positive weights, got {dict(weights)}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} is not in [0, 1)")
        if total_norm <= 0.0:
            raise ValueError(f"total_norm must be positive, got {total_norm}")
        self.weights = dict(weights)
        self.decay = decay
        self.total_norm = total_norm
        # Per loss: the decayed sum of norms, and of ones in their place, by which it is divided.
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def backward(
        self, losses: Mapping[str, Tensor], output: Tensor, *, unbalanced: Tensor | None = None
    ) -> dict[str, float]:
        """Add balanced gradients of `losses` to the parameters behind `output` [B, ...]; return each loss's norm.

        `unbalanced` is a weighted sum of losses that do not come from the output, such as commitment: it goes along in
        the same pass over the network, which may be passed once only where DistributedDataParallel listens.

        ValueError where a loss has no weight, or does not depend on the output. Parameters between the output and a
        loss, those of discriminators, get no gradient.
        """
        if not losses:
            raise ValueError("there is no loss to balance")
        for name, loss in losses.items():
            if name not in self.weights:
                raise ValueError(f"the loss {name!r} has no weight (there are {', '.join(self.weights)})")
            if not loss.requires_grad:
                raise ValueError(f"the loss {name!r} does not depend on the output")
        gradients: dict[str, Tensor] = {}
        for index, (name, loss) in enumerate(losses.items()):
            # Losses may share parts of their graphs, such as the discriminators; the last one frees them.
            is_last = index == len(losses) - 1
            (gradient,) = torch.autograd.grad(loss, [output], retain_graph=not is_last, allow_unused=True)
            if gradient is None:
                raise ValueError(f"the loss {name!r} does not depend on the output")
            gradients[name] = gradient
        norms = self._update(gradients, len(output))
        total_weight = sum(self.weights[name] for name in losses)
        combined = torch.zeros_like(output)
        for name, gradient in gradients.items():
            share = self.weights[name] / total_weight
            average = self._sums[name] / self._counts[name]
            combined.add_(gradient, alpha=share * self.total_norm / (average + 1e-12))
        if unbalanced is None:
            torch.autograd.backward([output], [combined])
        else:
            torch.autograd.backward([output, unbalanced], [combined, None])
        return norms

    def _update(self, gradients: Mapping[str, Tensor], batch_size: int) -> dict[str, float]:
        """Take this step's norms into the averages; returns them."""
        sums = [gradient.detach().float().flatten(1).norm(dim=1).sum() for gradient in gradients.values()]
        totals = torch.stack([*sums, torch.full_like(sums[0], batch_size)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        *values, num_items = totals.tolist()
        norms = {name: value / num_items for name, value in zip(gradients, values, strict=True)}
        for name, norm in norms.items():
            self._sums[name] = self.decay * self._sums.get(name, 0.0) + norm
            self._counts[name] = self.decay * self._counts.get(name, 0.0) + 1.0
        return norms

    def state_dict(self) -> dict[str, Any]:
        """The moving averages as float64 tensors, for checkpoints."""
        return {
            part: {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
            for part, values in (("sums", self._sums), ("counts", self._counts))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sums = {name: float(value) for name, value in state["sums"].items()}
        self._counts = {name: float(value) for name, value in state["counts"].items()}
