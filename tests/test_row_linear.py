import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.kernels.row_linear import row_linear

SHAPES = [
    (6, 4),
    (9, 3),
    (37, 1),
    (127, 11),
    (65, 15),
    (8, 24),
    (48, 64),
    (64, 256),
    (256, 64),
    (256, 128),
    (128, 512),
    (512, 128),
    (512, 256),
    (256, 1024),
    (1024, 256),
    (37, 53),
]


@pytest.mark.parametrize(("in_channels", "out_channels"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_comes_with_it(
    num_threads: int, in_channels: int, out_channels: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(in_channels)
    rows = torch.randn(700, in_channels, generator=generator)
    weight = torch.randn(out_channels, in_channels, generator=generator)
    bias = torch.randn(out_channels, generator=generator) if with_bias else None
    whole = row_linear(rows, weight, bias)
    for num_rows in [1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 50, 63, 64, 65, 95, 97, 500]:
        for first in (0, 1, 7, 101):
            part = row_linear(rows[first : first + num_rows], weight, bias)
            assert torch.equal(part, whole[first : first + num_rows]), (num_rows, first)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12))
@settings(max_examples=50)
@torch.inference_mode()
def test_any_cut_of_a_batch_gives_the_same_bits(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 64, generator=generator)
    weight = torch.randn(96, 64, generator=generator)
    parts = [row_linear(part, weight) for part in rows.split(sizes)]
    assert torch.equal(torch.cat(parts), row_linear(rows, weight))


@torch.inference_mode()
def test_it_is_a_linear_layer(num_threads: int) -> None:
    x, weight, bias = torch.randn(2, 5, 7, 24).double(), torch.randn(10, 24).double(), torch.randn(10).double()
    # Two orders of summation over 24 terms in float64.
    torch.testing.assert_close(row_linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-13, atol=1e-13)
    assert row_linear(x[:0], weight, bias).shape == (0, 5, 7, 10)


def test_gradients_flow_through_it() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    row_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, weight.detach().sum(0).expand(3, 8))
