"""What fell on each entry of a codebook, for codebooks that learn by averages.

Letters: N rows of d dims, C codebook entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.kernels.residual_search import has_triton


def sums_by_code(rows_Nd: Tensor, codes_N: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many rows have each code, [C] in the rows' dtype, and their sums [C, d]; rows of code -1 count nowhere.

    Sums add row after row, in the order of the rows, so they have the same bits in every run, and on the CPU and on the
    GPU where Triton is installed. There they need no N x C matrix and no float atomics, whose order is left to chance.

    Codes must lie in -1..C-1; this is not checked.

    >>> counts, sums = sums_by_code(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([1, 0, -1, 1]), 3)
    >>> counts.tolist(), sums.tolist()
    ([1.0, 2.0, 0.0], [[2.0], [9.0], [0.0]])
    """
    if rows_Nd.is_cuda and rows_Nd.dtype == torch.float32 and has_triton("cuda"):
        from codec.kernels import triton_sums  # loads Triton

        return triton_sums.sums_by_code(rows_Nd, codes_N, codebook_size)
    # One place more, for absent rows.
    counts = torch.bincount(codes_N + 1, minlength=codebook_size + 1)
    sums = rows_Nd.new_zeros(codebook_size + 1, rows_Nd.shape[1]).index_add_(0, codes_N + 1, rows_Nd)
    return counts[1:].to(rows_Nd.dtype), sums[1:]
