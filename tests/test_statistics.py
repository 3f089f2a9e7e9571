"""Sums of rows by code, which `triton_cases.py` compares with those of a GPU."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from codec.kernels.statistics import sums_by_code


@given(num_rows=st.integers(0, 30), dim=st.integers(1, 4), codebook_size=st.sampled_from([1, 2, 20]))
def test_rows_are_added_one_after_the_other_to_the_sum_of_their_code(
    num_rows: int, dim: int, codebook_size: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, dim, generator=generator) * 10.0 ** torch.linspace(-6, 6, num_rows)[:, None]
    codes = torch.randint(-1, codebook_size, (num_rows,), generator=generator)
    counts, sums = sums_by_code(rows, codes, codebook_size)
    expected = torch.zeros(codebook_size, dim)
    for row, code in zip(rows, codes, strict=True):
        if code >= 0:
            expected[code] += row
    assert torch.equal(sums, expected)
    assert counts.dtype == rows.dtype
    assert counts.tolist() == [(codes == code).sum().item() for code in range(codebook_size)]
