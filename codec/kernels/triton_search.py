"""Residual search on a GPU, in Triton. Codes are those of the reference, and nothing waits for the GPU.

Letters as in `codec.kernels.residual_search`; n a row, P a program's block of rows, c a tile of entries.

Two ways, by the number of rows and the size of a codebook:

- many rows, or small codebooks: one launch for all stages. A program owns a block of rows, and of one chain where no
  choice reaches into another one. Scores come from float32 products, tile by tile; where the lead of the best entry is
  within the error bound, the program does that row and stage again in float64, as the reference does, before it goes
  on. So the caller need not wait to know what is left over, and a CUDA graph can hold the search.
- few rows: one launch for each stage and one more. One program alone reads codebooks at the bandwidth of one
  multiprocessor, a hundredth of what there is, so all programs share a stage: each picks up the code of the stage
  before from all its scores, and scores its own slice of the codebook; float64 from the beginning, for reading is what
  takes the time.

What is expected, none of it measured: an H100 has 132 multiprocessors, 67 Tflop/s in float32, about 160 in three
products of TF32, 3.3 TB/s from memory, and perhaps 5 TB/s from its second-level cache.

- many, D 128, C 1024, K 8: 2 * 128 * 1024 * 8 = 2.1 Mflop a row, so 31 ms for a million rows in float32 and 13 ms in
  TF32, if all went at full rate. A tile of 128 rows and 64 entries reads 96 KB for 2.1 Mflop: 3 TB/s at full rate, from
  the caches, since a program's rows (64 KB) and a codebook (512 KB) stay there. The memory sees 1 KB a row, 0.3 ms.
- few: 4.2 MB of codebooks at 5 TB/s are 1 us, far below what 9 dependent launches take, about 2 us each in a CUDA
  graph. One program alone would take about 40 us, and 600 us for 32 codebooks of 2048 entries of 256 dims (67 MB).

The residual lies in a copy of the latents that programs update, and not in registers: a product of 128 dims at once
leaves no registers for a tile of any size (compiled for an H100, each thread keeps 1 to 3 KB in memory), while products
of 16 dims one after the other run from the first-level cache. There the innermost loop spills nothing, 80 % of its
instructions multiply, and 71 % with the choice of the best entry, which would allow 48 of the 67 Tflop/s.
"""

# Kernels are no Python: their parameters are pointers, numbers, and tensors of blocks.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codec.kernels.search_tables import SearchTables, error_bounds, tie_bounds

FEW_ROWS = 64  # at most so many share stages among programs,
FEW_BYTES = 200_000  # and only codebooks that one program alone would read for longer than a launch takes, about 2 us
MANY_ROWS = 128 * 132  # from here on, blocks of 128 rows occupy every multiprocessor of an H100
_FEW_PROGRAMS = 256  # at most so many share a codebook

# By the precision of a product: what one operation rounds, and what the factors were rounded together before.
_ROUNDINGS = {
    "ieee": (2.0**-24, 0.0),
    # TF32 has 11 bits, and the rest of a number gets as many more: 2**-20 is lost in both factors, even if all is cut
    # off, and the product of both rests. Tensor cores add 8 products to a sum at a time, or 4, and cut each of these
    # off below the 24th bit of the largest (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021): 2**-23, at
    # most 40 times in 32 dims, after which Triton adds in float32. It begins with the products of rests, whose own
    # errors vanish beside these.
    "tf32x3": (2.0**-24, 3 * 2.0**-20 + 40 * 2.0**-23),
}
# From here on, sums of products, or the parts of a number, may be too large for float32.
_LARGEST_BOUND, _LARGEST_SQUARE = tl.constexpr(1e31), tl.constexpr(1e72)


