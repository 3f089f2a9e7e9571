"""Comparing codes of one quantizer that were found by different arithmetic."""

import torch
from torch import Tensor


def assert_same_codes(codes: Tensor, expected: Tensor, latents: Tensor, codebooks: Tensor) -> None:
    """Codes [B, K', F] equal the `expected` [B, K, F] wherever the margin allows, which must be nearly everywhere.

    The margin is how much farther than the best entry the second best is, relative, along the expected codes; beyond
    1e-5 it is clear which one is the best. After a stage where it is not clear, any codes may follow. `latents`
    [B, D, F] are those of either arithmetic; `codebooks` are [K, C, D].
    """
    rest, margins = latents.double().transpose(1, 2), []
    for row in range(expected.shape[1]):
        codebook = codebooks[row].double()
        distances = torch.cdist(rest, codebook.expand(len(rest), -1, -1)).square()
        best, second = distances.topk(2, dim=2, largest=False).values.unbind(2)
        margins.append((second - best) / best)
        rest = rest - codebook[expected[:, row]]
    is_clear = (torch.stack(margins, dim=1) > 1e-5).cumprod(1).bool()[:, : codes.shape[1]]
    assert is_clear.float().mean() > 0.95
    assert torch.equal(codes[is_clear], expected[:, : codes.shape[1]][is_clear])
