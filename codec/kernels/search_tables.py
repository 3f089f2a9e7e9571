"""What a residual search reads; see `codec.kernels.residual_search` for the forms and the letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_Prepared = TypeVar("_Prepared")


class SearchTables:
    """What a search reads, made from codebooks [K, C, d] once for many searches. It is never written to.

    `chains`: the chain of each code row; by default `num_groups` of them take turns. `by`: "distance", or "direction"
    for the greatest cosine: entries are normalised then.

    `takes`: instead of its entry from its own chain, what a choice takes away, as (first dim, table [C, width]) for
    each code row.

    ValueError where these do not fit each other.
    """

    def __init__(
        self,
        codebooks_KCd: Tensor,
        *,
        num_groups: int = 1,
        chains: Sequence[int] | None = None,
        by: str = "distance",
        takes: Sequence[tuple[int, Tensor]] | None = None,
    ) -> None:
        if codebooks_KCd.dim() != 3 or 0 in codebooks_KCd.shape:
            raise ValueError(f"expected codebooks [K, C, d], got {tuple(codebooks_KCd.shape)}")
        if by not in ("distance", "direction"):
            raise ValueError(f"by={by!r} is neither 'distance' nor 'direction'")
        num_rows, _, dim = codebooks_KCd.shape
        if chains is None:
            if num_groups < 1 or num_rows % num_groups:
                raise ValueError(f"{num_rows} codebooks are not whole stages of {num_groups} groups")
            chains = [row % num_groups for row in range(num_rows)]
        if len(chains) != num_rows or min(chains) < 0 or (takes is not None and len(takes) != num_rows):
            raise ValueError(f"chains and takes must name something for each of {num_rows} codebooks")
        entries_KCd = codebooks_KCd.detach()
        if entries_KCd.dtype != torch.float64:
            entries_KCd = entries_KCd.float()
        if by == "direction":
            entries_KCd = F.normalize(entries_KCd, dim=-1)
        self.entries_KCd = entries_KCd.contiguous()
        self.chains = tuple(chains)
        self.num_dims = dim * (max(chains) + 1)
        self.is_distance = by == "distance"
        # The nearest entry e of a residual r maximises r . e - |e|^2 / 2; |r|^2 is the same for all entries.
        squares_KC = entries_KCd.double().square().sum(-1)
        self.exact_offsets_KC = squares_KC / -2 if self.is_distance else torch.zeros_like(squares_KC)
        self.largest_norms_K = squares_KC.amax(1).sqrt()
        self.largest_offsets_K = self.exact_offsets_KC.abs().amax(1)
        if takes is None:
            self.takes = [(chain * dim, self.entries_KCd[row]) for row, chain in enumerate(self.chains)]
        else:
            self.takes = [(first, table.detach().to(self.entries_KCd)) for first, table in takes]
        for first, table in self.takes:
            if len(table) != entries_KCd.shape[1]:
                raise ValueError(f"a choice of {entries_KCd.shape[1]} entries takes one of {len(table)} vectors")
            if first < 0 or first + table.shape[1] > self.num_dims:
                raise ValueError(f"a choice takes dims {first}..{first + table.shape[1]} of {self.num_dims}")
        self._prepared: dict[str, object] = {}

    @property
    def num_rows(self) -> int:
        """K, the number of code rows."""
        return len(self.chains)

    @property
    def codebook_size(self) -> int:
        """C, the number of entries of each codebook."""
        return self.entries_KCd.shape[1]

    def slice_of(self, row: int) -> slice:
        """The dims that a code row compares with its entries."""
        dim = self.entries_KCd.shape[2]
        return slice(self.chains[row] * dim, (self.chains[row] + 1) * dim)

    def flat_takes(self) -> tuple[Tensor, list[int]]:
        """The tables of `takes` one after the other, a view where they are the entries; and where each begins."""
        tables = [table for _, table in self.takes]
        if [table.data_ptr() for table in tables] == [entries.data_ptr() for entries in self.entries_KCd]:
            flat = self.entries_KCd.flatten()
        else:
            flat = torch.cat([table.flatten() for table in tables])
        return flat, list(accumulate((table.numel() for table in tables[:-1]), initial=0))

    def prepared(self, name: str, make: Callable[[SearchTables], _Prepared]) -> _Prepared:
        """What an implementation needs beside, made when it is first asked for."""
        if name not in self._prepared:
            self._prepared[name] = make(self)
        return cast("_Prepared", self._prepared[name])


def error_bounds(
    tables: SearchTables, rounding: float, *, input_rounding: float = 0.0, smallest: float = 1e-36
) -> tuple[Tensor, Tensor]:
    """By how much scores may be wrong: at most slope * |residual| + constant; (slopes [K], constants [K]).

    `rounding`: by what part one operation rounds, such as 2**-24 in float32. `input_rounding`: by what part the factors
    of a product were rounded together before. `smallest`: below it precision is lost, by default that of float32.

    A sum of d products and an offset, in any order, fused or not, has an error of at most gamma(d + 1) times the sum of
    magnitudes, which is at most the product of norms and the offset (Higham, "Accuracy and Stability of Numerical
    Algorithms", section 3.1). Three more terms and one percent are for the offset's own rounding, for the norm's, and
    for that of a comparison with the bound.
    """
    num_terms = tables.entries_KCd.shape[2] + 4
    relative = 1.01 * (num_terms * rounding / (1.0 - num_terms * rounding) + input_rounding)
    slopes_K = relative * tables.largest_norms_K
    # What is too small vanishes: squares in a norm, and products.
    vanishing_K = 10 * smallest**0.5 * slopes_K + smallest * num_terms
    return slopes_K, relative * tables.largest_offsets_K + vanishing_K


def tie_bounds(tables: SearchTables) -> tuple[Tensor, Tensor]:
    """How far apart two float64 scores may be and still tie, in every implementation: slopes and constants as above."""
    slopes_K, constants_K = error_bounds(tables, 2.0**-53, smallest=1e-300)
    return 2 * slopes_K, 2 * constants_K
