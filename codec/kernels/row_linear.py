"""Matrix products whose rows do not depend on the rows beside them.

A BLAS library picks its inner loops by the shape of the problem, so the same row times the same matrix can differ in
the last bits when the number of rows changes; a residual quantizer then turns one bit into another code. Here rows are
kept apart from that choice:

- on one CPU thread, rows of a product are bit-equal for any row count of 16 or more, so short inputs are padded to 16;
- on several CPU threads the library also splits the rows among threads, so the work is cut into tiles of 16 to 48 rows;
- products of fewer than 12 columns use inner loops in which a row's place matters, so columns are padded to 16;
- on a GPU the row count selects the kernel, so every product has one fixed row count.

Measured on Intel and AMD processors with MKL; `tests/test_row_linear.py` checks it on the machine that runs it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MIN_COLUMNS = 16
CPU_TILE_ROWS = 48
GPU_TILE_ROWS = 256


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x [..., K] and weight [N, K], each row independent of the others, bit for bit.

    With gradients or autocast enabled (training) this is plain `F.linear`: faster, and nothing is promised.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    if num_rows == 0:
        return F.linear(x, weight, bias)
    if weight.shape[0] < MIN_COLUMNS:
        missing = MIN_COLUMNS - weight.shape[0]
        wide = row_linear(x, F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing)))
        # Contiguous: elementwise functions round differently on strided memory.
        return wide[..., : weight.shape[0]].contiguous()
    if x.device.type == "cpu" and torch.get_num_threads() == 1:
        padded = _pad_rows(rows, MIN_ROWS)
        return F.linear(padded, weight, bias)[:num_rows].view(*x.shape[:-1], weight.shape[0])
    if x.device.type == "cpu":
        remainder = num_rows % CPU_TILE_ROWS
        padded = _pad_rows(rows, num_rows - remainder + max(remainder, MIN_ROWS)) if remainder else rows
        tile_rows = CPU_TILE_ROWS
    else:
        padded = _pad_rows(rows, -(-num_rows // GPU_TILE_ROWS) * GPU_TILE_ROWS)
        tile_rows = GPU_TILE_ROWS
    out = x.new_empty(padded.shape[0], weight.shape[0])
    weight_t = weight.t()
    for tile, result in zip(padded.split(tile_rows), out.split(tile_rows), strict=True):
        if bias is None:
            torch.mm(tile, weight_t, out=result)
        else:
            torch.addmm(bias, tile, weight_t, out=result)
    return out[:num_rows].view(*x.shape[:-1], weight.shape[0])


def _pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, num_rows - rows.shape[0])) if rows.shape[0] < num_rows else rows
