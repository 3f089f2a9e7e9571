"""Discriminators: the published sizes, what they hear, and what they cost nobody: gradients, precision, order."""

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recipes.discriminators
from codec.config import build
from codec.testing import speech_like, tiny_config
from recipes.discriminators import (
    Discriminators,
    MultiBandMultiResolutionConfig,
    MultiPeriodConfig,
    MultiScaleConfig,
    MultiScaleSTFTConfig,
    alternate,
    random_crops,
)
from recipes.losses import discriminator_loss

TINY: list[dict[str, Any]] = [
    {"type": "multi_period", "periods": [2, 3], "channels": [4, 8]},
    {"type": "multi_scale", "num_scales": 2, "channels": [4, 8, 8], "strides": [1, 2, 2], "groups": [1, 4, 1]},
    {"type": "multi_scale_stft", "n_ffts": [64, 32], "num_filters": 4},
    {"type": "multi_band_multi_resolution", "n_ffts": [64, 32], "num_filters": 4, "band_edges": [0.0, 0.4, 1.0]},
]
KINDS = [values["type"] for values in TINY]


def _tiny(*configs: dict[str, Any]) -> Discriminators:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminators(configs or TINY)


def _speech(batch_size: int, num_samples: int, num_channels: int = 1) -> Tensor:
    signals = [torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(batch_size * num_channels)]
    return torch.stack(signals).view(batch_size, num_channels, num_samples)


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(recipes.discriminators).attempted > 0
    assert doctest.testmod(recipes.discriminators).failed == 0


# As published


@pytest.mark.parametrize(
    ("kind", "num_members", "num_weights"),
    [
        ("multi_period", 5, 41_105_770),  # 41.11 M
        ("multi_scale", 3, 29_618_821),  # 29.62 M
        # By hand, per resolution: 2*32*27 + 32; three times 32*32*27, one 32*32*9, each with 32 lengths and 32 biases;
        # 32*9 + 2.
        ("multi_scale_stft", 5, 5 * (1760 + 3 * (27648 + 64) + 9216 + 64 + 290)),
        # Five bands of 2*32*27 + 64, three times 32*32*27 + 64 and 32*32*9 + 64; then 32*9 + 2.
        ("multi_band_multi_resolution", 3, 3 * (5 * (1792 + 3 * 27712 + 9280) + 290)),
    ],
)
def test_defaults_have_the_published_size(kind: str, num_members: int, num_weights: int) -> None:
    judges = Discriminators([{"type": kind}])
    assert len(judges.members) == num_members
    assert sum(weights.numel() for weights in judges.parameters()) == num_weights


def _published_layer(layer: Any) -> tuple[Any, ...]:
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.groups


def test_layers_are_the_published_ones() -> None:
    periods = Discriminators([MultiPeriodConfig()]).members
    assert [member.period for member in periods] == [2, 3, 5, 7, 11]  # type: ignore[attr-defined]
    assert [_published_layer(layer) for layer in [*periods[0].layers, periods[0].last]] == [  # type: ignore[misc]
        (1, 32, (5, 1), (3, 1), (2, 0), 1),
        (32, 128, (5, 1), (3, 1), (2, 0), 1),
        (128, 512, (5, 1), (3, 1), (2, 0), 1),
        (512, 1024, (5, 1), (3, 1), (2, 0), 1),
        (1024, 1024, (5, 1), (1, 1), (2, 0), 1),
        (1024, 1, (3, 1), (1, 1), (1, 0), 1),
    ]
    scales = Discriminators([MultiScaleConfig()]).members
    assert [_published_layer(layer) for layer in [*scales[0].layers, scales[0].last]] == [  # type: ignore[misc]
        (1, 128, (15,), (1,), (7,), 1),
        (128, 128, (41,), (2,), (20,), 4),
        (128, 256, (41,), (2,), (20,), 16),
        (256, 512, (41,), (4,), (20,), 16),
        (512, 1024, (41,), (4,), (20,), 16),
        (1024, 1024, (41,), (1,), (20,), 16),
        (1024, 1024, (5,), (1,), (2,), 1),
        (1024, 1, (3,), (1,), (1,), 1),
    ]
    bands = Discriminators([MultiBandMultiResolutionConfig()]).members
    assert bands[0].bands == [(0, 102), (102, 256), (256, 512), (512, 768), (768, 1025)]  # type: ignore[attr-defined]
    assert [_published_layer(layer)[:5] for layer in bands[0].stacks[0]] == [  # type: ignore[union-attr, index]
        (2, 32, (3, 9), (1, 1), (1, 4)),
        (32, 32, (3, 9), (1, 2), (1, 4)),
        (32, 32, (3, 9), (1, 2), (1, 4)),
        (32, 32, (3, 9), (1, 2), (1, 4)),
        (32, 32, (3, 3), (1, 1), (1, 1)),
    ]


