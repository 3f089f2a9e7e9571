import copy
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import assert_same_split_codes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from codec import config as codec_config
from codec.layers.attention import Transformer
from codec.layers.causal import State, leaves, map_state
from codec.layers.resample import ConvDownsample
from codec.models.interface import AudioCodec
from codec.models.mimi import MimiCodec, MimiConfig
from codec.quantizers.split import SplitVQ, SplitVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder, StreamPool
from codec.testing import speech_like
from codec.tokens import Tokens

HOP = 12
# Other lengths are products of other shapes, whose sums round differently.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5

TINY: dict[str, Any] = {
    "quantizer": SplitVQConfig(latent_dim=8, num_stages=4, codebook_size=16, codebook_dim=6),
    "ratios": (3, 2),
    "num_filters": 4,
    "num_layers": 2,
    "num_heads": 2,
    "feedforward_dim": 12,
    "window": 7,
    "initial_scale": 0.7,
}


def _codec(**changes: Any) -> MimiCodec:
    """An untrained codec whose latents vary, and whose codebooks reach about as far as they do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: MimiCodec = codec_config.build(MimiConfig(**TINY | changes))
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value.mul_(2.0 if name.endswith("weight") and "norm" not in name else 1.0)
            for part in (_quantizer(codec).semantic, _quantizer(codec).acoustic):
                part.vq.codebooks.mul_(part.project(codec.analyze(_audio(4000, codec.num_channels))).std() / 2)
    return codec.eval().requires_grad_(False)


def _quantizer(codec: MimiCodec) -> SplitVQ:
    assert isinstance(codec.quantizer, SplitVQ)
    return codec.quantizer


def _audio(num_samples: int, num_channels: int = 1, *, seed: int = 0) -> Tensor:
    channels = [speech_like(num_samples, seed=seed + 10 * channel) for channel in range(num_channels)]
    return torch.stack([torch.from_numpy(channel) for channel in channels])[None]


CODECS = {"mono": _codec(), "stereo": _codec(num_channels=2, downsampling=3, ratios=(2, 2), num_residual_blocks=2)}
CODECS64 = {name: copy.deepcopy(codec).double() for name, codec in CODECS.items()}
CODEC, CODEC64 = CODECS["mono"], CODECS64["mono"]


@pytest.mark.parametrize("name", CODECS)
def test_it_says_what_it_is(name: str) -> None:
    codec = CODECS[name]
    assert isinstance(codec, AudioCodec)
    assert codec.is_streamable
    assert not codec.is_bit_exact
    assert (codec.hop_length, codec.sample_rate_hz) == (HOP, 24000)
    assert codec.codebook_sizes == (16, 16, 16, 16)
    assert codec.valid_num_quantizers == (1, 2, 3, 4)
    assert codec.encode_delay_samples == codec.decode_delay_samples == codec.decode_frames_after == 0


def test_the_published_model_is_the_default() -> None:
    with torch.device("meta"):
        codec = MimiCodec(MimiConfig())
    assert (codec.sample_rate_hz / codec.hop_length, codec.bitrate_bps(8)) == (12.5, 1100)
    assert codec.valid_num_quantizers == tuple(range(1, 33))
    # 8 layers of 249 rows before, two rows to a frame, and what the convolutions hear.
    assert codec.decode_frames_before == 8 * 249 // 2 + 5
    millions = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (*codec.encoder.layers, *codec.decoder.layers)
    ]
    assert [round(count, 3) for count in millions] == [12.628, 25.19, 1.049, 0.002, 25.19, 14.725]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("num_samples", [0, 1, HOP - 1, HOP, HOP + 1, 40 * HOP + 7])
def test_lengths_are_exact(name: str, num_samples: int) -> None:
    codec = CODECS[name]
    tokens = codec.encode(_audio(num_samples, codec.num_channels))
    assert tokens.codes.shape == (1, 4, -(-num_samples // HOP))
    assert codec.decode(tokens).shape == (1, codec.num_channels, num_samples)


# Streams


@pytest.mark.parametrize("name", CODECS)
@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=10), batch_size=st.integers(1, 3))
@settings(max_examples=15)
def test_a_stream_is_the_file_in_float64(name: str, cuts: list[int], batch_size: int) -> None:
    codec = CODECS64[name]
    audio = torch.cat([_audio(sum(cuts) * HOP, codec.num_channels, seed=seed) for seed in range(batch_size)])
    tokens = codec.encode(audio)
    state, parts = codec.encode_init(batch_size), []
    for piece in audio.split([cut * HOP for cut in cuts], dim=2):
        codes, state = codec.encode_step(piece, state)
        parts.append(codes)
    assert torch.equal(torch.cat([*parts, codec.encode_flush(state)], dim=2), tokens.codes)

    state, parts = codec.decode_init(batch_size), []
    for piece in tokens.codes.split(cuts, dim=2):
        heard, state = codec.decode_step(piece, state)
        parts.append(heard)
    joined = torch.cat([*parts, codec.decode_flush(state)], dim=2)
    torch.testing.assert_close(joined, codec.decode(tokens), rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("name", CODECS)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), num_quantizers=st.integers(1, 4))
@settings(max_examples=10)
def test_a_stream_of_any_pieces_is_the_file(name: str, sizes: list[int], num_quantizers: int) -> None:
    codec = CODECS[name]
    audio = _audio(sum(sizes), codec.num_channels)
    tokens = codec.encode(audio, num_quantizers=num_quantizers)
    encoder = StreamingEncoder(codec, num_quantizers=num_quantizers)
    codes = torch.cat([*(encoder.push(piece) for piece in audio[0].split(sizes, dim=1)), encoder.flush()], dim=1)
    if audio.shape[2]:
        whole = codec.encode(audio).codes
        assert_same_split_codes(codes[None], whole, codec.analyze(audio), _quantizer(codec))
    decoder = StreamingDecoder(codec)
    heard = torch.cat([*(decoder.push(piece) for piece in tokens.codes[0].split(3, dim=1)), decoder.flush()], dim=1)
    assert heard.shape[1] == tokens.codes.shape[2] * HOP
    _assert_close(heard[:, : audio.shape[2]], codec.decode(tokens)[0])


def _assert_close(heard: Tensor, expected: Tensor) -> None:
    loudest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0  # sums round by their largest parts
    torch.testing.assert_close(heard, expected, rtol=0, atol=FLOAT32_TOLERANCE * loudest)


def _steps(codec: MimiCodec, cuts: list[int]) -> Iterator[State]:
    """The states of an encoder and of a decoder, one after the other, after each of these numbers of frames."""
    encoder, decoder = codec.encode_init(2), codec.decode_init(2)
    yield encoder
    yield decoder
    for cut in cuts:
        codes, encoder = codec.encode_step(_audio(cut * HOP).expand(2, -1, -1), encoder)
        _, decoder = codec.decode_step(codes, decoder)
        yield encoder
        yield decoder


@given(cuts=st.lists(st.sampled_from([0, 1, 2, 5, 30]), min_size=1, max_size=5))
@settings(max_examples=10)
def test_a_state_keeps_its_shapes(cuts: list[int]) -> None:
    kinds = [[(leaf.shape, leaf.dtype) for leaf in leaves(state)] for state in _steps(CODEC, cuts)]
    assert all(kind == kinds[0] for kind in kinds[::2])
    assert all(kind == kinds[1] for kind in kinds[1::2])


@given(starts=st.lists(st.integers(0, 12), min_size=2, max_size=4), cuts=st.lists(st.integers(1, 5), max_size=5))
@settings(max_examples=15)
def test_rows_of_a_batch_may_be_at_different_places(starts: list[int], cuts: list[int]) -> None:
    """Each row has had other frames of its own before; then all go on together, as each does alone."""
    num_frames = sum(cuts)
    codec, encoders, decoders, expected = CODEC64, [], [], []
    for row, start in enumerate(starts):
        audio = _audio((start + num_frames) * HOP, seed=row)
        tokens = codec.encode(audio)
        expected.append(
            (audio[:, :, start * HOP :], tokens.codes[:, :, start:], codec.decode(tokens)[:, :, start * HOP :])
        )
        encoders.append(codec.encode_step(audio[:, :, : start * HOP], codec.encode_init(1))[1])
        decoders.append(codec.decode_step(tokens.codes[:, :, :start], codec.decode_init(1))[1])
    audio, codes, heard = (torch.cat(parts) for parts in zip(*expected, strict=True))
    encoder, decoder = (map_state(lambda *rows: torch.cat(rows), *states) for states in (encoders, decoders))
    first = 0
    for cut in cuts:
        found, encoder = codec.encode_step(audio[:, :, first * HOP : (first + cut) * HOP], encoder)
        assert torch.equal(found, codes[:, :, first : first + cut])
        piece, decoder = codec.decode_step(found, decoder)
        expected_piece = heard[:, :, first * HOP : (first + cut) * HOP]
        torch.testing.assert_close(piece, expected_piece, rtol=0, atol=FLOAT64_TOLERANCE)
        first += cut


def test_steps_do_not_look_at_values() -> None:
    """So that they can be recorded as CUDA graphs, or exported: tensors without values raise where anybody looks."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for network, x in ((CODEC.encoder, _audio(2 * HOP)), (CODEC.decoder, torch.zeros(1, 8, 2))):
            state = map_state(mode.from_tensor, network.init_state(1))
            y, state = network.step(mode.from_tensor(x), state)
            assert y.shape[2] == 2 * HOP * 2 // x.shape[2]


