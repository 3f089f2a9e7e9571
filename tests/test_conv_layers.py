import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.layers.causal import leaves, map_state, where_rows
from codec.layers.conv import (
    ELU,
    EVERYTHING,
    Chain,
    Conv,
    ConvTranspose,
    ResidualBlock,
    SignalLayer,
    _padded,
    add_weight_norm,
    fold_weight_norm,
)
from codec.layers.recurrent import LSTM

# Pieces and whole are convolved in matrix products of different shapes, whose sums round differently: in float64 by
# some 1e-16 of values near 1, a few layers deep.
TOLERANCE = 1e-12


def _residual(pad_mode: str, *, shortcut: bool = True) -> ResidualBlock:
    branch = [ELU(), Conv(6, 3, 3, dilation=2, pad_mode=pad_mode), ELU(), Conv(3, 6, 1, pad_mode=pad_mode)]
    return ResidualBlock(6, branch, Conv(6, 6, 1, pad_mode=pad_mode) if shortcut else None)


torch.manual_seed(0)
# Each with the number of inputs that a step must be a multiple of.
CAUSAL: dict[str, tuple[SignalLayer, int]] = {
    "elu": (ELU(), 1),
    "conv": (Conv(6, 4, 7), 1),
    "conv_1x1": (Conv(6, 4, 1), 1),
    "conv_dilated": (Conv(6, 4, 3, dilation=3), 1),
    "conv_strided": (Conv(6, 4, 10, stride=5), 5),
    "conv_mirrored": (Conv(6, 4, 7, pad_mode="reflect"), 1),
    "conv_strided_mirrored": (Conv(6, 4, 6, stride=3, pad_mode="reflect"), 3),
    "transpose": (ConvTranspose(6, 4, 6, stride=3), 1),
    "transpose_of_three": (ConvTranspose(6, 4, 7, stride=3), 1),
    "transpose_without_overlap": (ConvTranspose(6, 4, 3, stride=3), 1),
    "lstm": (LSTM(6, 2), 1),
    "residual": (_residual("zero"), 1),
    "residual_mirrored": (_residual("reflect"), 1),
    "residual_mirrored_identity": (_residual("reflect", shortcut=False), 1),
    "chain": (Chain([Conv(6, 6, 5), _residual("zero"), Conv(6, 6, 4, stride=2), LSTM(6, 1)]), 2),
    "chain_mirrored": (
        Chain(
            [
                *(Conv(6, 6, 5, pad_mode="reflect"), _residual("reflect"), Conv(6, 6, 4, stride=2, pad_mode="reflect")),
                *(Conv(6, 6, 7, pad_mode="reflect"), ConvTranspose(6, 6, 4, stride=2), _residual("reflect")),
            ]
        ),
        2,
    ),
}
WHOLE: dict[str, SignalLayer] = {
    "conv": Conv(6, 4, 7, causal=False),
    "conv_even": Conv(6, 4, 4, causal=False),
    "conv_strided": Conv(6, 4, 10, stride=5, causal=False),
    "conv_mirrored": Conv(6, 4, 6, stride=3, causal=False, pad_mode="reflect"),
    "transpose": ConvTranspose(6, 4, 10, stride=5, causal=False),
}
for _layer in (*(layer for layer, _ in CAUSAL.values()), *WHOLE.values()):
    _layer.double()


def _signal(batch_size: int, num_samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return torch.randn(batch_size, 6, num_samples, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CAUSAL)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), rest=st.integers(0, 12), batch_size=st.integers(1, 3))
@settings(max_examples=25)
@torch.inference_mode()
def test_pieces_are_the_whole(name: str, sizes: list[int], rest: int, batch_size: int) -> None:
    layer, multiple = CAUSAL[name]
    x = _signal(batch_size, multiple * sum(sizes) + rest)
    state = layer.init_state(batch_size)
    *pieces, last = x.split([*(multiple * size for size in sizes), rest], dim=2)
    parts = []
    for piece in pieces:
        y, state = layer.step(piece, state)
        parts.append(y)
    joined = torch.cat([*parts, layer.finish(last, state)], dim=2)
    torch.testing.assert_close(joined, layer(x), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CAUSAL if "mirrored" not in name])
@given(size=st.integers(1, 9))
@settings(max_examples=10)
@torch.inference_mode()
def test_padded_with_zeros_every_step_gives_its_outputs_at_once(name: str, size: int) -> None:
    layer, multiple = CAUSAL[name]
    state = layer.init_state(1)
    whole = layer(_signal(1, 10 * multiple)).shape[2]
    for _ in range(3):
        y, state = layer.step(_signal(1, size * multiple), state)
        assert y.shape[2] * 10 == whole * size