def test_norms_are_the_published_ones() -> None:
    keys = set(_tiny(TINY[1], TINY[2]).state_dict())
    # Spectral norm, the first scale only, has one tensor to learn and vectors beside it; weight norm has two tensors.
    assert "families.0.0.layers.1.parametrizations.weight.0._u" in keys
    assert "families.0.0.layers.1.parametrizations.weight.original1" not in keys
    assert "families.0.1.layers.1.parametrizations.weight.original1" in keys
    # EnCodec's first layer has none.
    assert "families.1.0.layers.0.weight" in keys
    assert "families.1.0.layers.1.parametrizations.weight.original1" in keys


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@torch.no_grad()
def test_parity_with_encodec() -> None:
    msstftd = pytest.importorskip("encodec.msstftd")
    n_ffts = (64, 128)
    torch.manual_seed(0)
    peer = msstftd.MultiScaleSTFTDiscriminator(
        filters=6, n_ffts=n_ffts, hop_lengths=[size // 4 for size in n_ffts], win_lengths=n_ffts
    )
    ours = Discriminators([MultiScaleSTFTConfig(n_ffts=n_ffts, num_filters=6)])
    weights = {}
    for key, value in peer.state_dict().items():
        if "spec_transform" in key:
            continue
        name = key.replace("discriminators.", "families.0.").replace(".conv.", ".")
        name = name.replace(".convs.", ".layers.").replace(".conv_post.", ".last.")
        name = name.replace("weight_g", "parametrizations.weight.original0")
        weights[name.replace("weight_v", "parametrizations.weight.original1")] = value
    ours.load_state_dict(weights)
    audio = _speech(2, 1001)
    scores, features = peer(audio)
    for judgement, score, expected in zip(ours(audio), scores, features, strict=True):
        # The window is scaled before the transform, not the spectrum after it: a few roundings.
        torch.testing.assert_close(judgement.score, score, rtol=1e-5, atol=1e-6)
        for ours_, theirs in zip(judgement.features, expected, strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-5)


# What they hear


@torch.no_grad()
def test_periods_pad_only_what_is_missing() -> None:
    judges = _tiny({"type": "multi_period", "periods": [5], "channels": [2]})
    heard = []
    judges.members[0].layers[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))  # type: ignore[index, union-attr]
    audio = _speech(1, 20)
    judges(audio)
    judges(audio[:, :, :18])
    assert torch.equal(heard[0], audio.view(1, 1, 4, 5))
    mirrored = torch.cat([audio[:, :, :18], audio[:, :, [16, 15]]], dim=2)
    assert torch.equal(heard[1], mirrored.view(1, 1, 4, 5))


@torch.no_grad()
def test_spectra_are_what_a_direct_transform_gives() -> None:
    audio, n_fft = _speech(1, 150).double(), 32
    frames = audio[0, 0].unfold(0, n_fft, n_fft // 4) * torch.hann_window(n_fft, dtype=torch.float64)
    expected = torch.fft.rfft(frames)
    heard: list[Tensor] = []
    judges = _tiny({"type": "multi_scale_stft", "n_ffts": [n_fft], "num_filters": 2})
    judges.members[0].layers[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))  # type: ignore[index, union-attr]
    judges(audio.float())
    unit = torch.hann_window(n_fft, dtype=torch.float64).square().sum().sqrt()
    torch.testing.assert_close(heard[0][0, 0].double(), expected.real / unit, rtol=0, atol=1e-6)
    torch.testing.assert_close(heard[0][0, 1].double(), expected.imag / unit, rtol=0, atol=1e-6)
    # Noise of one level has one level at every resolution.
    torch.manual_seed(0)
    for size in (32, 256):
        other = _tiny({"type": "multi_scale_stft", "n_ffts": [size], "num_filters": 2})
        other.members[0].layers[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))  # type: ignore[index, union-attr]
        other(torch.randn(8, 1, 4000))
        assert float(heard[-1].square().sum(1).mean()) == pytest.approx(1.0, rel=0.05)


@torch.no_grad()
def test_bands_have_a_column_per_hop_and_are_joined_again() -> None:
    judges = _tiny({"type": "multi_band_multi_resolution", "n_ffts": [32], "num_filters": 2, "band_edges": [0, 0.5, 1]})
    heard: list[Tensor] = []
    for stack in judges.members[0].stacks:  # type: ignore[union-attr]
        stack[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))  # type: ignore[index, operator, union-attr]
    audio = _speech(1, 100)
    judgement = judges(audio)[0]
    # As DAC frames it: 12 samples mirrored on both sides, and up to a whole hop; then a centered transform, without the
    # two columns at either end that only hear what is mirrored twice.
    padded = F.pad(audio, (12, 12 + 4), "reflect")
    whole = torch.stft(padded[:, 0], 32, 8, window=torch.hann_window(32), return_complex=True)[:, :, 2:-2]
    expected = torch.view_as_real(whole).permute(0, 3, 2, 1)
    assert expected.shape == (1, 2, 13, 17)
    torch.testing.assert_close(torch.cat(heard, dim=3), expected, rtol=0, atol=1e-6)
    assert [part.shape[3] for part in heard] == [8, 9]
    assert len(judgement.features) == 10
    assert judgement.score.shape[2:] == (13, 1 + 2)  # three halvings of 8 and of 9 bins, side by side


