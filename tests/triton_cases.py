"""What Triton's kernels compute: on the CPU in Triton's interpreter, or on a GPU.

`test_triton_search.py` runs these in a process of their own, since Triton asks for its interpreter once, when it loads:
TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.kernels import statistics, triton_search, triton_sums
from codec.kernels.residual_search import SearchTables, available_impls, rvq_decode, rvq_reference, rvq_search
from codec.kernels.search_tables import error_bounds

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
FORMS = ("plain", "grouped", "split", "factorised")
WAYS = ("few", "many")

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter: what is no number
    pytest.mark.skipif(
        not IS_INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
    ),
]
only_on_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="too large for the interpreter")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tables(
    form: str = "plain", num_rows: int = 4, codebook_size: int = 16, dim: int = 8, seed: int = 0
) -> SearchTables:
    """Random ones. Stages get smaller, as in a trained quantizer, so that every row has something to choose."""
    codebooks = (_normal(num_rows, codebook_size, dim, seed=seed) * 0.7 ** torch.arange(num_rows).view(-1, 1, 1)).to(
        DEVICE
    )
    if form == "plain":
        return SearchTables(codebooks)
    if form == "grouped":
        return SearchTables(codebooks, num_groups=2 if num_rows % 2 == 0 else num_rows)
    if form == "split":
        return SearchTables(codebooks, chains=[0] + [1] * (num_rows - 1))
    takes = []
    for row in range(num_rows):
        first = (row + 1) * dim
        table = _normal(codebook_size, num_rows * dim - first, seed=seed + row + 1) * 0.3
        takes.append((first, table.to(DEVICE)))
    return SearchTables(codebooks, chains=range(num_rows), by="direction", takes=takes)


def _found(
    way: str, latents: Tensor, tables: SearchTables, num_rows: int | None = None, precision: str = "ieee"
) -> Tensor:
    """The codes, found in one of the ways, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_search, "FEW_ROWS", len(latents) if way == "few" else 0)
        patch.setattr(triton_search, "FEW_BYTES", 0)
        codes, uncertain = triton_search.search(
            latents.to(DEVICE), tables, num_rows or tables.num_rows, precision=precision
        )
    assert uncertain is None
    return codes.cpu()


def _check(
    way: str, latents: Tensor, tables: SearchTables, num_rows: int | None = None, precision: str = "ieee"
) -> Tensor:
    expected = rvq_reference(latents.to(DEVICE), tables, num_rows=num_rows).cpu()
    codes = _found(way, latents, tables, num_rows, precision)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected)
    return codes


@pytest.mark.parametrize(
    ("way", "most_rows", "sizes"), [("few", 2, [1, 2, 7, 9, 17]), ("many", 40, [1, 2, 15, 16, 100, 129])], ids=WAYS
)
def test_codes_are_those_of_the_reference(way: str, most_rows: int, sizes: list[int]) -> None:
    @given(
        form=st.sampled_from(FORMS),
        num_latents=st.integers(0, most_rows),
        codebook_size=st.sampled_from(sizes),
        dim=st.sampled_from([1, 3, 8, 20, 32]),
        num_rows=st.integers(1, 4),
        prefix=st.integers(1, 4),
        exponents=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=25)
    def run(
        form: str,
        num_latents: int,
        codebook_size: int,
        dim: int,
        num_rows: int,
        prefix: int,
        exponents: tuple[int, int],
        seed: int,
    ) -> None:
        tables = _tables(form, num_rows, codebook_size, dim, seed)
        latents = _normal(num_latents, tables.num_dims, seed=seed + 50)
        latents *= 10.0 ** torch.linspace(*exponents, max(num_latents, 1))[:num_latents, None]
        _check(way, latents, tables, min(prefix, num_rows))

    run()


@pytest.mark.parametrize("form", FORMS)
def test_ordinary_rows(form: str) -> None:
    tables = _tables(form, 4, 100, 24)
    latents = _normal(40, tables.num_dims, seed=1)
    whole = _check("many", latents, tables)
    assert (whole.amax(0) > 64).all()  # different codes, of every tile
    assert torch.equal(_found("many", latents, tables, 2, precision="tf32x3"), whole[:, :2])


def test_codes_do_not_depend_on_the_rows_beside_them() -> None:
    tables = _tables("grouped", 4, 30)
    latents = _normal(70, tables.num_dims, seed=2)
    whole = _check("many", latents, tables)
    assert torch.equal(_found("many", latents, tables), whole)  # two runs
    assert torch.equal(_found("many", latents[33:], tables), whole[33:])
    assert torch.equal(_found("few", latents[33:35], tables), whole[33:35])


@pytest.mark.parametrize("way", WAYS)
def test_large_blocks_and_slices_of_several_tiles(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_search, "MANY_ROWS", 1)
    monkeypatch.setattr(triton_search, "_FEW_PROGRAMS", 3)
    tables = _tables("plain", 3, 100, 8)
    _check(way, _normal(150 if way == "many" else 1, 8, seed=2), tables)


