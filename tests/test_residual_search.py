"""The contract of the residual search; letters as in `codec.kernels.residual_search`."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codec
from codec.kernels import blocked_search, numba_search
from codec.kernels.residual_search import (
    SearchTables,
    available_impls,
    resolve_impl,
    rvq_decode,
    rvq_margins,
    rvq_search,
    search_with,
    searches_seen,
)
from codec.kernels.search_tables import error_bounds

FORMS = ("plain", "grouped", "split", "factorised")
FAST = [impl for impl in available_impls() if impl != "reference"]
ROUNDING = 2.0**-24  # of float32


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tables(
    form: str = "plain", num_rows: int = 4, codebook_size: int = 64, dim: int = 8, *, scale: float = 1.0, seed: int = 0
) -> SearchTables:
    """Random ones. Stages get smaller, as in a trained quantizer, so that every row has something to choose."""
    shrink = 0.7 ** torch.arange(num_rows).view(-1, 1, 1)
    codebooks = _normal(num_rows, codebook_size, dim, seed=seed) * shrink * scale
    if form == "plain":
        return SearchTables(codebooks)
    if form == "grouped":
        return SearchTables(codebooks, num_groups=2 if num_rows % 2 == 0 else num_rows)
    if form == "split":
        return SearchTables(codebooks, chains=[0] + [1] * (num_rows - 1))
    takes = []
    for row in range(num_rows):
        first = (row + 1) * dim
        takes.append((first, _normal(codebook_size, num_rows * dim - first, seed=seed + row + 1) * 0.3 * scale))
    return SearchTables(codebooks, chains=range(num_rows), by="direction", takes=takes)


def _same_by_all(latents: Tensor, tables: SearchTables, num_rows: int | None = None) -> Tensor:
    """The codes of the reference, which all implementations must give."""
    expected = rvq_search(latents, tables, num_rows=num_rows, impl="reference")
    assert expected.dtype == torch.int64
    assert expected.shape == (len(latents), num_rows or tables.num_rows)
    for impl in (*FAST, "auto"):
        assert torch.equal(rvq_search(latents, tables, num_rows=num_rows, impl=impl), expected), impl
    return expected


_exponents = st.integers(-20, 20)


@given(
    form=st.sampled_from(FORMS),
    num_latents=st.integers(0, 40),
    codebook_size=st.sampled_from([1, 2, 7, 64, 100, 1024]),
    dim=st.sampled_from([1, 3, 8, 32]),
    num_rows=st.integers(1, 6),
    prefix=st.integers(1, 6),
    exponents=st.tuples(_exponents, _exponents),
    is_uneven=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_all_implementations_give_the_codes_of_the_reference(
    form: str,
    num_latents: int,
    codebook_size: int,
    dim: int,
    num_rows: int,
    prefix: int,
    exponents: tuple[int, int],
    is_uneven: bool,
    seed: int,
) -> None:
    tables = _tables(form, num_rows, codebook_size, dim, scale=10.0 ** exponents[0], seed=seed)
    latents = _normal(num_latents, tables.num_dims, seed=seed + 50) * 10.0 ** exponents[1 if is_uneven else 0]
    if is_uneven and num_latents:  # each row at a scale of its own
        latents *= 10.0 ** torch.linspace(-10, 10, num_latents)[:, None]
    codes = _same_by_all(latents, tables, min(prefix, num_rows))
    assert codes.numel() == 0 or (codes.min() >= 0 and codes.max() < codebook_size)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_many_blocks(num_threads: int, form: str) -> None:
    tables = _tables(form, 4, 1024, 8)
    latents = _normal(1100, tables.num_dims, seed=5)
    whole = _same_by_all(latents, tables)
    for num_latents in (511, 512, 513, 1024, 1025):
        assert torch.equal(_same_by_all(latents[:num_latents], tables), whole[:num_latents])
    assert torch.equal(rvq_search(latents, tables), whole)  # and once more


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9), form=st.sampled_from(FORMS))
@settings(max_examples=40)
def test_codes_do_not_depend_on_the_rows_beside_them(sizes: list[int], form: str) -> None:
    tables = _tables(form)
    latents = _normal(sum(sizes), tables.num_dims, seed=1)
    whole = _same_by_all(latents, tables)
    for impl in available_impls():
        for parts in (latents.split(sizes), latents.split(1)):
            codes = [rvq_search(part, tables, impl=impl) for part in parts]
            assert torch.equal(torch.cat([*codes, whole[:0]]), whole), impl


def _direct_scores(residual_Nd: np.ndarray, entries_Cd: np.ndarray, *, is_distance: bool) -> np.ndarray:
    """What is best is largest: minus squared distances, or cosines times length, in the widest floats."""
    residual, entries = residual_Nd.astype(np.longdouble)[:, None], entries_Cd.astype(np.longdouble)
    return -np.square(residual - entries).sum(-1) if is_distance else (residual * entries).sum(-1)


@pytest.mark.parametrize("by", ["distance", "direction"])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_takes_the_best_entry_of_what_is_left(form: str, by: str) -> None:
    made = _tables(form, 6, 100, 8)
    takes = made.takes if form == "factorised" else None
    tables = SearchTables(made.entries_KCd, chains=made.chains, by=by, takes=takes)
    latents = _normal(60, tables.num_dims, seed=2) * 10.0 ** torch.linspace(-3, 3, 60)[:, None]
    codes = rvq_search(latents, tables, impl="reference").numpy()
    residual, dim = latents.numpy().copy(), 8
    for row, chain in enumerate(tables.chains):
        seen = residual[:, chain * dim : (chain + 1) * dim]
        scores = _direct_scores(seen, tables.entries_KCd[row].numpy(), is_distance=by == "distance")
        regrets = scores.max(1) - scores[np.arange(60), codes[:, row]]
        assert (regrets <= 1e-12 * np.abs(scores).max(1)).all()
        first, table = tables.takes[row]
        residual[:, first : first + table.shape[1]] -= table.numpy()[codes[:, row]]
        if takes is None:
            expected = tables.entries_KCd[row].numpy()[codes[:, row]]
            assert np.array_equal(seen, residual[:, chain * dim : (chain + 1) * dim])  # a view
            assert np.array_equal(table.numpy()[codes[:, row]], expected)
            assert first == chain * dim


@given(
    data=st.data(),
    num_rows=st.integers(1, 3),
    codebook_size=st.integers(1, 40),
    dim=st.integers(1, 4),
    power=st.sampled_from([-60, 0, 50]),
)
@settings(max_examples=100)
def test_the_lowest_index_wins_exact_ties(
    data: st.DataObject, num_rows: int, codebook_size: int, dim: int, power: int
) -> None:
    """On a lattice everything is exact, so integers say which entry it is; most rows have several that are nearest."""
    seed, num_latents = data.draw(st.integers(0, 999)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(seed)
    entries, points = (rng.integers(-2, 3, size) for size in ((num_rows, codebook_size, dim), (num_latents, dim)))
    points[0] = 0
    scale = 2.0**power
    tables = SearchTables(torch.from_numpy(entries).float() * scale)
    codes = _same_by_all(torch.from_numpy(points).float() * scale, tables)
    left = points.copy()
    for row in range(num_rows):
        expected = np.square(left[:, None] - entries[row]).sum(-1).argmin(1)
        assert codes[:, row].tolist() == expected.tolist()
        left -= entries[row, expected]


def test_ties_of_duplicates_zeros_and_signs() -> None:
    entries = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    latents = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -100.0], [-0.0, 0.0]])
    for by in ("distance", "direction"):
        tables = SearchTables(entries[None], by=by)
        for part in (latents, latents[:1], latents.repeat(9, 1)):
            codes = _same_by_all(part, tables)[:4, 0].tolist()
            expected = [1, 1, 1, 1] if by == "distance" else [1, 0, 1, 0]
            assert codes == expected[: len(part)]
    random = _normal(1, 64, 32, seed=3)
    tables = SearchTables(random.repeat(1, 3, 1))  # every entry three times
    latents = _normal(40, 32, seed=4)
    assert _same_by_all(latents, tables).max() < 64
    assert torch.equal(rvq_search(latents, tables), rvq_search(latents, SearchTables(random)))


def test_ties_that_float64_would_break_at_random() -> None:
    """Entries with the same values in other orders are equally far from what has equal values; sums round otherwise."""
    values = _normal(32, seed=1) * 10.0 ** torch.linspace(-2, 0, 32)
    orders = [torch.randperm(32, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    codebook = torch.cat([torch.full((1, 32), 50.0), torch.stack([values[order] for order in orders])])
    latents = _normal(30, 1, seed=2).expand(30, 32)
    scores = latents.double() @ codebook[1:].double().T
    assert (scores.argmax(1) > 0).any()  # as if another one than the first were the best
    for part in (latents, latents[:1], latents[:7]):
        assert _same_by_all(part, SearchTables(codebook[None])).unique().tolist() == [1]


def test_near_ties_come_out_as_exact_arithmetic_says() -> None:
    """Entries in pairs that differ by the last bit of one value, in every size of batch."""
    entries = _normal(32, 8, seed=7)
    bumped = entries.clone()
    places = torch.arange(32) % 8
    values = entries[torch.arange(32), places]
    bumped[torch.arange(32), places] = torch.nextafter(values, torch.full_like(values, torch.inf))
    codebook = torch.stack([entries, bumped], dim=1).flatten(0, 1)[torch.randperm(64, generator=torch.manual_seed(0))]
    latents = entries + 0.3 * _normal(32, 8, seed=8)

    def distances(latent: Tensor) -> list[Fraction]:
        return [
            sum(
                ((Fraction(x) - Fraction(e)) ** 2 for x, e in zip(latent.tolist(), entry.tolist(), strict=True)),
                Fraction(0),
            )
            for entry in codebook
        ]

    expected, num_near = [], 0
    for latent in latents:
        exact = distances(latent)
        best, second = sorted(exact)[:2]
        assert second - best > Fraction(1e-13) * best  # far more than float64 rounds
        num_near += second - best < Fraction(3e-7) * best
        expected.append(exact.index(best))
    assert num_near > 16  # closer than float32 can tell
    tables = SearchTables(codebook[None])
    for num_latents in range(1, 33):
        assert _same_by_all(latents[:num_latents], tables)[:, 0].tolist() == expected[:num_latents]
    for impl in available_impls():
        assert [int(rvq_search(latent[None], tables, impl=impl)) for latent in latents] == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
@pytest.mark.parametrize("num_latents", [1, 3, 20])
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_no_numbers_leave_their_neighbours_alone(form: str, num_latents: int, value: float) -> None:
    tables = _tables(form)
    clean = _normal(num_latents, tables.num_dims, seed=1)
    latents = clean.clone()
    latents[num_latents // 2, 2] = value
    codes, unharmed = _same_by_all(latents, tables), _same_by_all(clean, tables)
    keep = torch.arange(num_latents) != num_latents // 2
    assert torch.equal(codes[keep], unharmed[keep])
    if value != value:  # NaN in the first chain: its rows get code 0, and another chain's are what they would be
        of_first_chain = torch.tensor(tables.chains) == 0
        assert codes[num_latents // 2][of_first_chain].tolist() == [0] * int(of_first_chain.sum())
        if form != "factorised":
            rest = ~of_first_chain
            assert torch.equal(codes[num_latents // 2][rest], unharmed[num_latents // 2][rest])
    latents[:] = value
    _same_by_all(latents, tables)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [3e18, 1e19, 3e19])
def test_sums_too_large_for_float32(form: str, scale: float) -> None:
    """The nearest entry's own square may overflow, and then it must not lose, nor another one win, by that."""
    tables = _tables(form, 3, 64, 4, scale=scale)
    latents = _normal(150, tables.num_dims, seed=1) * scale
    codes = _same_by_all(latents, tables)
    for impl in available_impls():
        assert torch.equal(torch.cat([rvq_search(row, tables, impl=impl) for row in latents.split(1)]), codes)
    if form != "factorised":
        small = _tables(form, 3, 64, 4)
        differing = (
            codes[:, 0] != rvq_search(latents / scale, small)[:, 0]
        )  # rounded otherwise, where it is no power of 2
        assert differing.sum() <= 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e30])