@torch.no_grad()
@pytest.mark.parametrize("values", TINY, ids=KINDS)
def test_level_decides_nothing_where_it_is_normalized(values: dict[str, Any]) -> None:
    audio = _speech(2, 200)
    louder = 3.0 * audio + 0.1
    plain, level = _tiny(values), _tiny(values | {"normalize_level": True})
    for quiet, loud in zip(level(audio), level(louder), strict=True):
        torch.testing.assert_close(quiet.score, loud.score, rtol=1e-4, atol=1e-5)
    for quiet, loud in zip(plain(audio), plain(louder), strict=True):
        assert float((quiet.features[0] - loud.features[0]).abs().max()) > 0.01


@torch.no_grad()
def test_channels_are_judged_one_by_one() -> None:
    audio = _speech(2, 300, num_channels=2)
    judges = _tiny().eval()
    for index, judgement in enumerate(judges(audio)):
        alone = judges(audio[1:, 1:])[index]
        assert judgement.score.shape[0] == 4
        torch.testing.assert_close(judgement.score[3:], alone.score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("values", TINY, ids=KINDS)
def test_every_sample_is_heard(values: dict[str, Any]) -> None:
    judges = _tiny(values)
    for num_samples in (judges.min_samples, 97, 160):
        audio = _speech(1, num_samples).requires_grad_()
        sum(judgement.score.square().sum() for judgement in judges(audio)).backward()  # type: ignore[union-attr]
        assert audio.grad is not None
        # Spectra take whole windows only (EnCodec) and their windows begin at zero; the others hear every sample.
        first, last = (1, num_samples - 31) if values["type"] == "multi_scale_stft" else (0, num_samples)
        assert (audio.grad[0, 0, first:last] != 0).all(), num_samples


# Training


@pytest.mark.parametrize("values", TINY, ids=KINDS)
def test_silence_and_bfloat16_give_finite_gradients(values: dict[str, Any]) -> None:
    judges = _tiny(values | {"normalize_level": True})
    for is_mixed in (False, True):
        audio = torch.zeros(2, 1, 160, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            judgements = judges(audio)
        for judgement in judgements:
            assert judgement.score.dtype == torch.float32
        sum(judgement.score.sum() + judgement.features[-1].sum() for judgement in judgements).backward()  # type: ignore[union-attr]
        assert audio.grad is not None
        assert torch.isfinite(audio.grad).all()
        assert all(torch.isfinite(weights.grad).all() for weights in judges.parameters() if weights.grad is not None)
    assert judgements[0].features[0].dtype == torch.bfloat16  # autocast was on


@torch.no_grad()
def test_layers_that_halve_see_two_bins_or_more() -> None:
    """Else weights get gradients from memory that nobody wrote; see `MIN_BINS`."""
    judges = Discriminators(
        [
            MultiScaleSTFTConfig(n_ffts=(8,), num_filters=2),
            MultiBandMultiResolutionConfig(n_ffts=(32,), num_filters=2, band_edges=(0.0, 0.3, 0.6, 1.0)),
        ]
    )
    widths: list[int] = []
    for layer in judges.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.stride[1] == 2:
            layer.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[3]))
    judges(_speech(1, 64))
    assert len(widths) == 3 + 3 * 3
    assert min(widths) == 2


