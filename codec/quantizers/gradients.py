"""How the gradient of quantized vectors reaches what they were chosen for: straight through, or by rotation.

Both functions give the quantized vectors themselves, bit for bit, and a gradient to the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this, relative to the longer of the two vectors or to a sum of two unit vectors, no rotation is tried.
_LEAST = 1e-3


def straight_through(inputs: Tensor, quantized: Tensor) -> Tensor:
    """The quantized vectors [..., d], whose gradient is handed to the inputs [..., d] as it is.

    Source: van den Oord et al., "Neural discrete representation learning" (VQ-VAE, 2017), section 3.2.
    """
    return quantized.detach() + (inputs - inputs.detach())


def rotate(inputs: Tensor, quantized: Tensor) -> Tensor:
    """The quantized vectors [..., d], as inputs [..., d] that were rotated and scaled by a constant map.

    The gradient is turned back by the same angle and scaled by the ratio of lengths, so that the part of it which
    points away from the entry still does so at the input. The map needs an angle: where the vectors are opposite, or
    one is a thousand times longer than the other or both are zero, the gradient passes straight through.

    Source: Fifty et al., "Restructuring vector quantization with the rotation trick" (2024), section 4. For unit
    vectors e of the input and q of the entry, and w along e + q, it is I - 2 w w' + 2 q e': no matrix is made.
    """
    fixed, quantized = inputs.detach(), quantized.detach()
    moved = inputs - fixed  # zero; all of the gradient
    length, length_quantized = fixed.norm(dim=-1, keepdim=True), quantized.norm(dim=-1, keepdim=True)
    longer, shorter = length.maximum(length_quantized), length.minimum(length_quantized)
    e, q = F.normalize(fixed, dim=-1), F.normalize(quantized, dim=-1)
    has_angle = (shorter > _LEAST * longer.clamp_min(1e-6)) & ((e + q).norm(dim=-1, keepdim=True) > _LEAST)
    w = F.normalize(e + q, dim=-1)
    turned = moved - 2 * w * (w * moved).sum(-1, keepdim=True) + 2 * q * (e * moved).sum(-1, keepdim=True)
    scaled = turned * (length_quantized / length.clamp_min(1e-20))
    return quantized + torch.where(has_angle, scaled, moved)


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight_through": straight_through, "rotation": rotate}


def check_gradient(gradient: str) -> None:
    """ValueError for a name that is none of `GRADIENTS`."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is not one of {', '.join(GRADIENTS)}")
