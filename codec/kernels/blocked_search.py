"""Residual search on the CPU in float32, block by block, so that scores stay in cache. Nothing is compiled.

Letters as in `codec.kernels.residual_search`; n rows of a block.

Products are torch's, and numpy's for single rows: a product of one matrix and one vector reads the codebook once, which
is all the time it may take, and torch's (MKL) read at a third of the bandwidth on the processor this was measured on.
Choices are numpy's: its `argmax` over 1024 scores is bound by memory, while torch's takes eight times as long, a fifth
of 128 dims of products and more than 8 dims of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codec.kernels.search_tables import SearchTables, error_bounds, tie_bounds

_BLOCK_SCORES = 2**19  # 2 MB of float32
_FEWEST_AT_ONCE = 4  # so many rows take as long at once as one by one
ROUNDING = 2.0**-24
# Bounds are at least 10 roundings of the largest sum that there may be. From here on it may be too large for float32.
LARGEST_BOUND = 1e32
# How much torch may round the factors of a float32 product, by `torch.set_float32_matmul_precision`: not at all, to 11
# bits (TF32), to 8 bits (bfloat16).
_INPUT_ROUNDINGS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}

_Floats = npt.NDArray[np.float32]
_Codes = npt.NDArray[np.int64]


def search(latents_ND: Tensor, tables: SearchTables, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Codes int64 [N, K'] of float32 latents on the CPU, and which rows are uncertain, or None where none is.

    Rows that rounding could have decided are searched again one by one, and their candidates compared in float64; what
    is left over is not finite, or near the largest number.
    """
    num_latents = len(latents_ND)
    codes_NK = torch.empty(num_latents, num_rows, dtype=torch.int64)
    arrays = tables.prepared("arrays", _Arrays)
    latents, codes = latents_ND.numpy(), codes_NK.numpy()
    unclear: Iterable[int] = range(num_latents)
    if num_latents >= _FEWEST_AT_ONCE:
        block_rows = max(_FEWEST_AT_ONCE, _BLOCK_SCORES // tables.codebook_size)
        is_clear_N = np.empty(num_latents, np.bool_)
        for first in range(0, num_latents, block_rows):
            block = slice(first, first + block_rows)
            is_clear_N[block] = _search_block(latents_ND[block], arrays, codes[block])
        unclear = np.flatnonzero(~is_clear_N)
    uncertain = search_again(latents, tables, codes, unclear)
    return codes_NK, torch.tensor(uncertain) if uncertain else None


def search_again(latents: _Floats, tables: SearchTables, codes: _Codes, places: Iterable[int]) -> list[int]:
    """Search some rows one by one, and decide in float64 what is close; the places of those that stay uncertain."""
    arrays = tables.prepared("arrays", _Arrays)
    return [place for place in places if not _search_one(latents[place], arrays, codes[place])]


class _Row(NamedTuple):
    """What a code row needs; float32 arrays are views of the tensors. `tie`: slope and constant, for two scores."""

    chain: slice
    entries_Cd: Tensor
    entries: _Floats
    offsets_C: Tensor
    offsets: _Floats
    exact_offsets: npt.NDArray[np.float64]
    tie: tuple[float, float]
    taken_dims: slice
    taken: _Floats
    takes_all_dims: bool


class _Arrays:
    """The tables row by row, and by how much leads may be wrong, by the precision of torch's products."""

    def __init__(self, tables: SearchTables) -> None:
        tie_slopes, tie_constants = (bound.tolist() for bound in tie_bounds(tables))
        self.rows = []
        for row, (first, table) in enumerate(tables.takes):
            entries_Cd, exact_offsets_C = tables.entries_KCd[row], tables.exact_offsets_KC[row]
            offsets_C = exact_offsets_C.float()
            self.rows.append(
                _Row(
                    chain=tables.slice_of(row),
                    entries_Cd=entries_Cd,
                    entries=entries_Cd.numpy(),
                    offsets_C=offsets_C,
                    offsets=offsets_C.numpy(),
                    exact_offsets=exact_offsets_C.numpy(),
                    tie=(tie_slopes[row], tie_constants[row]),
                    taken_dims=slice(first, first + table.shape[1]),
                    taken=table.numpy(),
                    takes_all_dims=table.shape[1] == tables.num_dims,
                )
            )
        self.bounds = {
            # Twice, for both scores of a lead may be wrong.
            precision: [2.0 * bound.numpy() for bound in error_bounds(tables, ROUNDING, input_rounding=input_rounding)]
            for precision, input_rounding in _INPUT_ROUNDINGS.items()
        }
        self.codebook_size = tables.codebook_size
        self.places = np.arange(tables.num_rows)
        everything = slice(0, tables.num_dims)
        # For single rows, which are searched in as few calls as can be: no slice where it is all dims.
        self.steps = [
            (
                None if row.chain == everything else row.chain,
                row.entries,
                row.offsets,
                None if row.takes_all_dims else row.taken_dims,
                row.taken,
            )
            for row in self.rows
        ]


def _search_block(latents_nD: Tensor, arrays: _Arrays, codes_nK: _Codes) -> npt.NDArray[np.bool_]:
    """Write the codes of a block, and say in which rows [n] rounding cannot have decided.

    That is looked into for as many code rows at a time as there is room for: S of them.
    """
    num_here, num_rows = codes_nK.shape
    num_together = min(num_rows, max(1, _BLOCK_SCORES // (num_here * arrays.codebook_size)))
    scores_SnC = torch.empty(num_together, num_here, arrays.codebook_size)
    residuals_SnD = latents_nD.new_empty(num_together + 1, *latents_nD.shape)
    residuals_SnD[0] = latents_nD
    scores, residuals = scores_SnC.numpy(), residuals_SnD.numpy()
    slopes_K, constants_K = arrays.bounds[torch.get_float32_matmul_precision()]
    is_clear_n = np.ones(num_here, np.bool_)
    with np.errstate(all="ignore"):
        for first in range(0, num_rows, num_together):
            now = slice(first, min(first + num_together, num_rows))
            chosen_Sn = np.empty((now.stop - first, num_here), np.int64)
            for place, row in enumerate(arrays.rows[now]):
                torch.addmm(row.offsets_C, residuals_SnD[place, :, row.chain], row.entries_Cd.T, out=scores_SnC[place])
                chosen_Sn[place] = scores[place].argmax(1)
                taken_nd = row.taken.take(chosen_Sn[place], 0)
                if row.takes_all_dims:
                    np.subtract(residuals[place], taken_nd, residuals[place + 1])
                else:
                    residuals[place + 1] = residuals[place]
                    residuals[place + 1, :, row.taken_dims] -= taken_nd
            num_now = len(chosen_Sn)
            codes_nK[:, now] = chosen_Sn.T
            best_Sn = np.take_along_axis(scores[:num_now], chosen_Sn[:, :, None], 2)[:, :, 0]
            np.put_along_axis(scores[:num_now], chosen_Sn[:, :, None], -np.inf, 2)
            leads_Sn = best_Sn - scores[:num_now].max(2)
            # Whole residuals are no shorter than their chains, so the bounds hold.
            norms_Sn = np.sqrt(np.einsum("snd,snd->sn", residuals[:num_now], residuals[:num_now]))
            bounds_Sn = slopes_K[now, None] * norms_Sn + constants_K[now, None]
            # A bound that is no number says nothing.
            is_clear_n &= ((leads_Sn > bounds_Sn) & (bounds_Sn < LARGEST_BOUND)).all(axis=0)
            residuals[0] = residuals[num_now]
    return is_clear_n


def _search_one(latent: _Floats, arrays: _Arrays, codes_K: _Codes, given: Sequence[int] = ()) -> bool:
    """Write the codes of one row, the first of which are given; say whether they are those of the reference.

    Every call counts: after a codebook has gone through the caches, all that runs is read from memory again.
    """
    num_rows, num_given = len(codes_K), len(given)
    residuals_KD = np.empty((num_rows + 1, len(latent)), np.float32)
    residuals_KD[0] = residual = latent
    scores_KC = np.empty((num_rows, arrays.codebook_size), np.float32)
    codes = list(given)
    with np.errstate(all="ignore"):
        for number, (chain, entries, offsets, taken_dims, taken) in enumerate(arrays.steps[:num_rows]):
            scores_C, left_over = scores_KC[number], residuals_KD[number + 1]
            np.dot(entries, residual if chain is None else residual[chain], out=scores_C)
            np.add(scores_C, offsets, scores_C)
            if number >= num_given:
                codes.append(int(scores_C.argmax()))
            if taken_dims is None:
                np.subtract(residual, taken[codes[number]], left_over)
            else:
                left_over[:] = residual
                left_over[taken_dims] -= taken[codes[number]]
            residual = left_over
        codes_K[:] = codes
        # Whole residuals are no shorter than their chains, so the bounds hold.
        norms_K = np.sqrt(np.einsum("kd,kd->k", residuals_KD[:-1], residuals_KD[:-1]))
        slopes_K, constants_K = arrays.bounds["highest"]
        bounds_K = slopes_K[:num_rows] * norms_K + constants_K[:num_rows]
        least_K = scores_KC[arrays.places[:num_rows], codes] - bounds_K
        is_candidate_KC = scores_KC >= least_K[:, None].astype(np.float32)
        if not (bounds_K < LARGEST_BOUND).all():  # a bound that is no number says nothing
            return False
    if np.count_nonzero(is_candidate_KC) == num_rows:  # each row's best score is one of them
        return True
    for number in range(num_given, num_rows):
        candidates = np.flatnonzero(is_candidate_KC[number])
        row = arrays.rows[number]
        code = _nearest(residuals_KD[number, row.chain], row, candidates) if len(candidates) > 1 else candidates[0]
        if code != codes[number]:  # what follows it is for another residual
            return _search_one(latent, arrays, codes_K, [*codes[:number], code])
    return True


def _nearest(chain: _Floats, row: _Row, candidates: _Codes) -> int:
    """The first of the candidates that float64 cannot tell from the best one."""
    chain_d = chain.astype(np.float64)
    scores = row.entries[candidates].astype(np.float64) @ chain_d + row.exact_offsets[candidates]
    slope, constant = row.tie
    tie = slope * np.sqrt(chain_d @ chain_d) + constant
    return int(candidates[np.flatnonzero(scores >= scores.max() - tie)[0]])