def _through_pool(codec: MimiCodec, direction: str, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of streams that begin one after the other, and are pushed frames in random numbers."""
    pool, generator = StreamPool(codec, direction, capacity=len(inputs)), torch.Generator().manual_seed(0)
    not_begun, rests, pieces = list(inputs), dict[int, Tensor](), dict[int, list[Tensor]]()
    while not_begun or pool.num_open:
        if not_begun:
            stream = pool.open()
            rests[stream], pieces[stream] = not_begun.pop(0), []
        for stream, rest in list(rests.items()):
            cut = int(torch.randint(0, 10, (), generator=generator)) * (HOP if direction == "encode" else 1)
            pool.push(stream, rest[:, :cut])
            rests[stream] = rest[:, cut:]
            if not rests[stream].shape[1]:
                pool.end(stream)
                del rests[stream]
        for stream, piece in pool.step().items():
            pieces[stream].append(piece)
    return [torch.cat(parts, dim=1) for parts in pieces.values()]


def test_the_pool_gives_what_a_stream_alone_gives() -> None:
    audio = [_audio(num_frames * HOP + 5, seed=num_frames)[0] for num_frames in (3, 30, 21, 40)]
    for codec, tolerance in ((CODEC64, FLOAT64_TOLERANCE), (CODEC, FLOAT32_TOLERANCE)):
        tokens = [codec.encode(row[None]) for row in audio]
        for row, expected, codes in zip(audio, tokens, _through_pool(codec, "encode", audio), strict=True):
            if codec is CODEC64:
                assert torch.equal(codes, expected.codes[0])
            else:
                assert_same_split_codes(codes[None], expected.codes, codec.analyze(row[None]), _quantizer(codec))
        heard = _through_pool(codec, "decode", [row.codes[0] for row in tokens])
        for row, given_tokens in zip(heard, tokens, strict=True):
            expected_audio = codec.decode(given_tokens)[0]
            assert row.shape[1] == given_tokens.codes.shape[2] * HOP
            torch.testing.assert_close(row[:, : expected_audio.shape[1]], expected_audio, rtol=0, atol=tolerance)


# Batches


@given(lengths=st.lists(st.integers(0, 30 * HOP), min_size=1, max_size=4), extra=st.integers(0, 3 * HOP))
@settings(max_examples=10)
def test_a_row_is_the_same_alone_and_in_a_batch(lengths: list[int], extra: int) -> None:
    audio = torch.full((len(lengths), 1, max(lengths) + extra), 0.7)  # what lies past a row's end must not matter
    for row, length in enumerate(lengths):
        audio[row, :, :length] = _audio(length, seed=row)[0]
    tokens = CODEC64.encode(audio, torch.tensor(lengths))
    heard = CODEC64.decode(tokens)
    for row, length in enumerate(lengths):
        alone = CODEC64.encode(_audio(length, seed=row))
        num_frames = alone.codes.shape[2]
        assert torch.equal(tokens.codes[row, :, :num_frames], alone.codes[0])
        assert not tokens.codes[row, :, num_frames:].any()
        expected = CODEC64.decode(alone)[0]
        torch.testing.assert_close(heard[row, :, :length], expected, rtol=0, atol=FLOAT64_TOLERANCE)
        assert not heard[row, :, length:].any()


# Training


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("num_samples", [1, HOP, 30 * HOP + 5])
def test_training_computes_what_the_steps_do(name: str, num_samples: int) -> None:
    codec = CODECS64[name]
    audio = _audio(num_samples, codec.num_channels).double()
    padded = torch.nn.functional.pad(audio, (0, -num_samples % HOP))
    latents, _ = codec.encoder.step(padded, codec.encoder.init_state(1))
    torch.testing.assert_close(codec.analyze(audio), latents, rtol=0, atol=FLOAT64_TOLERANCE)
    heard, _ = codec.decoder.step(latents, codec.decoder.init_state(1))
    torch.testing.assert_close(
        codec.synthesize(latents, num_samples), heard[:, :, :num_samples], rtol=0, atol=FLOAT64_TOLERANCE
    )


def test_training_in_bfloat16_is_close() -> None:
    audio = _audio(30 * HOP)
    latents = CODEC.analyze(audio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CODEC.synthesize(CODEC.analyze(audio), audio.shape[2])
    expected = CODEC.synthesize(latents, audio.shape[2])
    # 8 bits of a mantissa, some ten layers deep.
    assert (found.float() - expected).square().mean() < 0.05**2 * expected.square().mean()


def test_every_weight_gets_a_gradient() -> None:
    codec = copy.deepcopy(CODEC).requires_grad_(True)
    audio = _audio(20 * HOP)
    codec.reconstruct(audio, lambda latents: latents).sub(audio).square().sum().backward()
    for network in (codec.encoder, codec.decoder):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


# What is heard


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_row_attends_to_the_window_that_ends_with_it(window: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Transformer(
            8, num_layers=1, num_heads=2, feedforward_dim=12, window=window, rope_base=100.0, initial_scale=1.0
        )
    x = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    for row in (0, 3, 19):
        (gradient,) = torch.autograd.grad(layer(x)[0, :, row].square().sum(), x)
        heard = gradient[0].abs().sum(0).nonzero()[:, 0].tolist()
        assert heard == list(range(max(0, row - window + 1), row + 1))


def test_what_a_frame_hears_is_what_it_says() -> None:
    codec, num_frames, frame = CODEC64, 40, 30
    first = frame - codec.decode_frames_before
    assert 0 < first < 25
    latents = torch.randn(1, 8, num_frames, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_(True)
    heard = codec.decoder(latents)[0, :, frame * HOP : (frame + 1) * HOP]
    (gradient,) = torch.autograd.grad(heard.square().sum(), latents)
    used = gradient[0].abs().sum(0).nonzero()[:, 0]
    assert (int(used[0]), int(used[-1])) == (first, frame)

    num_samples = (frame + 1) * HOP
    audio = _audio(num_frames * HOP).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(codec.encoder(audio)[0, :, frame].square().sum(), audio)
    used = gradient[0, 0].nonzero()[:, 0]
    assert (int(used[0]), int(used[-1])) == (frame * HOP - codec.encode_samples_before, num_samples - 1)


def test_the_first_input_stands_before_the_beginning() -> None:
    layer = ConvDownsample(3, 2)
    x = torch.randn(1, 3, 6)
    repeated = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    expected = torch.nn.functional.conv1d(repeated, layer.weight, stride=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a multiple of 2 inputs, not 5"):
        layer(x[:, :, :5])


def test_neighbouring_dims_are_turned_together() -> None:
    """Turned by their row number and the base: the rotation of RoFormer, equation 15, of one head of 4 dims."""
    layer = Transformer(4, num_layers=1, num_heads=1, feedforward_dim=4, window=9, rope_base=100.0, initial_scale=1.0)
    cos, sin = layer._rotation(torch.tensor([5]), 3, torch.float64)
    angles = torch.tensor([[5.0, 0.5], [6.0, 0.6], [7.0, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0], angles.cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sin[0, 0], angles.sin(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("days", [1, 30])
def test_streams_run_for_days(days: int) -> None:
    """Only distances count: late rows are what early ones are, to float32's rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Transformer(
            64, num_layers=2, num_heads=1, feedforward_dim=32, window=50, rope_base=10000.0, initial_scale=1.0
        ).requires_grad_(False)
    x = 3 * torch.randn(1, 64, 80, generator=torch.Generator().manual_seed(1))
    outputs = []
    for num_before in (100, days * 24 * 3600 * 25 + 1):
        _, pasts = network.init_state(1)
        y, (after, _) = network.step(x, (torch.tensor([num_before]), pasts))
        assert isinstance(after, Tensor)
        assert after.tolist() == [num_before + 80]
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be positive, got 0"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"rope_base": 0.0}, "rope_base must be positive, got 0.0"),
        ({"downsampling": 1}, "downsampling must be at least 2, got 1"),
        ({"num_heads": 3}, "latent_dim=8 makes no pairs of dims for each of num_heads=3"),
        ({"ratios": ()}, "ratios must be one or more positive numbers"),
        ({"num_filters": 3}, "num_filters=3 is not a multiple of compress=2"),
    ],
)
def test_configurations_that_cannot_be_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MimiConfig(**TINY | changes)


def test_callers_mistakes_are_value_errors() -> None:
    state = CODEC.encode_init(1)
    with pytest.raises(ValueError, match=rf"audio must be \[B, 1, n \* {HOP}\]"):
        CODEC.encode_step(torch.zeros(1, 1, HOP + 1), state)
    with pytest.raises(ValueError, match="num_quantizers=5 is not one of"):
        CODEC.encode_step(torch.zeros(1, 1, HOP), state, num_quantizers=5)
    with pytest.raises(ValueError, match=r"codes must be int64 \[B, K, n\]"):
        CODEC.decode_step(torch.zeros(1, 4), CODEC.decode_init(1))
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.15"):
        CODEC.decode_step(torch.full((1, 4, 1), 16), CODEC.decode_init(1))
    with pytest.raises(ValueError, match="has no global codes"):
        CODEC.decode_init(1, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="were made by codec 'other'"):
        CODEC.decode(Tokens(torch.zeros(1, 4, 1, dtype=torch.int64), torch.tensor([HOP]), "other"))


def test_hop_length_is_a_product() -> None:
    config = MimiConfig(**TINY | {"downsampling": 3})
    assert config.hop_length == 3 * prod(config.ratios)