@pytest.mark.parametrize("way", WAYS)
def test_the_lowest_index_wins_ties(way: str) -> None:
    tables = SearchTables(torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=DEVICE))
    latents = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -100.0]])
    assert _check(way, latents, tables)[:, 0].tolist() == [1, 1, 1]
    assert _check(way, torch.zeros(2, 3), SearchTables(torch.zeros(2, 20, 3, device=DEVICE))).tolist() == [[0, 0]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_near_ties_come_out_as_float64_says(way: str) -> None:
    # Entries a rounding error of float32 apart, in two tiles; nearer ones have the higher index.
    direction = _normal(32, seed=4)
    steps = torch.arange(140, 0, -1.0, dtype=torch.float64)
    entries = (direction.double() * (1 + 2.0**-23 * steps[:, None])).float()
    num_latents = 20 if way == "many" else 1
    latents = direction * torch.linspace(1, 1 + 2.0**-16, num_latents)[:, None]
    codes = _check(way, latents, SearchTables(entries[None].to(DEVICE)))
    assert way == "few" or len(codes.unique()) > 5


@pytest.mark.parametrize("distance", [1, 5, 128, 133])  # in one lane of a tile, in two; in the same lanes of two tiles
def test_near_ties_are_found_wherever_they_are(distance: int) -> None:
    entries = _normal(200, 32, seed=5)
    entries[20 + distance] = torch.nextafter(entries[20], torch.tensor(torch.inf))
    latents = entries[20] + 0.01 * _normal(40, 32, seed=6)
    codes = _check("many", latents, SearchTables(entries[None].to(DEVICE)))
    assert set(codes.flatten().tolist()) == {20, 20 + distance}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_number_gets_code_zero_and_its_neighbours_do_not_mind(way: str) -> None:
    tables = _tables("grouped", 4, 7, 4)
    latents = _normal(6, 8, seed=3)
    clean = _check(way, latents, tables)
    bad = latents.clone()
    bad[1, 2], bad[2, 6], bad[3], bad[5, 0] = float("nan"), float("inf"), float("-inf"), 3e38
    codes = _check(way, bad, tables)
    assert codes[1, [0, 2]].tolist() == [0, 0]
    assert torch.equal(codes[1, [1, 3]], clean[1, [1, 3]])  # the other group
    assert torch.equal(codes[[0, 4]], clean[[0, 4]])
    # A product beyond float32, whose score is not.
    large = torch.tensor([[[2.4e19, 0.0], [1.6e19, 0.0]]], device=DEVICE)
    assert _check(way, torch.tensor([[1.5e19, 0.0]]), SearchTables(large)).tolist() == [[1]]
    entries = _normal(1, 7, 4).to(DEVICE)
    entries[0, 2], entries[0, 4, 1] = float("nan"), float("inf")
    _check(way, latents[:, :4], SearchTables(entries))


def test_by_name_and_from_any_memory() -> None:
    assert {"triton", "triton_tf32x3"} <= set(available_impls(DEVICE))
    tables = _tables("grouped", 4, 20, 4)
    latents = _normal(8, 70, seed=6).to(DEVICE).t()  # not contiguous
    expected = rvq_reference(latents, tables)
    before = latents.clone()
    for impl in ("triton", "triton_tf32x3"):
        assert torch.equal(rvq_search(latents, tables, impl=impl), expected)
        assert torch.equal(rvq_search(latents[::31], tables, num_rows=2, impl=impl), expected[::31, :2])
    assert torch.equal(latents, before)
    assert rvq_search(latents[:0], tables, impl="triton").shape == (0, 4)


def test_bounds_hold_on_tensor_cores() -> None:
    """A model of them: 8 products are cut off below the last bit of the largest, or of their sum so far."""

    def cut(values: np.ndarray, exponents: np.ndarray, num_bits: int) -> np.ndarray:
        unit = np.exp2(exponents - float(num_bits))
        return np.trunc(values / unit) * unit

    def tf32(values: np.ndarray) -> np.ndarray:
        return cut(values, np.frexp(values)[1], 11)

    generator = np.random.default_rng(0)
    # All of one sign, so that errors add up.
    chain = np.abs(generator.standard_normal((40, 128))).astype(np.float32).astype(np.float64)
    entries = np.abs(generator.standard_normal((60, 128))).astype(np.float32).astype(np.float64)
    parts = [(tf32(values), tf32(values - tf32(values))) for values in (chain, entries)]
    (chain_high, chain_low), (entries_high, entries_low) = parts
    scores = np.zeros((40, 60))
    for dims in np.arange(128).reshape(-1, 32):
        sums = np.zeros((40, 60))
        for left, right in ((chain_low, entries_high), (chain_high, entries_low), (chain_high, entries_high)):
            for eight in dims.reshape(-1, 8):
                terms = np.concatenate([left[:, None, eight] * right[None, :, eight], sums[:, :, None]], 2)
                terms = cut(terms, np.frexp(np.abs(terms).max(2, keepdims=True))[1], 24).sum(2)
                sums = cut(terms, np.frexp(terms)[1], 24)
        scores = (scores + sums).astype(np.float32).astype(np.float64)
    tables = SearchTables(torch.from_numpy(entries)[None], by="distance")
    rounding, input_rounding = triton_search._ROUNDINGS["tf32x3"]
    slope, constant = error_bounds(tables, rounding, input_rounding=input_rounding)
    bounds = slope.item() * np.linalg.norm(chain, axis=1)[:, None] + constant.item()
    errors = np.abs(scores - chain @ entries.T)
    assert (errors <= bounds).all()
    assert (errors > bounds / 100).any()


@given(
    num_latents=st.integers(0, 40),
    num_groups=st.integers(1, 3),
    num_stages=st.integers(1, 3),
    num_given=st.integers(1, 3),
    codebook_size=st.sampled_from([1, 7, 20]),
    dim=st.sampled_from([1, 5, 16, 130]),
    are_absent=st.booleans(),
)
@settings(max_examples=25)
def test_decode_has_the_bits_of_the_cpu(
    num_latents: int,
    num_groups: int,
    num_stages: int,
    num_given: int,
    codebook_size: int,
    dim: int,
    are_absent: bool,
) -> None:
    codebooks = _normal(num_groups * num_stages, codebook_size, dim)
    generator = torch.Generator().manual_seed(1)
    size = (num_latents, num_groups * min(num_given, num_stages))
    codes = torch.randint(-1 if are_absent else 0, codebook_size, size, generator=generator)
    latents = triton_sums.decode(codes.to(DEVICE), codebooks.to(DEVICE), num_groups=num_groups)
    assert torch.equal(latents.cpu(), rvq_decode(codes, codebooks, num_groups=num_groups))


@pytest.mark.parametrize(("num_rows", "dim"), [(0, 3), (1, 3), (37, 1), (100, 130)])
def test_sums_by_code_have_the_bits_of_the_cpu(num_rows: int, dim: int) -> None:
    rows = _normal(num_rows, dim) * 10.0 ** torch.linspace(-8, 8, num_rows)[:, None]
    codes = torch.randint(-1, 9, (num_rows,), generator=torch.Generator().manual_seed(2))
    codes[codes == 3] = 4
    counts, sums = statistics.sums_by_code(rows, codes, 9)
    found = triton_sums.sums_by_code(rows.to(DEVICE), codes.to(DEVICE), 9)
    assert torch.equal(found[0].cpu(), counts)
    assert torch.equal(found[1].cpu(), sums)


@only_on_gpu
@pytest.mark.parametrize("impl", ["triton", "triton_tf32x3"])
@pytest.mark.parametrize(
    ("form", "num_latents", "num_rows", "codebook_size", "dim"),
    [
        ("plain", 100_000, 8, 1024, 128),
        ("plain", 20_000, 32, 1024, 128),
        ("plain", 3_000, 8, 1024, 128),
        ("grouped", 50_000, 8, 1024, 64),
        ("split", 5_000, 32, 2048, 256),
        ("factorised", 50_000, 9, 1024, 8),
        ("factorised", 64, 32, 1000, 8),
        ("plain", 64, 8, 1024, 128),
    ],
)
def test_full_size(impl: str, form: str, num_latents: int, num_rows: int, codebook_size: int, dim: int) -> None:
    tables = _tables(form, num_rows, codebook_size, dim)
    latents = _normal(num_latents, tables.num_dims, seed=7).to(DEVICE)
    codes = rvq_search(latents, tables, impl=impl)
    # A part, for the reference takes long; of the rest, that it does not depend on the rows beside it.
    assert torch.equal(codes[:3000], rvq_reference(latents[:3000], tables))
    assert torch.equal(rvq_search(latents, tables, impl=impl), codes)
    assert torch.equal(rvq_search(latents[num_latents // 2 :], tables, impl=impl), codes[num_latents // 2 :])
    if form == "plain":
        decoded = rvq_decode(codes[:3000], tables.entries_KCd)
        assert torch.equal(decoded.cpu(), rvq_decode(codes[:3000].cpu(), tables.entries_KCd.cpu()))


@only_on_gpu
@pytest.mark.parametrize("num_latents", [1, 3000])
def test_a_cuda_graph_holds_search_and_decode(num_latents: int) -> None:
    tables = _tables("plain", 8, 1024, 128)
    latents = _normal(num_latents, 128).to(DEVICE)
    rvq_decode(rvq_search(latents, tables, impl="triton"), tables.entries_KCd)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = rvq_search(latents, tables, impl="triton")
        decoded = rvq_decode(codes, tables.entries_KCd)
    latents.copy_(_normal(num_latents, 128, seed=1))
    graph.replay()
    expected = rvq_reference(latents, tables)
    assert torch.equal(codes, expected)
    assert torch.equal(decoded, rvq_decode(expected, tables.entries_KCd))