def test_a_nan_never_wins_and_other_strange_entries_change_nothing_between_implementations(value: float) -> None:
    codebooks = _normal(2, 20, 4, seed=1)
    codebooks[0, 5] = codebooks[0, 0]  # never chosen, for the first one is as near
    latents = _normal(20, 4, seed=2)
    expected = rvq_search(latents, SearchTables(codebooks))
    codebooks[0, 5] = value
    codes = _same_by_all(latents, SearchTables(codebooks))
    if value != value:
        assert torch.equal(codes, expected)


def test_every_layout_and_dtype_of_latents() -> None:
    tables = _tables(dim=8)
    latents = _normal(20, 8, seed=1)
    expected = _same_by_all(latents, tables)
    layouts = [latents.T.contiguous().T, latents.repeat_interleave(2, 0)[::2], torch.cat([latents, latents], 1)[:, :8]]
    assert not any(laid_out.is_contiguous() for laid_out in layouts)
    for laid_out in layouts:
        before = laid_out.clone()
        assert torch.equal(_same_by_all(laid_out, tables), expected)
        assert torch.equal(_same_by_all(laid_out[:2], tables), expected[:2])
        assert torch.equal(laid_out, before)  # it is not written to
    assert torch.equal(_same_by_all(latents[:1].expand(9, 8), tables), expected[:1].expand(9, -1))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(_same_by_all(latents.to(dtype), tables), rvq_search(latents.to(dtype).float(), tables))
    with torch.inference_mode():
        assert torch.equal(_same_by_all(latents.clone(), tables), expected)
    wanting = latents.clone().requires_grad_()
    assert not _same_by_all(wanting, tables).requires_grad