def test_mirrored_outputs_are_withheld_until_known() -> None:
    layer, _ = CAUSAL["conv_mirrored"]
    x = _signal(1, 9)
    state = layer.init_state(1)
    counts = []
    for sample in x.split(1, dim=2):
        y, state = layer.step(sample, state)
        counts.append(y.shape[2])
    assert counts == [0, 0, 0, 0, 0, 0, 7, 1, 1]


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), [(7, 1, 1), (3, 1, 4), (4, 1, 1), (6, 3, 1), (10, 5, 1)]
)
@torch.no_grad()
def test_a_convolution_by_its_definition(
    pad_mode: str, causal: bool, kernel_size: int, stride: int, dilation: int
) -> None:
    layer = Conv(
        2, 3, kernel_size, stride=stride, dilation=dilation, causal=causal, pad_mode=pad_mode
    ).double()  # fmt: skip
    num_padded = (kernel_size - 1) * dilation + 1 - stride
    left = num_padded if causal else num_padded - num_padded // 2
    for num_samples in (1, 2, 5, 11, 30, 31):
        x = _signal(1, num_samples)[0, :2]

        def value(at: int, x: torch.Tensor = x, num_samples: int = num_samples) -> torch.Tensor:
            inside = 0 <= at < num_samples
            if pad_mode == "reflect" and not inside:
                # Mirrored at the first sample and at the last; a signal too short to be mirrored goes on with zeros.
                right = num_padded - left + -num_samples % stride
                length = max(num_samples, max(left, right) + 1)
                at = abs(at) if at < 0 else at if at < length else 2 * (length - 1) - at
                inside = at < num_samples
            return x[:, at] if inside else torch.zeros(2, dtype=torch.float64)

        expected = [
            layer.bias
            + sum(layer.weight[:, :, k] @ value(t * stride - left + k * dilation) for k in range(kernel_size))
            for t in range(-(-num_samples // stride))
        ]
        torch.testing.assert_close(layer(x[None])[0], torch.stack(expected, dim=1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride"), [(6, 3), (10, 5), (7, 3), (3, 3)])
@torch.no_grad()
def test_a_transposed_convolution_by_its_definition(causal: bool, kernel_size: int, stride: int) -> None:
    layer = ConvTranspose(2, 3, kernel_size, stride=stride, causal=causal).double()
    x = _signal(1, 4)[0, :2]
    full = layer.bias[:, None].repeat(1, 3 * stride + kernel_size)
    for t in range(4):
        full[:, t * stride : t * stride + kernel_size] += torch.einsum("i,iok->ok", x[:, t], layer.weight)
    num_cut = kernel_size - stride
    left = 0 if causal else num_cut - num_cut // 2
    torch.testing.assert_close(layer(x[None])[0], full[:, left : left + 4 * stride], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [*CAUSAL, *(f"whole {name}" for name in WHOLE)])
def test_reach_is_what_gradients_say(name: str) -> None:
    layer = WHOLE[name.removeprefix("whole ")] if name.startswith("whole ") else CAUSAL[name][0]
    num_inputs = 60
    x = _signal(1, num_inputs).requires_grad_(True)
    y = layer(x)
    # Not the end of the signal, whose padding `reach` does not know.
    for t in range(y.shape[2] // 2):
        (gradient,) = torch.autograd.grad(y[0, :, t].square().sum(), x, retain_graph=True)
        heard = gradient[0].abs().sum(0).nonzero()[:, 0]
        first, last = layer.reach(t, t)
        assert int(heard[-1]) == last
        # Before the signal there is nothing to hear, and a dilated window may begin there.
        assert int(heard[0]) == first if first > 0 else first <= int(heard[0])


def test_group_norm_hears_everything_and_is_not_causal() -> None:
    layer = Conv(6, 4, 3, causal=False, group_norm=True)
    assert layer.reach(5, 6) == (-EVERYTHING, EVERYTHING)
    y = layer(_signal(2, 50).float())
    torch.testing.assert_close(y.mean((1, 2)), torch.zeros(2), rtol=0, atol=1e-5)  # float32 sums of 200 values near 1
    torch.testing.assert_close(y.var((1, 2), correction=0), torch.ones(2), rtol=0, atol=1e-3)  # its epsilon is 1e-5
    # The transposed one is normed before it is cut.
    transpose = ConvTranspose(6, 4, 4, stride=2, causal=False, group_norm=True)
    x = _signal(1, 9).float()
    full = torch.nn.functional.conv_transpose1d(x, transpose.weight, transpose.bias, stride=2)
    expected = (full - full.mean()) / (full.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(transpose(x), expected[:, :, 1:-1], rtol=0, atol=1e-5)  # the sums round otherwise
    with pytest.raises(ValueError, match="a causal layer cannot have it"):
        Conv(6, 4, 3, group_norm=True)


@torch.no_grad()
def test_the_recurrent_layer_adds_its_input() -> None:
    layer = LSTM(6, 2).double()
    x = _signal(3, 11)
    y, _ = layer.lstm(x.permute(2, 0, 1))
    torch.testing.assert_close(layer(x), y.permute(1, 2, 0) + x, rtol=0, atol=TOLERANCE)


def test_layers_that_are_not_causal_refuse_to_step() -> None:
    for layer in WHOLE.values():
        with pytest.raises(ValueError, match="not causal"):
            layer.step(_signal(1, 15), layer.init_state(1))


def test_callers_mistakes_are_value_errors() -> None:
    with pytest.raises(ValueError, match="pad_mode='same' is not one of"):
        Conv(1, 1, 3, pad_mode="same")
    with pytest.raises(ValueError, match="a stride of 4 needs a window of 7"):
        Conv(1, 1, 4, stride=4)
    with pytest.raises(ValueError, match="leaves gaps"):
        ConvTranspose(1, 1, 2, stride=3)
    layer, _ = CAUSAL["conv_strided"]
    with pytest.raises(ValueError, match="a multiple of 5 inputs, not 7"):
        layer.step(_signal(1, 7), layer.init_state(1))


@pytest.mark.parametrize("name", CAUSAL)
@torch.inference_mode()
def test_states_are_values_and_rows_can_be_reset(name: str) -> None:
    layer, multiple = CAUSAL[name]
    x = _signal(2, 40 * multiple)
    _, used = layer.step(x, layer.init_state(2))
    kept = map_state(torch.clone, used)
    once, _ = layer.step(x, used)
    again, _ = layer.step(x, used)
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, b in zip(leaves(used), leaves(kept), strict=True))
    assert all(part.shape[0] == 2 for part in leaves(used))
    if "mirrored" not in name:
        mixed, _ = layer.step(x, where_rows(torch.tensor([True, False]), used, layer.init_state(2)))
        torch.testing.assert_close(mixed[0], once[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(mixed[1], layer(x)[1], rtol=0, atol=TOLERANCE)


def test_weight_norm_comes_and_goes() -> None:
    network = Chain([Conv(6, 6, 3), _residual("zero"), ConvTranspose(6, 2, 4, stride=2)])
    x = _signal(1, 12).float()
    before, expected = {key: value.clone() for key, value in network.state_dict().items()}, network(x)
    add_weight_norm(network)
    assert len(network.state_dict()) == len(before) + 5  # one tensor more per convolution
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-6)  # g * v / |v| rounds
    network(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    fold_weight_norm(network)
    after = network.state_dict()
    assert set(after) == set(before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7)


def test_a_weight_is_normalized_once_per_forward() -> None:
    """Every look at a layer's `weight` computes it anew, and autograd would keep each."""
    network = Chain([Conv(6, 6, 3, pad_mode="reflect"), _residual("zero"), ConvTranspose(6, 2, 4, stride=2)])
    add_weight_norm(network)
    looks = []
    for layer in network.modules():
        if isinstance(layer, Conv | ConvTranspose):
            layer.parametrizations.weight.register_forward_hook(lambda *call: looks.append(call))
    network(_signal(1, 12).float())
    assert len(looks) == 5


@pytest.mark.parametrize(("num_given", "left", "right"), [(9, 4, 0), (9, 3, 4), (9, 0, 0), (3, 4, 2), (1, 0, 3)])
def test_mirrored_as_torch_mirrors(num_given: int, left: int, right: int) -> None:
    x = _signal(2, num_given)
    missing = max(0, max(left, right) + 1 - num_given)
    longer = torch.nn.functional.pad(x, (0, missing))
    expected = torch.nn.functional.pad(longer, (left, right), "reflect")[:, :, : left + num_given + right]
    assert torch.equal(_padded(x, left, right, "reflect"), expected)


@given(batch_size=st.integers(1, 3), num_outputs=st.integers(1, 6), data=st.data())
@settings(max_examples=40)
def test_few_windows_are_what_many_are(batch_size: int, num_outputs: int, data: st.DataObject) -> None:
    """Few of many channels are products of matrices; torch's own convolutions say what they must be."""
    stride, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(num_outputs)
    conv = Conv(80, 5, 2 * stride, stride=stride, dilation=dilation).double().requires_grad_(False)
    x = torch.randn(batch_size, 80, num_outputs * stride, dtype=torch.float64, generator=generator)
    assert conv._is_few(batch_size * num_outputs, x.device)
    padded = F.pad(x, (conv.num_padded, 0))
    expected = F.conv1d(padded, conv.weight, conv.bias, stride=stride, dilation=dilation)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=TOLERANCE)

    kernel_size = stride + data.draw(st.integers(0, 2 * stride))
    transposed = ConvTranspose(80, 5, kernel_size, stride=stride).double().requires_grad_(False)
    x = x[:, :, :num_outputs]
    y, state = transposed.step(x, transposed.init_state(batch_size))
    whole = F.conv_transpose1d(x, transposed.weight, stride=stride)
    assert isinstance(state, torch.Tensor)
    found = torch.cat([y - transposed.bias[:, None], state], dim=2)
    torch.testing.assert_close(found, whole, rtol=0, atol=TOLERANCE)