@torch.no_grad()
@pytest.mark.parametrize("values", TINY[2:], ids=KINDS[2:])
def test_spectra_stay_exact_under_autocast(values: dict[str, Any]) -> None:
    judges = _tiny(values)
    heard: list[Tensor] = []
    for member in judges.members:
        for layer in member.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.in_channels == 2:
                layer.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    audio = _speech(1, 160)
    judges(audio)
    plain = list(heard)
    heard.clear()
    with torch.autocast("cpu", torch.bfloat16):
        judges(audio)
    for one, other in zip(plain, heard, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("values", TINY, ids=KINDS)
def test_they_learn_to_tell_noise_from_speech(values: dict[str, Any]) -> None:
    real = _speech(2, 1600)[:, :, 800:]
    torch.manual_seed(0)
    fake = 0.1 * torch.randn(2, 1, 800)
    judges = _tiny(values)
    optimizer = torch.optim.Adam(judges.parameters(), lr=0.03)
    losses = []
    while len(losses) < 80 and min(losses, default=2.0) > 1.5:
        loss = discriminator_loss(judges(real), judges(fake), "hinge", reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2.0, abs=0.05)
    assert losses[-1] < 1.5


@torch.no_grad()
def test_a_part_can_be_active() -> None:
    judges, audio = _tiny().eval(), _speech(1, 200)
    judgements = judges(audio)
    assert len(judgements) == len(judges.members) == 8
    for part in ([0], [7, 2], []):
        for index, judgement in zip(part, judges(audio, active=part), strict=True):
            assert torch.equal(judgement.score, judgements[index].score)


@given(st.integers(1, 9), st.data())
def test_turns_are_fair_and_depend_on_the_step_alone(num: int, data: st.DataObject) -> None:
    num_active = data.draw(st.integers(1, num))
    counts = [0] * num
    first = {index for step in range(-(-num // num_active)) for index in alternate(num, num_active, step)}
    assert first == set(range(num))  # nobody waits longer than needed
    for step in range(num):
        active = alternate(num, num_active, step)
        assert len(set(active)) == num_active
        assert active == alternate(num, num_active, step)
        for index in active:
            counts[index] += 1
    assert counts == [num_active] * num


def test_too_many_turns_are_refused() -> None:
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=r"num_active=. is not in 1\.\.3"):
            alternate(3, wrong, 0)


@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_crops_are_of_the_same_places(batch_size: int, channels: int, total: int, size: int, seed: int) -> None:
    where = torch.arange(float(batch_size * channels * total)).view(batch_size, channels, total)
    one, two = random_crops([where, -where], size, generator=torch.Generator().manual_seed(seed))
    assert one.shape == (batch_size, channels, min(size, total))
    assert torch.equal(one, -two)
    for row, crop in zip(where, one, strict=True):  # a piece of its own item, in order
        start = int(crop[0, 0] - row[0, 0])
        assert torch.equal(crop, row[:, start : start + size])


def test_crops_differ_and_carry_gradients() -> None:
    audio = torch.zeros(8, 1, 1000, requires_grad=True)
    where = torch.arange(1000.0).expand(8, 1, 1000)
    crop, place = random_crops([audio, where], 10, generator=torch.Generator().manual_seed(0))
    assert len(set(place[:, 0, 0].tolist())) > 4
    crop.sum().backward()
    assert audio.grad is not None
    assert torch.equal(audio.grad.sum(2), torch.full((8, 1), 10.0))
    with pytest.raises(ValueError, match="signals differ in shape"):
        random_crops([audio, where[:, :, :9]], 5, generator=torch.Generator())
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        random_crops([audio], 0, generator=torch.Generator())


# Mistakes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "multi_period", "periods": []}, r"discriminators\[1\]: periods must be positive, got nothing"),
        ({"type": "multi_period", "colour": 1}, r"discriminators\[1\].colour: multi_period has no such setting"),
        ({"type": "multi_scale", "groups": [3] * 7}, "a layer from 1 to 128 channels cannot have 3 groups"),
        ({"type": "multi_scale", "strides": [1]}, "channels, strides and groups must name the same number of layers"),
        ({"type": "multi_scale_stft", "n_ffts": [30]}, "n_fft=30 is not a multiple of 4"),
        ({"type": "multi_scale_stft", "num_filters": 0}, "num_filters must be positive, got 0"),
        ({"type": "multi_band_multi_resolution", "band_edges": [0.5, 0.1]}, "band_edges must rise from 0"),
        ({"type": "multi_band_multi_resolution", "n_ffts": [64]}, "leave fewer than 5 bins to a band at n_fft=64"),
        ({"type": "multi_scale_stft", "n_ffts": [64, 4]}, "n_fft=4 gives fewer than 5 bins"),
        ({"type": "single"}, r"adversary.discriminators\[1\].type: 'single' is unknown"),
    ],
)  # fmt: skip
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Discriminators([TINY[0], values])


def test_only_discriminators_are_discriminators() -> None:
    with pytest.raises(ValueError, match="MultirateConfig does not describe discriminators"):
        Discriminators([tiny_config()])
    with pytest.raises(ValueError, match="one discriminator or more"):
        Discriminators([])
    assert build(MultiPeriodConfig(channels=(2,))) is not None


def test_audio_must_be_long_enough() -> None:
    judges = _tiny()
    assert judges.min_samples == 64
    judges(torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match=r"need \[B, C, 64 samples or more\], got \(1, 1, 63\)"):
        judges(torch.zeros(1, 1, 63))
    for values in TINY:
        alone = _tiny(values)
        alone(torch.zeros(1, 1, alone.min_samples))