def search(
    latents_ND: Tensor, tables: SearchTables, num_rows: int, *, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    """Codes int64 [N, K'] of float32 latents on the GPU, and None: no row is uncertain.

    `precision` of products that find candidates: "ieee" (float32), or "tf32x3" on tensor cores. Codes are the same.
    """
    num_latents = len(latents_ND)
    codes_NK = torch.empty(num_latents, num_rows, dtype=torch.int64, device=latents_ND.device)
    layout = tables.prepared("triton", _Layout)
    with torch.cuda.device_of(latents_ND):
        if 0 < num_latents <= FEW_ROWS and tables.entries_KCd[0].nbytes >= FEW_BYTES:
            _search_few(latents_ND, layout, codes_NK)
        elif num_latents:
            _search_many(latents_ND, layout, codes_NK, precision)
    return codes_NK, None


class _Layout:
    """The tables as kernels read them."""

    def __init__(self, tables: SearchTables) -> None:
        self.entries_KCd = tables.entries_KCd
        self.num_dims = tables.num_dims
        self.num_rows, self.codebook_size, self.dim = tables.entries_KCd.shape
        self.exact_offsets_KC = tables.exact_offsets_KC
        self.offsets_KC = tables.exact_offsets_KC.float()
        # For each code row a slope and a constant for leads, twice, for both scores may be wrong; and for ties.
        ties_K2 = torch.stack(tie_bounds(tables), dim=1)
        self.bounds_K4 = {
            precision: torch.cat(
                [2.0 * torch.stack(error_bounds(tables, rounding, input_rounding=input_rounding), dim=1), ties_K2],
                dim=1,
            )
            for precision, (rounding, input_rounding) in _ROUNDINGS.items()
        }
        self.takes, begins = tables.flat_takes()
        self.largest_width = max(take_Cw.shape[1] for _, take_Cw in tables.takes)
        # Where all choices take away from their own chains alone, each chain is work of its own.
        are_apart = all(
            (first, take_Cw.shape[1]) == (chain * self.dim, self.dim)
            for chain, (first, take_Cw) in zip(tables.chains, tables.takes, strict=True)
        )
        self.num_parts = max(tables.chains) + 1 if are_apart else 1
        # For each code row its part, the first dim of its chain, and where its entries begin; of what a choice takes
        # away the first dim, the number of dims, and where the table begins.
        plan = []
        for row, (chain, (first, take_Cw)) in enumerate(zip(tables.chains, tables.takes, strict=True)):
            entries_before = row * self.codebook_size * self.dim
            part = chain if are_apart else 0
            plan.append([part, chain * self.dim, entries_before, first, take_Cw.shape[1], begins[row]])
        self.plan_K6 = torch.tensor(plan, device=self.entries_KCd.device)


def _search_many(latents_ND: Tensor, layout: _Layout, codes_NK: Tensor, precision: str) -> None:
    num_latents, num_rows = codes_NK.shape
    are_many = num_latents >= MANY_ROWS
    block_rows, most_entries = (128, 64) if are_many else (_power_of_2(num_latents, 16, 32), 128)
    uses_tensor_cores = precision != "ieee"
    exact_dims = _power_of_2(layout.dim)
    _many_kernel[(triton.cdiv(num_latents, block_rows), layout.num_parts)](
        latents_ND.clone(memory_format=torch.contiguous_format),
        codes_NK,
        layout.entries_KCd,
        layout.offsets_KC,
        layout.exact_offsets_KC,
        layout.bounds_K4[precision],
        layout.takes,
        layout.plan_K6,
        num_latents,
        num_rows,
        NUM_ROWS=layout.num_rows,
        NUM_DIMS=layout.num_dims,
        DIM=layout.dim,
        WIDTH=layout.largest_width,
        CODEBOOK_SIZE=layout.codebook_size,
        PRECISION=precision,
        BLOCK_P=block_rows,
        BLOCK_C=_power_of_2(layout.codebook_size, 16, most_entries),
        BLOCK_D=_power_of_2(layout.dim, 16, 32 if uses_tensor_cores else 16),
        LANE=2 if uses_tensor_cores else 4,  # as many entries in a row as one thread has
        EXACT_C=_power_of_2(2048 // exact_dims, 4, 64),
        EXACT_D=exact_dims,
        num_warps=8 if uses_tensor_cores and are_many else 4,
        num_stages=3,
    )


def _search_few(latents_ND: Tensor, layout: _Layout, codes_NK: Tensor) -> None:
    num_latents, num_rows = codes_NK.shape
    # What stage s sees, and how it scores, lies at s % 2: the next launch reads it while it writes its own.
    residuals_2ND = latents_ND.expand(2, -1, -1).contiguous()
    scores_2NC = layout.exact_offsets_KC.new_empty(2, num_latents, layout.codebook_size)
    block_entries = _power_of_2(layout.codebook_size // 128, 8, 32)
    num_blocks = triton.cdiv(layout.codebook_size, block_entries)
    slice_entries = block_entries * triton.cdiv(num_blocks, _FEW_PROGRAMS)
    num_programs = triton.cdiv(layout.codebook_size, slice_entries)
    for row in range(num_rows + 1):
        _few_kernel[(num_programs if row < num_rows else 1, num_latents)](
            residuals_2ND,
            scores_2NC,
            codes_NK,
            layout.entries_KCd,
            layout.exact_offsets_KC,
            layout.bounds_K4["ieee"],
            layout.takes,
            layout.plan_K6,
            row,
            num_latents,
            num_rows,
            NUM_DIMS=layout.num_dims,
            DIM=layout.dim,
            CODEBOOK_SIZE=layout.codebook_size,
            SLICE_C=slice_entries,
            BLOCK_C=block_entries,
            BLOCK_D=_power_of_2(layout.dim),
            BLOCK_ALL=_power_of_2(layout.codebook_size, most=1024),
        )


def _power_of_2(value: int, least: int = 1, most: int = 2**30) -> int:
    """The first power of two that is not below the value, within limits."""
    return max(least, min(most, int(triton.next_power_of_2(value))))


@triton.jit
def _exact_scores(
    chain_d, entries, offsets, index_c, DIM: tl.constexpr, CODEBOOK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Float64 scores of a tile of entries for a float64 chain; what is no number, or no entry, never wins."""
    dims_d = tl.arange(0, BLOCK_D)
    is_entry_c = index_c < CODEBOOK_SIZE
    is_there_cd = is_entry_c[:, None] & (dims_d < DIM)[None, :]
    entries_cd = tl.load(entries + index_c[:, None] * DIM + dims_d[None, :], mask=is_there_cd, other=0.0)
    offsets_c = tl.load(offsets + index_c, mask=is_entry_c, other=0.0)
    scores_c = offsets_c + tl.sum(entries_cd.to(tl.float64) * chain_d[None, :], 1)
    return tl.where(is_entry_c & (scores_c == scores_c), scores_c, -float("inf"))


@triton.jit
def _tie(chain_d, bounds):
    """How far apart float64 scores may be and still tie."""
    return tl.load(bounds + 2) * tl.sqrt(tl.sum(chain_d * chain_d, 0)) + tl.load(bounds + 3)


@triton.jit
def _first_best(scores_c, index_c, best, tie, CODEBOOK_SIZE: tl.constexpr):
    """The first index of a tile whose score ties with the best of all; CODEBOOK_SIZE where none does."""
    is_best_c = ((scores_c >= best - tie) | (scores_c == best)) & (index_c < CODEBOOK_SIZE)
    return tl.min(tl.where(is_best_c, index_c, CODEBOOK_SIZE), 0)


# Bounds of `range` are known to the compiler: with numpy 2.4, Triton's interpreter takes no others.
@triton.jit(do_not_specialize=["num_latents", "num_rows"])
def _many_kernel(
    residuals,
    codes,
    entries,
    offsets,
    exact_offsets,
    bounds,
    takes,
    plan,
    num_latents,
    num_rows,
    NUM_ROWS: tl.constexpr,
    NUM_DIMS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANE: tl.constexpr,
    EXACT_C: tl.constexpr,
    EXACT_D: tl.constexpr,
):
    """All stages of a block of rows in one part of the chains."""
    place_P = tl.arange(0, BLOCK_P)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_P
    is_row_P = first_row + place_P < num_latents
    n_P = tl.minimum(first_row + place_P, num_latents - 1)  # beyond its own rows, a program computes for nothing
    dims_d, exact_dims_d = tl.arange(0, BLOCK_D), tl.arange(0, EXACT_D)
    for row in range(NUM_ROWS):
        if (row < num_rows) & (tl.load(plan + row * 6) == tl.program_id(1)):
            chain = residuals + tl.load(plan + row * 6 + 1)
            chain_P = chain + n_P * NUM_DIMS
            row_entries = entries + tl.load(plan + row * 6 + 2)
            row_offsets = exact_offsets + row * CODEBOOK_SIZE
            row_bounds = bounds + row * 4

            # Of each lane of entries the best one, its score, and that of the second best: threads exchange nothing
            # before the end. Rows with scores that are no numbers are done again below.
            best_Pl = tl.full([BLOCK_P, BLOCK_C // LANE], -float("inf"), tl.float32)
            second_Pl = tl.full([BLOCK_P, BLOCK_C // LANE], -float("inf"), tl.float32)
            codes_Pl = tl.zeros([BLOCK_P, BLOCK_C // LANE], tl.int32)
            for first in range(0, CODEBOOK_SIZE, BLOCK_C):
                index_c = first + tl.arange(0, BLOCK_C)
                is_entry_c = index_c < CODEBOOK_SIZE
                scores_Pc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
                for first_dim in range(0, DIM, BLOCK_D):
                    now_d = first_dim + dims_d
                    is_dim_d = now_d < DIM
                    chain_Pd = tl.load(chain_P[:, None] + now_d[None, :], mask=is_dim_d[None, :], other=0.0)
                    entries_dc = tl.load(
                        row_entries + index_c[None, :] * DIM + now_d[:, None],
                        mask=is_dim_d[:, None] & is_entry_c[None, :],
                        other=0.0,
                    )
                    scores_Pc = tl.dot(chain_Pd, entries_dc, scores_Pc, input_precision=PRECISION)
                offsets_c = tl.load(offsets + row * CODEBOOK_SIZE + index_c, mask=is_entry_c, other=-float("inf"))
                scores_Plj = tl.reshape(scores_Pc + offsets_c[None, :], [BLOCK_P, BLOCK_C // LANE, LANE])
                index_lj = tl.reshape(index_c, [BLOCK_C // LANE, LANE])[None, :, :]
                top_Pl = tl.max(scores_Plj, 2)
                top_index_Pl = tl.min(tl.where(scores_Plj == top_Pl[:, :, None], index_lj, CODEBOOK_SIZE), 2)
                next_Pl = tl.max(tl.where(index_lj == top_index_Pl[:, :, None], -float("inf"), scores_Plj), 2)
                second_Pl = tl.maximum(tl.maximum(second_Pl, next_Pl), tl.minimum(best_Pl, top_Pl))
                codes_Pl = tl.where(top_Pl > best_Pl, top_index_Pl, codes_Pl)
                best_Pl = tl.maximum(best_Pl, top_Pl)
            best_P = tl.max(best_Pl, 1)
            codes_P = tl.min(tl.where(best_Pl == best_P[:, None], codes_Pl, CODEBOOK_SIZE), 1)
            second_P = tl.max(tl.where(codes_Pl == codes_P[:, None], second_Pl, best_Pl), 1)

            squares_P = tl.zeros([BLOCK_P], tl.float64)
            for first_dim in range(0, DIM, BLOCK_D):
                now_d = first_dim + dims_d
                chain_Pd = tl.load(chain_P[:, None] + now_d[None, :], mask=(now_d < DIM)[None, :], other=0.0)
                exact_Pd = chain_Pd.to(tl.float64)
                squares_P += tl.sum(exact_Pd * exact_Pd, 1)
            bound_P = tl.load(row_bounds) * tl.sqrt(squares_P) + tl.load(row_bounds + 1)
            # A lead or a bound that is no number is not certain either.
            is_certain_P = (best_P - second_P).to(tl.float64) > bound_P
            is_certain_P = is_certain_P & (bound_P < _LARGEST_BOUND) & (squares_P < _LARGEST_SQUARE)

            # Row by row, what is not certain: the reference's rule.
            is_open_P = is_row_P & ~is_certain_P
            while tl.sum(is_open_P.to(tl.int32), 0) > 0:
                place = tl.min(tl.where(is_open_P, place_P, BLOCK_P), 0)
                is_open_P = is_open_P & (place_P != place)
                one = chain + (first_row + place) * NUM_DIMS
                chain_d = tl.load(one + exact_dims_d, mask=exact_dims_d < DIM, other=0.0).to(tl.float64)
                best = tl.full([], -float("inf"), tl.float64)
                for first in range(0, CODEBOOK_SIZE, EXACT_C):
                    index_c = first + tl.arange(0, EXACT_C)
                    scores_c = _exact_scores(chain_d, row_entries, row_offsets, index_c, DIM, CODEBOOK_SIZE, EXACT_D)
                    best = tl.maximum(best, tl.max(scores_c, 0))
                tie, code = _tie(chain_d, row_bounds), tl.full([], CODEBOOK_SIZE, tl.int32)
                for first in range(0, CODEBOOK_SIZE, EXACT_C):
                    index_c = first + tl.arange(0, EXACT_C)
                    scores_c = _exact_scores(chain_d, row_entries, row_offsets, index_c, DIM, CODEBOOK_SIZE, EXACT_D)
                    code = tl.minimum(code, _first_best(scores_c, index_c, best, tie, CODEBOOK_SIZE))
                codes_P = tl.where(place_P == place, code, codes_P)

            tl.store(codes + n_P * num_rows + row, codes_P.to(tl.int64), mask=is_row_P)
            taken_dims, width = tl.load(plan + row * 6 + 3), tl.load(plan + row * 6 + 4)
            taken_P = takes + tl.load(plan + row * 6 + 5) + codes_P * width
            tl.debug_barrier()  # now all threads have read
            for first_dim in range(0, WIDTH, BLOCK_D):
                now_d = first_dim + dims_d
                is_there_Pd = is_row_P[:, None] & (now_d < width)[None, :]
                residual = residuals + n_P[:, None] * NUM_DIMS + (taken_dims + now_d)[None, :]
                residual_Pd = tl.load(residual, mask=is_there_Pd, other=0.0)
                taken_Pd = tl.load(taken_P[:, None] + now_d[None, :], mask=is_there_Pd, other=0.0)
                tl.store(residual, residual_Pd - taken_Pd, mask=is_there_Pd)
            tl.debug_barrier()  # now all have written


@triton.jit(do_not_specialize=["row", "num_latents", "num_rows"])
def _few_kernel(
    residuals,
    scores,
    codes,
    entries,
    offsets,
    bounds,
    takes,
    plan,
    row,
    num_latents,
    num_rows,
    NUM_DIMS: tl.constexpr,
    DIM: tl.constexpr,
    CODEBOOK_SIZE: tl.constexpr,
    SLICE_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """What row `row - 1` of codes chooses, and how a slice of row `row`'s codebook scores; either may be absent."""
    dims_d = tl.arange(0, BLOCK_D)
    n = tl.program_id(1)
    before, now = (row + 1) % 2 * num_latents + n, row % 2 * num_latents + n
    residual, residual_now = residuals + before * NUM_DIMS, residuals + now * NUM_DIMS
    taken = takes
    taken_dims, width = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if row > 0:
        last = plan + (row - 1) * 6
        chain_d = tl.load(residual + tl.load(last + 1) + dims_d, mask=dims_d < DIM, other=0.0).to(tl.float64)
        tie = _tie(chain_d, bounds + (row - 1) * 4)
        best, code = tl.full([], -float("inf"), tl.float64), tl.full([], CODEBOOK_SIZE, tl.int32)
        for first in range(0, CODEBOOK_SIZE, BLOCK_ALL):
            index_c = first + tl.arange(0, BLOCK_ALL)
            is_entry_c = index_c < CODEBOOK_SIZE
            scores_c = tl.load(scores + before * CODEBOOK_SIZE + index_c, mask=is_entry_c, other=-float("inf"))
            best = tl.maximum(best, tl.max(scores_c, 0))
        for first in range(0, CODEBOOK_SIZE, BLOCK_ALL):
            index_c = first + tl.arange(0, BLOCK_ALL)
            is_entry_c = index_c < CODEBOOK_SIZE
            scores_c = tl.load(scores + before * CODEBOOK_SIZE + index_c, mask=is_entry_c, other=-float("inf"))
            code = tl.minimum(code, _first_best(scores_c, index_c, best, tie, CODEBOOK_SIZE))
        taken_dims, width = tl.load(last + 3), tl.load(last + 4)
        taken = takes + tl.load(last + 5) + code * width
        if tl.program_id(0) == 0:
            tl.store(codes + n * num_rows + row - 1, code.to(tl.int64))
            for first in range(0, NUM_DIMS, BLOCK_D):
                now_d = first + dims_d
                left_d = _left_over(residual, taken, taken_dims, width, now_d, NUM_DIMS)
                tl.store(residual_now + now_d, left_d, mask=now_d < NUM_DIMS)
    if row < num_rows:
        chain = tl.load(plan + row * 6 + 1)
        chain_d = _left_over(residual, taken, taken_dims, width, chain + dims_d, chain + DIM).to(tl.float64)
        row_entries, row_offsets = entries + tl.load(plan + row * 6 + 2), offsets + row * CODEBOOK_SIZE
        for first in range(0, SLICE_C, BLOCK_C):
            index_c = tl.program_id(0) * SLICE_C + first + tl.arange(0, BLOCK_C)
            scores_c = _exact_scores(chain_d, row_entries, row_offsets, index_c, DIM, CODEBOOK_SIZE, BLOCK_D)
            tl.store(scores + now * CODEBOOK_SIZE + index_c, scores_c, mask=index_c < CODEBOOK_SIZE)


@triton.jit
def _left_over(residual, taken, taken_dims, width, now_d, end):
    """Dims of a residual, those before `end`, after `width` of them from `taken_dims` on were taken away."""
    is_taken_d = (now_d >= taken_dims) & (now_d < taken_dims + width) & (now_d < end)
    residual_d = tl.load(residual + now_d, mask=now_d < end, other=0.0)
    return residual_d - tl.load(taken + (now_d - taken_dims), mask=is_taken_d, other=0.0)
