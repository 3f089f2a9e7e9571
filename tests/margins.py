"""Comparing codes of one quantizer that were found by different arithmetic."""

from torch import Tensor

from codec.kernels.residual_search import SearchTables, rvq_margins
from codec.quantizers.split import SplitVQ


def assert_same_codes(codes: Tensor, expected: Tensor, latents: Tensor, codebooks: Tensor) -> None:
    """Codes [B, K', F] equal the `expected` [B, K, F] wherever the margin allows, which must be nearly everywhere.

    Beyond a margin of 1e-5 it is clear which entry is the best. After a stage where it is not clear, any codes may
    follow. `latents` [B, D, F] are those of either arithmetic; `codebooks` are [K, C, D].
    """
    rows_ND, codes_NK = (given.transpose(1, 2).flatten(0, 1) for given in (latents, expected))
    margins_NK = rvq_margins(rows_ND, SearchTables(codebooks), codes_NK)
    is_clear = (margins_NK > 1e-5).cumprod(1).bool().view(expected.transpose(1, 2).shape).transpose(1, 2)
    is_clear = is_clear[:, : codes.shape[1]]
    assert is_clear.float().mean() > 0.95
    assert codes[is_clear].tolist() == expected[:, : codes.shape[1]][is_clear].tolist()


def assert_same_split_codes(codes: Tensor, expected: Tensor, latents: Tensor, quantizer: SplitVQ) -> None:
    """As `assert_same_codes`, for each part of a split quantizer."""
    for part, rows in ((quantizer.semantic, slice(0, 1)), (quantizer.acoustic, slice(1, None))):
        if codes[:, rows].numel():
            projected = part.project(latents.to(part.input_proj.weight))
            assert_same_codes(codes[:, rows], expected[:, rows], projected, part.vq.codebooks)
