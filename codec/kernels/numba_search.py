"""Residual search of few rows on the CPU, compiled by Numba: one call that reads each codebook once, and does no more.

Letters as in `codec.kernels.residual_search`. It is for a server that encodes frame after frame. Compiling takes a
second in every process, so nothing does it unasked (see `compile_search`); Numba is an extra, and librosa brings it.
Rows that rounding could have decided are left to `codec.kernels.blocked_search`.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codec.kernels import blocked_search
from codec.kernels.search_tables import SearchTables, error_bounds

_Floats = npt.NDArray[np.float32]
_Codes = npt.NDArray[np.int64]
_LARGEST_BOUND = blocked_search.LARGEST_BOUND  # a constant for the compiler
_is_compiled = False


def compile_search() -> None:
    """Compile the search for this process: from then on "auto" takes it for few rows, with the same codes.

    It takes a second; again, nothing. ModuleNotFoundError where Numba is not installed (the extra `fast`).
    """
    global _is_compiled
    tables = SearchTables(torch.ones(1, 1, 1))
    search(torch.zeros(1, 1), tables, 1)
    _is_compiled = True


def is_compiled() -> bool:
    """Whether `compile_search` was called in this process."""
    return _is_compiled


def search(latents_ND: Tensor, tables: SearchTables, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Codes int64 [N, K'] of float32 latents on the CPU, and which rows are uncertain, or None where none is."""
    arrays = tables.prepared("numba", _Arrays)
    codes_NK = torch.empty(len(latents_ND), num_rows, dtype=torch.int64)
    latents, codes = latents_ND.contiguous().numpy(), codes_NK.numpy()
    is_clear_N = np.empty(len(latents), np.bool_)
    _search(latents, *arrays.of_kernel, codes, is_clear_N)
    if is_clear_N.all():
        return codes_NK, None
    uncertain = blocked_search.search_again(latents, tables, codes, np.flatnonzero(~is_clear_N))
    return codes_NK, torch.tensor(uncertain) if uncertain else None


class _Arrays:
    """The tables as the kernel takes them."""

    def __init__(self, tables: SearchTables) -> None:
        dim = tables.entries_KCd.shape[2]
        slopes_K, constants_K = (2.0 * bound.numpy() for bound in error_bounds(tables, blocked_search.ROUNDING))
        takes, begins = tables.flat_takes()
        plan = [
            (chain * dim, first, table.shape[1], begin)
            for chain, (first, table), begin in zip(tables.chains, tables.takes, begins, strict=True)
        ]
        self.of_kernel = (
            tables.entries_KCd.numpy(),
            tables.exact_offsets_KC.float().numpy(),
            takes.numpy(),
            np.array(plan, dtype=np.int64),
            slopes_K,
            constants_K,
        )


# Sums may be made in any order and with fused operations, which the bounds allow; what is no number stays none.
@numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _search(
    latents_ND: _Floats,
    entries_KCd: _Floats,
    offsets_KC: _Floats,
    takes: _Floats,
    plan_K4: _Codes,
    slopes_K: npt.NDArray[np.float64],
    constants_K: npt.NDArray[np.float64],
    codes_NK: _Codes,
    is_clear_N: npt.NDArray[np.bool_],
) -> None:
    num_latents, num_rows = codes_NK.shape
    size, dim = entries_KCd.shape[1:]
    for n in range(num_latents):
        residual_D = latents_ND[n].copy()
        is_clear = True
        for row in range(num_rows):
            begin = plan_K4[row, 0]
            chain_d = residual_D[begin : begin + dim]
            entries_Cd, offsets_C = entries_KCd[row], offsets_KC[row]
            power = np.float32(0.0)
            for i in range(dim):
                power += chain_d[i] * chain_d[i]
            best, second, code = np.float32(-np.inf), np.float32(-np.inf), 0
            for c in range(size):
                score = np.float32(0.0)
                for i in range(dim):
                    score += entries_Cd[c, i] * chain_d[i]
                score += offsets_C[c]
                if score > best:
                    best, second, code = score, best, c
                elif score > second:
                    second = score
            codes_NK[n, row] = code
            bound = slopes_K[row] * np.sqrt(np.float64(power)) + constants_K[row]
            # A lead or a bound that is no number is not clear. Scores that are none were passed over: so is the power.
            is_clear = is_clear and np.float64(best) - np.float64(second) > bound and bound < _LARGEST_BOUND
            first, width = plan_K4[row, 1], plan_K4[row, 2]
            taken = plan_K4[row, 3] + code * width
            for i in range(width):
                residual_D[first + i] -= takes[taken + i]
        is_clear_N[n] = is_clear
