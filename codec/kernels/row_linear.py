"""Matrix products whose rows do not depend on the rows beside them.

A BLAS library picks its inner loops by the shape of the problem, so the same row times the same matrix can differ in
the last bits when the number of rows changes; a residual quantizer then turns one bit into another code. Here rows are
kept apart from that choice:

- on one CPU thread, rows of a product are bit-equal for any row count of 16 or more, and on some processors of 8 or of
  4 or more, which makes single frames cheaper; so short inputs are padded to 16, or to 8 or 4 where a trial of that
  very shape on this machine gave the same bits;
- on several CPU threads the library also splits the rows among threads, so the work is cut into tiles of 16 to 48 rows;
- products of fewer than 12 columns use inner loops in which a row's place matters, so columns are padded to 16;
- on a GPU the row count selects the kernel, so every product has one fixed row count.

Seen with MKL on an AMD Zen 4 processor, the first two points on Intel too; the GPU's tile has not been tried yet.
`tests/test_row_linear.py` checks the processor that runs it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
FEWER_ROWS = (4, 8)
MIN_COLUMNS = 16
CPU_TILE_ROWS = 48
GPU_TILE_ROWS = 256


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x [..., K] and weight [N, K], each row independent of the others, bit for bit.

    With gradients or autocast enabled (training) this is plain `F.linear`: faster, and nothing is promised.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    num_rows = x.numel() // x.shape[-1]
    if num_rows == 0:
        return F.linear(x, weight, bias)
    if weight.shape[0] < MIN_COLUMNS:
        missing = MIN_COLUMNS - weight.shape[0]
        wide = row_linear(x, F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing)))
        # Contiguous: elementwise functions round differently on strided memory.
        return wide[..., : weight.shape[0]].contiguous()
    if x.device.type != "cpu":
        tile_rows = GPU_TILE_ROWS
    elif torch.get_num_threads() > 1:
        tile_rows = CPU_TILE_ROWS
    else:
        if num_rows >= MIN_ROWS:
            return F.linear(x, weight, bias)
        out = F.linear(pad_rows(x.reshape(num_rows, -1), weight), weight, bias)
        return out[:num_rows].view(*x.shape[:-1], weight.shape[0])
    return _tiled(x.reshape(num_rows, -1), weight, bias, tile_rows).view(*x.shape[:-1], weight.shape[0])


def pad_rows(rows: Tensor, *weights: Tensor) -> Tensor:
    """Rows [N, K] with zero rows added, up to as many as products with all these weights need.

    Products in a row may so share one padding: `row_linear` adds nothing to what has enough.
    """
    if rows.shape[0] >= MIN_ROWS:
        return rows
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and torch.get_num_threads() == 1:
        needed = max(_fewest_rows(weight.shape[1], weight.shape[0]) for weight in weights)
    else:
        needed = MIN_ROWS
    return F.pad(rows, (0, 0, 0, needed - rows.shape[0])) if rows.shape[0] < needed else rows


@functools.cache
def _fewest_rows(in_channels: int, out_channels: int) -> int:
    """4 or 8 where rows of float32 products of this shape are the same in so many to 15 rows as in 64; else 16.

    Which inner loops run depends on the shape alone, and other loops round differently in about every second element:
    with random numbers a difference cannot stay unseen.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, in_channels, generator=generator)
    weight = torch.randn(out_channels, in_channels, generator=generator)
    bias = torch.randn(out_channels, generator=generator)
    fewest = MIN_ROWS
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        wholes = [(use_bias, F.linear(rows, weight, use_bias)) for use_bias in (bias, None)]
        for num_rows in reversed(range(min(FEWER_ROWS), MIN_ROWS)):
            first = 4 * (num_rows - min(FEWER_ROWS))
            for use_bias, whole in wholes:
                part = F.linear(rows[first : first + num_rows], weight, use_bias)
                if not torch.equal(part, whole[first : first + num_rows]):
                    return fewest
            if num_rows in FEWER_ROWS:
                fewest = num_rows
    return fewest


def _tiled(rows: Tensor, weight: Tensor, bias: Tensor | None, tile_rows: int) -> Tensor:
    num_rows = rows.shape[0]
    remainder = num_rows % tile_rows
    if remainder:
        filled = tile_rows if rows.device.type != "cpu" else max(remainder, MIN_ROWS)
        rows = F.pad(rows, (0, 0, 0, filled - remainder))
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    weight_t = weight.t()
    for tile, result in zip(rows.split(tile_rows), out.split(tile_rows), strict=True):
        if bias is None:
            torch.mm(tile, weight_t, out=result)
        else:
            torch.addmm(bias, tile, weight_t, out=result)
    return out[:num_rows]