def test_float64_is_computed_in_float64() -> None:
    """Latents closer to one of two entries than float32 can tell."""
    codebook = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    latents = torch.tensor([[-1e-12, 7.0], [1e-12, 7.0]], dtype=torch.float64)
    for tables in (SearchTables(codebook), SearchTables(codebook.double())):
        for rows in (latents, latents[:1], latents.repeat(5, 1)):
            assert rvq_search(rows, tables)[:2, 0].tolist() == [1, 0][: len(rows)]
    # Entries that float32 cannot tell apart, for latents that are float32.
    codebook = torch.tensor([[[1.0 + 1e-12], [1.0]]], dtype=torch.float64)
    assert rvq_search(torch.tensor([[2.0], [0.0]]), SearchTables(codebook))[:, 0].tolist() == [0, 1]
    for impl in FAST:
        with pytest.raises(ValueError, match="float32"):
            rvq_search(latents, SearchTables(codebook.expand(1, 2, 2)), impl=impl)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form: str) -> None:
    tables = _tables(form, dim=32)
    latents = _normal(40, tables.num_dims, seed=1)
    expected = _same_by_all(latents, tables)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_same_by_all(latents, tables), expected)
        assert torch.equal(_same_by_all(latents, _tables(form, dim=32)), expected)


@pytest.fixture(params=["high", "medium"])
def rough_products(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", FORMS)
def test_products_of_lower_precision_change_nothing(rough_products: str, form: str) -> None:
    tables = _tables(form, 4, 256, 32)
    latents = _normal(600, tables.num_dims, seed=1)
    codes = _same_by_all(latents, tables)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(_same_by_all(latents, tables), codes)


@pytest.mark.parametrize("form", FORMS)
def test_products_as_rough_as_they_may_be(rough_products: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every processor has rough products, so they are made here: TF32 keeps 10 bits, bfloat16 7."""
    exact_addmm, num_lost = torch.addmm, {"high": 13, "medium": 16}[rough_products]

    def rough(values: Tensor) -> Tensor:
        kept = (values.contiguous().view(torch.int32) + (1 << (num_lost - 1))) & -(1 << num_lost)
        return kept.view(torch.float32)

    def addmm(offsets: Tensor, left: Tensor, right: Tensor, **more: Any) -> Tensor:
        factors = (left, right) if left.dtype == torch.float64 else (rough(left), rough(right))
        return exact_addmm(offsets, *factors, **more)

    tables = _tables(form, 4, 256, 32)
    latents = _normal(600, tables.num_dims, seed=1)
    monkeypatch.setattr(torch, "addmm", addmm)
    with monkeypatch.context() as patch:
        searched_again = _count_calls(patch, "_search_one")
        assert blocked_search.search(latents, tables, 4)[1] is None
    assert 0 < searched_again[0] <= 600
    _same_by_all(latents, tables)


def _count_calls(patch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How often a function of `blocked_search` is called from now on."""
    function, count = getattr(blocked_search, name), [0]

    def counted(*args: Any) -> Any:
        count[0] += 1
        return function(*args)

    patch.setattr(blocked_search, name, counted)
    return count


@pytest.mark.parametrize(
    ("form", "dim", "most"), [("plain", 128, 0.02), ("factorised", 8, 0.005), ("grouped", 64, 0.01)]
)
@pytest.mark.parametrize("num_latents", [1, 2000])
def test_few_choices_are_close(
    form: str, dim: int, most: float, num_latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the fast path would be a detour. Measured in bulk: 0.6 %, 0.1 % and 0.2 % of rows."""
    tables = _tables(form, 8, 1024, dim)
    latents = _normal(2000, tables.num_dims, seed=1)
    num_close = _count_calls(monkeypatch, "_nearest")
    num_rows = 0
    for part in latents.split(num_latents)[:300]:
        num_rows += len(part)
        assert blocked_search.search(part, tables, 8)[1] is None
    assert num_close[0] <= most * num_rows
    assert num_close[0] > 0 or num_latents == 1


def test_auto_compiles_nothing_and_takes_what_was_compiled_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_search, "_is_compiled", False)
    frame, frames = torch.zeros(1, 4), torch.zeros(9, 4)
    assert resolve_impl("auto", frame) == "blocked"
    codec.compile_search()
    assert resolve_impl("auto", frame) == "numba"
    assert resolve_impl("auto", frames) == "blocked"
    assert resolve_impl("auto", frame.double()) == "reference"


@pytest.mark.parametrize("num_latents", [1, 100])
def test_a_near_tie_that_float32_decides_wrongly_is_decided_again(
    num_latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first row, so that all rows after it have to be searched once more."""
    tables = _tables("plain", 4, 64, 16)
    latents = _normal(100, tables.num_dims, seed=2)[:num_latents]
    expected = rvq_search(latents, tables, impl="reference")
    arrays = tables.prepared("arrays", blocked_search._Arrays)
    # An offset that is wrong by less than the bound, for an entry that is nearly as good as the best.
    for bound in arrays.bounds.values():
        bound[1][:] += 1e3
    offsets = arrays.rows[0].offsets
    offsets[:32] += 400.0
    again = _count_calls(monkeypatch, "_search_one")
    codes, uncertain = blocked_search.search(latents, tables, 4)
    assert uncertain is None
    assert torch.equal(codes, expected)
    assert again[0] > num_latents


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_error_bounds_hold_and_are_not_far_off(input_dtype: torch.dtype) -> None:
    """Scores by torch, by numpy and added up one by one, against the widest floats, at scales good and bad."""
    input_rounding = 0.0 if input_dtype == torch.float32 else 2.0**-7
    tightest = 0.0
    for trial in range(160):
        rng = np.random.default_rng(trial)
        dim, codebook_size = int(rng.choice([1, 2, 8, 33])), int(rng.choice([1, 16, 50]))
        scales = 10.0 ** rng.uniform(-19, 18, 2)
        entries = rng.standard_normal((1, codebook_size, dim)) * scales[0]
        latents = rng.standard_normal((12, dim)) * scales[1]
        if trial % 3 == 0:  # values of very different size side by side
            entries *= 10.0 ** rng.uniform(-12, 0, entries.shape)
            latents *= 10.0 ** rng.uniform(-12, 0, latents.shape)
        if trial % 3 == 1:  # the best entry is close by, and the offset as large as the product
            latents[:] = entries[0, rng.integers(0, codebook_size, 12)] * (1 + 1e-4 * rng.standard_normal((12, 1)))
        rows_nd, tables = torch.from_numpy(latents).float(), SearchTables(torch.from_numpy(entries).float())
        entries_Cd, offsets_C = tables.entries_KCd[0], tables.exact_offsets_KC[0].float()
        with np.errstate(all="ignore"):
            exact = rows_nd.numpy().astype(np.longdouble) @ entries_Cd.numpy().astype(np.longdouble).T
            exact += np.square(entries_Cd.numpy().astype(np.longdouble)).sum(1) / -2
            rough_nd, rough_Cd = _rounded(rows_nd, input_dtype), _rounded(entries_Cd, input_dtype)
            one_by_one = offsets_C.expand(12, -1).clone()
            for i in range(dim):
                one_by_one += rough_nd[:, i, None] * rough_Cd[:, i]
            found = [
                torch.addmm(offsets_C, rough_nd, rough_Cd.T).numpy(),
                np.stack([rough_Cd.numpy() @ row for row in rough_nd.numpy()]) + offsets_C.numpy(),
                one_by_one.numpy(),
            ]
            slopes, constants = error_bounds(tables, ROUNDING, input_rounding=input_rounding)
            norms = np.sqrt(np.square(rows_nd.numpy()).sum(1))  # as the search has them: in float32
            bounds = slopes.numpy()[0] * norms.astype(np.float64) + constants.numpy()[0]
            for scores in found:
                is_finite = np.isfinite(scores)
                errors = np.abs(scores - exact)
                assert (errors <= bounds[:, None])[is_finite].all(), trial
                tightest = max(tightest, float((errors / bounds[:, None])[is_finite].max(initial=0.0)))
    assert tightest > 0.05  # a bound a twentieth as large would not hold


def test_margins() -> None:
    tables = SearchTables(torch.tensor([[[0.0], [4.0], [10.0]], [[-1.0], [1.0], [5.0]]]))
    latents = torch.tensor([[1.0], [2.0], [3.0]])
    codes = rvq_search(latents, tables)
    assert codes.tolist() == [[0, 1], [0, 1], [1, 0]]
    # Squared distances: 1 and 9, then 0 and 4 (nothing is left: no part is large enough); a tie; 1 and 9 again.
    margins = rvq_margins(latents, tables, codes)
    assert margins.dtype == torch.float64
    assert margins[:, 0].tolist() == [8.0, 0.0, 8.0]
    assert margins[1, 1] == 8.0
    assert margins[[0, 2], 1].min() > 1e100
    assert torch.equal(rvq_margins(latents, tables, codes[:, :1]), margins[:, :1])
    wrong = codes.clone()
    wrong[0, 0] = 1  # at 9, where the best is at 1
    assert rvq_margins(latents, tables, wrong)[0, 0] == pytest.approx(-8 / 9)
    by_direction = SearchTables(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]]), by="direction")
    latents = torch.tensor([[3.0, 4.0]])
    # Cosines 0.6, 0.8, -0.6: the next best is further off by 0.4 - 0.2, and that is as much as the best is off.
    assert rvq_search(latents, by_direction).item() == 1
    assert rvq_margins(latents, by_direction, torch.tensor([[1]])).item() == pytest.approx(1.0)


