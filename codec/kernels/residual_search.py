"""Residual search: which codebook entries, row by row of codes, approximate each latent best.

Shapes: N rows of latents, D dims, K code rows, C codebook entries, d dims of a codebook, H chains of d dims, D = H * d.

A code row works on one chain: it picks the entry nearest to what the rows before it left over there. Which chain, and
what a choice takes away from which dims, is all that tells the forms apart (`SearchTables`):

- plain: one chain, and a choice takes its entry away from it;
- grouped: row k works on chain k % num_groups, each a slice of the latents;
- split (Mimi): as many chains as there are parts, each with latents of its own;
- factorised (DAC): a chain for every row, which holds the latents as that row's projection shows them. Projections are
  linear, so what a choice takes away from the later chains can be tabulated, and nothing leaves the small spaces.

The contract:

1. A row picks the entry nearest by squared Euclidean distance, or by cosine, to the float32 residual of its chain, as
   computed in float64; the residual then loses the entry, rounded to float32. `rvq_reference` says it in code.
2. The lowest index wins ties. Distances that differ by less than float64 itself rounds are ties. A product that is not
   a number never wins, so where nothing is a number, the code is 0.
3. Every implementation gives these very codes, on every machine, for any number of rows, of threads, of streams. Fast
   ones compute in float32 or less, in any order, bound what they got wrong (`error_bounds`), and compare in float64
   where the lead of an entry is within the bound: about one row in a hundred has such a place.

So codes cannot differ as long as the latents do not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.kernels import blocked_search
from codec.kernels.search_tables import SearchTables as SearchTables
from codec.kernels.search_tables import tie_bounds

_FEW_ROWS = 8  # from some 16 on, products of all rows at once take less time than compiled row after row
_REFERENCE_ROWS = 256  # at a time: their float64 scores of 1024 entries are 2 MB


def rvq_reference(latents_ND: Tensor, tables: SearchTables, *, num_rows: int | None = None) -> Tensor:
    """The specification: int64 codes [N, K] by the rules above. Residuals are rounded to the dtype of the latents."""
    num_rows = tables.num_rows if num_rows is None else num_rows
    slopes_K, constants_K = tie_bounds(tables)
    codes_NK = torch.empty(len(latents_ND), num_rows, dtype=torch.int64, device=latents_ND.device)
    for residual_ND, codes_nK in zip(
        latents_ND.clone().split(_REFERENCE_ROWS), codes_NK.split(_REFERENCE_ROWS), strict=True
    ):
        for row in range(num_rows):
            chain_Nd = residual_ND[:, tables.slice_of(row)].double()
            scores_NC = torch.addmm(tables.exact_offsets_KC[row], chain_Nd, tables.entries_KCd[row].double().T)
            scores_NC = scores_NC.masked_fill(scores_NC.isnan(), -torch.inf)
            best_N1 = scores_NC.amax(1, keepdim=True)
            tie_N1 = slopes_K[row] * chain_Nd.norm(dim=1, keepdim=True) + constants_K[row]
            # `max` returns the first of equal maxima. Where a tie's width is no number, nothing is, or all is infinite.
            is_best_NC = (scores_NC >= best_N1 - tie_N1) | (scores_NC == best_N1)
            codes_N = is_best_NC.byte().max(1).indices
            codes_nK[:, row] = codes_N
            first, table_Cw = tables.takes[row]
            residual_ND[:, first : first + table_Cw.shape[1]] -= table_Cw[codes_N].to(residual_ND.dtype)
    return codes_NK


def rvq_margins(latents_ND: Tensor, tables: SearchTables, codes_NK: Tensor) -> Tensor:
    """How clear choices were, float64 [N, K']: by what part the next best entry is further off than the chosen one.

    In squared distances, or 1 - cosine, along the given codes. 0 is a tie, and a negative margin a code that is not the
    best one.
    """
    margins = []
    residual_ND = latents_ND.to(_dtype(latents_ND, tables)).clone()
    for row in range(codes_NK.shape[1]):
        chain_Nd = residual_ND[:, tables.slice_of(row)].double()
        scores_NC = torch.addmm(tables.exact_offsets_KC[row], chain_Nd, tables.entries_KCd[row].double().T)
        codes_N1 = codes_NK[:, row : row + 1]
        chosen_N = scores_NC.gather(1, codes_N1)[:, 0]
        other_N = scores_NC.scatter(1, codes_N1, -torch.inf).amax(1)
        norm_N = chain_Nd.norm(dim=1)
        worst_N = norm_N.square() / 2 - chosen_N if tables.is_distance else norm_N - chosen_N
        margins.append((chosen_N - other_N) / worst_N.clamp_min(1e-300))
        first, table_Cw = tables.takes[row]
        residual_ND[:, first : first + table_Cw.shape[1]] -= table_Cw[codes_N1[:, 0]].to(residual_ND.dtype)
    return torch.stack(margins, 1)


def rvq_search(latents_ND: Tensor, tables: SearchTables, *, num_rows: int | None = None, impl: str = "auto") -> Tensor:
    """Codes int64 [N, K'] of latents [N, D], of all code rows or the first `num_rows`; no gradient.

    `impl` names an implementation, or "auto" for the best one for these inputs; all give the same codes. Raises
    ValueError for shapes that do not fit or an `impl` that is not there.
    """
    if latents_ND.dim() != 2 or latents_ND.shape[1] != tables.num_dims:
        raise ValueError(f"expected latents [N, {tables.num_dims}], got {tuple(latents_ND.shape)}")
    if num_rows is not None and not 0 < num_rows <= tables.num_rows:
        raise ValueError(f"num_rows={num_rows} is not in 1..{tables.num_rows}")
    num_rows = tables.num_rows if num_rows is None else num_rows
    # No autocast: products into given memory and products of float64 are outside of it.
    if latents_ND.requires_grad or latents_ND.dtype != _dtype(latents_ND, tables):
        latents_ND = latents_ND.detach().to(_dtype(latents_ND, tables))
    name = resolve_impl(impl, latents_ND)
    if name == "reference":
        codes_NK = rvq_reference(latents_ND, tables, num_rows=num_rows)
    else:
        codes_NK, uncertain_n = _FAST[name](latents_ND, tables, num_rows)
        if uncertain_n is not None:
            codes_NK[uncertain_n] = rvq_reference(latents_ND[uncertain_n], tables, num_rows=num_rows)
    if (searches := _searches.get()) is not None:
        searches.append(Search(latents_ND.clone(), tables, codes_NK.clone()))
    return codes_NK


class Search(NamedTuple):
    """A search that took place, as `rvq_margins` takes it."""

    latents_ND: Tensor
    tables: SearchTables
    codes_NK: Tensor


_preferred: ContextVar[str] = ContextVar("preferred", default="auto")
_searches: ContextVar[list[Search] | None] = ContextVar("searches", default=None)


@contextlib.contextmanager
def search_with(impl: str) -> Iterator[None]:
    """Within it, "auto" is this implementation, however deep in a model the search is; for comparisons.

    Raises ValueError for one that is not there.
    """
    token = _preferred.set(resolve_impl(impl) if impl != "auto" else impl)
    try:
        yield
    finally:
        _preferred.reset(token)


@contextlib.contextmanager
def searches_seen() -> Iterator[list[Search]]:
    """A list to which the searches within it are added, one after the other."""
    searches: list[Search] = []
    token = _searches.set(searches)
    try:
        yield searches
    finally:
        _searches.reset(token)


def resolve_impl(impl: str, latents_ND: Tensor | None = None) -> str:
    """The implementation that `impl` stands for, for these latents; without latents, for float32.

    "auto" is then that of the CPU, and any other must be there for some device of this machine.
    """
    if impl == "auto":
        impl = _preferred.get()
    dtype = torch.float32 if latents_ND is None else latents_ND.dtype
    if impl == "auto":
        if latents_ND is not None and latents_ND.device.type != "cpu":
            return "triton" if dtype == torch.float32 and has_triton(latents_ND.device.type) else "reference"
        if dtype != torch.float32:
            return "reference"
        return "numba" if latents_ND is not None and len(latents_ND) <= _FEW_ROWS and _is_compiled() else "blocked"
    devices = ("cpu", "cuda") if latents_ND is None else (latents_ND.device.type,)
    available = dict.fromkeys(name for device in devices for name in available_impls(device))
    if impl not in available:
        raise ValueError(f"residual search {impl!r} is not available (there is: auto, {', '.join(available)})")
    if impl != "reference" and dtype != torch.float32:
        raise ValueError(f"residual search {impl!r} computes in float32, and these are {dtype}")
    return impl


def available_impls(device_type: str = "cpu") -> tuple[str, ...]:
    """The names that `impl` may have for latents on a device of this type ("cpu", "cuda") on this machine."""
    fast = ["blocked"] if device_type == "cpu" else []
    if device_type == "cpu" and _has_numba():
        fast.append("numba")
    if has_triton(device_type):
        fast += ["triton", "triton_tf32x3"]
    return ("reference", *fast)


@functools.cache
def has_triton(device_type: str) -> bool:
    """Whether Triton's kernels run on devices of this type: on GPUs, and everywhere in its interpreter (for tests)."""
    can_run = os.environ.get("TRITON_INTERPRET") == "1" or (device_type == "cuda" and torch.cuda.is_available())
    return can_run and importlib.util.find_spec("triton") is not None


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _is_compiled() -> bool:
    module = sys.modules.get("codec.kernels.numba_search")
    return module is not None and module.is_compiled()


def _numba_search(latents_ND: Tensor, tables: SearchTables, num_rows: int) -> tuple[Tensor, Tensor | None]:
    from codec.kernels import numba_search  # loads Numba, and compiles at the first call

    return numba_search.search(latents_ND, tables, num_rows)


def _triton_search(
    latents_ND: Tensor, tables: SearchTables, num_rows: int, *, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    from codec.kernels import triton_search  # loads Triton

    return triton_search.search(latents_ND, tables, num_rows, precision=precision)


# Each gives the codes [N, K'] of float32 latents, and in which rows [n] they may differ from those of the reference.
_FAST: dict[str, Callable[[Tensor, SearchTables, int], tuple[Tensor, Tensor | None]]] = {
    "blocked": blocked_search.search,
    "numba": _numba_search,
    "triton": _triton_search,
    "triton_tf32x3": functools.partial(_triton_search, precision="tf32x3"),
}


def _dtype(latents_ND: Tensor, tables: SearchTables) -> torch.dtype:
    return torch.float64 if torch.float64 in (latents_ND.dtype, tables.entries_KCd.dtype) else torch.float32


def rvq_decode(codes_NK: Tensor, codebooks_KCd: Tensor, *, num_groups: int = 1) -> Tensor:
    """Latents [N, D]: per group, the sum of the chosen entries. A code of -1 adds nothing (the stage is absent).

    The first K' <= K rows of codes may be given alone, in whole stages.
    """
    needs_gradient = torch.is_grad_enabled() and codebooks_KCd.requires_grad
    if codes_NK.is_cuda and codebooks_KCd.dtype == torch.float32 and not needs_gradient and has_triton("cuda"):
        from codec.kernels import triton_sums  # loads Triton

        return triton_sums.decode(codes_NK, codebooks_KCd.detach(), num_groups=num_groups)
    num_codebooks, size, dim = codebooks_KCd.shape
    first_entry_K = size * torch.arange(codes_NK.shape[1], device=codes_NK.device)
    numbered_NK = (codes_NK + first_entry_K).clamp_min_(0)
    is_present_NK = codes_NK >= 0
    weights_NK = None if is_present_NK.all() else is_present_NK.to(codebooks_KCd.dtype)
    table_Ed = codebooks_KCd.reshape(num_codebooks * size, dim)
    sums = [
        F.embedding_bag(
            numbered_NK[:, group::num_groups].contiguous(),
            table_Ed,
            mode="sum",
            per_sample_weights=None if weights_NK is None else weights_NK[:, group::num_groups].contiguous(),
        )
        for group in range(num_groups)
    ]
    return sums[0] if num_groups == 1 else torch.cat(sums, dim=1)
