import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.kernels.residual_search import resolve_impl, rvq_decode, rvq_search


def _regret_and_margin(
    latents: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rule 3, in float64 along the given codes: relative excess, relative margin of the runner-up, best codes."""
    residual = latents.double().reshape(len(latents), num_groups, -1).clone()
    regrets, margins, bests = [], [], []
    for row in range(codes.shape[1]):
        group = row % num_groups
        book = codebooks[row].double()
        distance = (residual[:, group, None] - book[None]).square().sum(-1)
        two = distance.topk(2, largest=False)
        best = two.values[:, 0].clamp_min(1e-30)
        chosen = distance.gather(1, codes[:, row : row + 1])[:, 0]
        regrets.append((chosen - two.values[:, 0]) / best)
        margins.append((two.values[:, 1] - two.values[:, 0]) / best)
        bests.append(two.indices[:, 0])
        residual[:, group] -= book[codes[:, row]]
    return torch.stack(regrets, 1), torch.stack(margins, 1), torch.stack(bests, 1)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("num_groups", "num_stages"), [(1, 4), (2, 2), (4, 1)])
def test_codes_keep_the_regret_bound(num_threads: int, impl: str, num_groups: int, num_stages: int) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(500, 32, generator=generator)
    scale = torch.tensor([0.7**stage for stage in range(num_stages) for _ in range(num_groups)])
    codebooks = torch.randn(num_stages * num_groups, 256, 32 // num_groups, generator=generator) * scale.view(-1, 1, 1)
    codes = rvq_search(latents, codebooks, num_groups=num_groups, impl=impl)
    regret, margin, best = _regret_and_margin(latents, codebooks, codes, num_groups)
    assert regret.max() <= 1e-5
    assert torch.equal(codes[margin > 1e-5], best[margin > 1e-5])


def test_the_lowest_index_wins_ties() -> None:
    codebooks = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    latents = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -100.0]])
    assert rvq_search(latents, codebooks)[:, 0].tolist() == [1, 1, 1]


def test_a_row_with_nan_gets_code_zero_and_its_neighbours_do_not_mind() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, codebooks = torch.randn(20, 4, generator=generator), torch.randn(3, 8, 4, generator=generator)
    clean = rvq_search(latents, codebooks)
    latents[7, 2] = float("nan")
    codes = rvq_search(latents, codebooks)
    assert codes[7].tolist() == [0, 0, 0]
    keep = torch.arange(20) != 7
    assert torch.equal(codes[keep], clean[keep])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=30)
def test_codes_do_not_depend_on_the_rows_beside_them(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    latents, codebooks = torch.randn(sum(sizes), 16, generator=generator), torch.randn(4, 64, 8, generator=generator)
    parts = [rvq_search(part, codebooks, num_groups=2) for part in latents.split(sizes)]
    assert torch.equal(torch.cat(parts), rvq_search(latents, codebooks, num_groups=2))


def test_decode_sums_the_chosen_entries_and_leaves_out_absent_ones() -> None:
    codebooks = torch.arange(2 * 2 * 3 * 2, dtype=torch.float32).view(4, 3, 2)
    codes = torch.tensor([[0, 1, 2, -1], [-1, -1, -1, -1]])
    expected = torch.zeros(2, 4)
    expected[0, :2] = codebooks[0, 0] + codebooks[2, 2]
    expected[0, 2:] = codebooks[1, 1]
    assert torch.equal(rvq_decode(codes, codebooks, num_groups=2), expected)
    assert torch.equal(rvq_decode(codes[:, :2], codebooks, num_groups=2)[0, 2:], codebooks[1, 1])


def test_callers_mistakes_are_value_errors() -> None:
    with pytest.raises(ValueError, match="not available"):
        rvq_search(torch.zeros(1, 4), torch.zeros(1, 2, 4), impl="warp")
    with pytest.raises(ValueError, match="do not fit"):
        rvq_search(torch.zeros(1, 5), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="expected latents"):
        rvq_search(torch.zeros(1, 1, 4), torch.zeros(1, 2, 4))
    assert resolve_impl("auto") == "reference"