@given(form=st.sampled_from(FORMS), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_margins_are_those_of_plain_distances(form: str, seed: int) -> None:
    tables = _tables(form, 3, 20, 4, seed=seed)
    latents = _normal(9, tables.num_dims, seed=seed + 50)
    codes = rvq_search(latents, tables)
    residual = latents.numpy().copy()
    for row, (chain, margins) in enumerate(zip(tables.chains, rvq_margins(latents, tables, codes).T, strict=True)):
        seen, entries = residual[:, 4 * chain : 4 * chain + 4].astype(float), tables.entries_KCd[row].numpy()
        if tables.is_distance:
            costs = np.square(seen[:, None] - entries).sum(-1)
        else:
            costs = 1 - seen @ entries.T.astype(float) / np.linalg.norm(seen, axis=1, keepdims=True)
        best, second = np.sort(costs, axis=1)[:, :2].T
        np.testing.assert_allclose(margins.numpy(), (second - best) / best, rtol=1e-6, atol=1e-9)
        first, table = tables.takes[row]
        residual[:, first : first + table.shape[1]] -= table.numpy()[codes[:, row].numpy()]


def test_one_can_choose_the_implementation_and_watch_the_searches() -> None:
    tables, latents = _tables(), _normal(5, 8)
    assert resolve_impl("auto") == "blocked"
    with searches_seen() as searches:
        codes = rvq_search(latents, tables)
        with search_with("reference"):
            assert resolve_impl("auto") == "reference"
            assert resolve_impl("blocked") == "blocked"  # what is asked for by name is what one gets
            rvq_search(latents[:2], tables, num_rows=3)
            with search_with("auto"):
                assert resolve_impl("auto") == "blocked"
            assert resolve_impl("auto") == "reference"
        assert resolve_impl("auto") == "blocked"
    rvq_search(latents, tables)  # nobody looks any more
    assert [search.codes_NK.shape for search in searches] == [(5, 4), (2, 3)]
    assert torch.equal(searches[0].codes_NK, codes)
    assert torch.equal(searches[0].latents_ND, latents)
    assert searches[0].tables is tables
    assert torch.equal(rvq_margins(*searches[0]), rvq_margins(latents, tables, codes))
    with pytest.raises(ValueError, match="'warp' is not available"), search_with("warp"):
        raise AssertionError


def test_decode_sums_the_chosen_entries_and_leaves_out_absent_ones() -> None:
    codebooks = torch.arange(2 * 2 * 3 * 2, dtype=torch.float32).view(4, 3, 2)
    codes = torch.tensor([[0, 1, 2, -1], [-1, -1, -1, -1]])
    expected = torch.zeros(2, 4)
    expected[0, :2] = codebooks[0, 0] + codebooks[2, 2]
    expected[0, 2:] = codebooks[1, 1]
    assert torch.equal(rvq_decode(codes, codebooks, num_groups=2), expected)
    assert torch.equal(rvq_decode(codes[:, :2], codebooks, num_groups=2)[0, 2:], codebooks[1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebooks_KCd": torch.zeros(2, 4)}, "expected codebooks"),
        ({"codebooks_KCd": torch.zeros(2, 0, 4)}, "expected codebooks"),
        ({"by": "length"}, "neither 'distance' nor 'direction'"),
        ({"num_groups": 2}, "whole stages of 2 groups"),
        ({"num_groups": 0}, "whole stages of 0 groups"),
        ({"chains": [0, 0]}, "for each of 3 codebooks"),
        ({"chains": [0, -1, 0]}, "for each of 3 codebooks"),
        ({"takes": [(0, torch.zeros(5, 4))]}, "for each of 3 codebooks"),
        ({"takes": [(1, torch.zeros(5, 4))] * 3}, "takes dims 1..5 of 4"),
        ({"takes": [(-1, torch.zeros(5, 4))] * 3}, "takes dims -1..3 of 4"),
        ({"takes": [(0, torch.zeros(4, 4))] * 3}, "of 5 entries takes one of 4 vectors"),
    ],
)
def test_tables_that_do_not_fit_are_value_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchTables(**({"codebooks_KCd": torch.zeros(3, 5, 4)} | arguments))  # type: ignore[arg-type]


def test_callers_mistakes_are_value_errors() -> None:
    tables = SearchTables(torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match=r"'warp' is not available \(there is: auto, reference"):
        rvq_search(torch.zeros(1, 4), tables, impl="warp")
    for shape in ((1, 5), (4,), (1, 1, 4)):
        with pytest.raises(ValueError, match=r"expected latents \[N, 4\]"):
            rvq_search(torch.zeros(shape), tables)
    for num_rows in (0, 4, -1):
        with pytest.raises(ValueError, match=r"is not in 1\.\.3"):
            rvq_search(torch.zeros(1, 4), tables, num_rows=num_rows)
