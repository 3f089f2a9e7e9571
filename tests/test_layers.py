import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.layers.causal import (
    CausalLayer,
    ConvNeXtBlock,
    DepthwiseConv,
    Downsample,
    History,
    Linear,
    Sequential,
    Upsample,
    leaves,
    map_state,
    where_rows,
)

LAYERS: dict[str, tuple[CausalLayer, int]] = {
    "linear": (Linear(6, 10), 1),
    "depthwise": (DepthwiseConv(6, 5), 1),
    "depthwise_pointwise": (DepthwiseConv(6, 1), 1),
    "convnext": (ConvNeXtBlock(6, kernel_size=3, expansion=2, num_blocks=1), 1),
    "downsample": (Downsample(6, 8, 3), 3),
    "upsample": (Upsample(6, 8, 3), 1),
    "history": (History(6, 2), 1),
    "sequential": (
        Sequential([History(6, 1), Linear(12, 6), Downsample(6, 6, 2), DepthwiseConv(6, 3), Upsample(6, 4, 4)]),
        2,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), batch_size=st.integers(1, 3))
@settings(max_examples=25)
@torch.inference_mode()
def test_pieces_give_the_bits_of_the_whole(name: str, sizes: list[int], batch_size: int) -> None:
    layer, multiple = LAYERS[name]
    x = torch.randn(batch_size, multiple * sum(sizes), 6, generator=torch.Generator().manual_seed(1))
    whole = layer(x)
    state = layer.init_state(batch_size)
    parts = []
    for piece in x.split([multiple * size for size in sizes], dim=1):
        y, state = layer.step(piece, state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", LAYERS)
def test_no_output_sees_later_input(name: str) -> None:
    layer, multiple = LAYERS[name]
    num_inputs = 8 * multiple
    x = torch.randn(1, num_inputs, 6, requires_grad=True)
    y = layer(x)
    for t in range(y.shape[1]):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        # Output t of T ends at the same time as input (t + 1) / T * num_inputs, rounded up to the layer's multiple.
        end = -(-(t + 1) * num_inputs // y.shape[1])
        seen_until = -(-end // multiple) * multiple
        assert not gradient[0, seen_until:].any()
        assert gradient[0, :seen_until].any()


def test_the_depthwise_convolution_reaches_kernel_size_inputs_back() -> None:
    layer = DepthwiseConv(3, 5)
    x = torch.randn(1, 12, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, 10].sum(), x)
    assert [bool(row.any()) for row in gradient[0]] == [6 <= t <= 10 for t in range(12)]


def test_steps_do_not_change_the_state_they_are_given() -> None:
    layer, _ = LAYERS["convnext"]
    state = layer.init_state(2)
    before = map_state(torch.clone, state)
    layer.step(torch.randn(2, 4, 6), state)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(before), strict=True))


def test_where_rows_resets_single_rows() -> None:
    layer, _ = LAYERS["sequential"]
    with torch.inference_mode():
        _, used = layer.step(torch.randn(3, 4, 6), layer.init_state(3))
        mixed = where_rows(torch.tensor([True, False, True]), used, layer.init_state(3))
    for after, before in zip(leaves(mixed), leaves(used), strict=True):
        assert torch.equal(after[0], before[0])
        assert not after[1].any()
