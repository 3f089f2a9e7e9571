import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.layers.causal import leaves, map_state, where_rows
from codec.models.interface import AudioCodec
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like, tiny_codec, tiny_config

CODEC = tiny_codec()
GROUPED = tiny_codec(quantizer=ResidualVQConfig(latent_dim=12, num_stages=2, num_groups=2, codebook_size=16))
HOP = CODEC.hop_length


def _audio(num_samples: int, *, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None]


def test_it_says_what_it_is() -> None:
    assert isinstance(CODEC, AudioCodec)
    assert (CODEC.hop_length, CODEC.decode_delay_samples, CODEC.encode_delay_samples) == (64, 64, 0)
    assert CODEC.codebook_sizes == (32, 32, 32)
    assert CODEC.valid_num_quantizers == (1, 2, 3)
    assert GROUPED.valid_num_quantizers == (2, 4)
    assert CODEC.bitrate_bps() == 3 * 5 * 250
    assert GROUPED.bitrate_bps(2) == 2 * 4 * 250


@pytest.mark.parametrize("num_samples", [0, 1, HOP - 1, HOP, HOP + 1, 10 * HOP, 1000 * HOP + 17])
def test_lengths_are_exact(num_samples: int) -> None:
    tokens = CODEC.encode(_audio(num_samples))
    assert tokens.codes.shape == (1, 3, -(-num_samples // HOP))
    assert CODEC.decode(tokens).shape == (1, 1, num_samples)


@given(cuts=st.lists(st.integers(0, 7), min_size=1, max_size=10), batch_size=st.integers(1, 3), groups=st.booleans())
@settings(max_examples=25)
def test_steps_give_the_bits_of_the_whole(num_threads: int, cuts: list[int], batch_size: int, groups: bool) -> None:
    codec = GROUPED if groups else CODEC
    audio = torch.cat([_audio(sum(cuts) * HOP, seed=seed) for seed in range(batch_size)])
    tokens = codec.encode(audio)
    state = codec.encode_init(batch_size)
    parts = []
    for piece in audio.split([cut * HOP for cut in cuts], dim=2):
        codes, state = codec.encode_step(piece, state)
        parts.append(codes)
    assert torch.equal(torch.cat([*parts, codec.encode_flush(state)], dim=2), tokens.codes)

    state = codec.decode_init(batch_size)
    parts = []
    for piece in tokens.codes.split(cuts, dim=2):
        heard, state = codec.decode_step(piece, state)
        parts.append(heard)
    joined = torch.cat([*parts, codec.decode_flush(state)], dim=2)[:, :, codec.decode_delay_samples :]
    assert torch.equal(joined, codec.decode(tokens))


@given(lengths=st.lists(st.integers(0, 9 * HOP), min_size=1, max_size=5), extra=st.integers(0, 3 * HOP))
@settings(max_examples=25)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(num_threads: int, lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    audio = torch.full((len(lengths), 1, width), 0.7)  # what lies past a row's end must not matter
    for row, length in enumerate(lengths):
        audio[row, :, :length] = _audio(length, seed=row)[0]
    tokens = CODEC.encode(audio, torch.tensor(lengths))
    heard = CODEC.decode(tokens)
    for row, length in enumerate(lengths):
        alone = CODEC.encode(_audio(length, seed=row))
        num_frames = alone.codes.shape[2]
        assert torch.equal(tokens.codes[row, :, :num_frames], alone.codes[0])
        assert not tokens.codes[row, :, num_frames:].any()
        assert torch.equal(heard[row, :, :length], CODEC.decode(alone)[0])
        assert not heard[row, :, length:].any()


def test_prefixes_are_what_fewer_quantizers_encode() -> None:
    audio = _audio(20 * HOP)
    whole = CODEC.encode(audio)
    for num_quantizers in CODEC.valid_num_quantizers:
        fewer = CODEC.encode(audio, num_quantizers=num_quantizers)
        assert torch.equal(fewer.codes, whole.prefix(num_quantizers).codes)
        assert CODEC.decode(fewer).shape == audio.shape
    # A code of -1 is an absent stage, so a padded prefix decodes alike.
    absent = dataclasses.replace(whole, codes=whole.codes.clone())
    absent.codes[:, 1:] = -1
    assert torch.equal(CODEC.decode(absent), CODEC.decode(whole.prefix(1)))


def test_the_encoder_is_causal_and_the_decoder_looks_one_frame_ahead() -> None:
    codec = tiny_codec().requires_grad_(True)
    audio = torch.randn(1, 12 * HOP, requires_grad=True)
    latents, _ = codec.encode_latents(audio, codec.encoder.init_state(1))
    (gradient,) = torch.autograd.grad(latents[0, :, 5].square().mul(torch.arange(12)).sum(), audio)
    assert gradient[0, : 6 * HOP].any()
    assert not gradient[0, 6 * HOP :].any()

    latents = torch.randn(1, 12, 12, requires_grad=True)
    heard, _ = codec.decode_latents(latents, codec.decoder.init_state(1))
    aligned = heard[0, codec.decode_delay_samples :]
    (gradient,) = torch.autograd.grad(aligned[5 * HOP : 6 * HOP].sum(), latents)
    assert gradient[0, :, 6].any()
    assert not gradient[0, :, 7:].any()


def test_states_are_values() -> None:
    audio = _audio(8 * HOP)
    _, state = CODEC.encode_step(audio, CODEC.encode_init(1))
    kept = map_state(torch.clone, state)
    first, _ = CODEC.encode_step(audio, state)
    again, _ = CODEC.encode_step(audio, state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(kept), strict=True))
    assert all(part.shape[0] == 1 for part in leaves(state))


def test_one_row_of_a_batch_can_be_reset() -> None:
    audio = torch.cat([_audio(6 * HOP, seed=1), _audio(6 * HOP, seed=2)])
    _, state = CODEC.encode_step(audio, CODEC.encode_init(2))
    state = where_rows(torch.tensor([True, False]), state, CODEC.encode_init(2))
    codes, _ = CODEC.encode_step(audio, state)
    assert torch.equal(codes[1], CODEC.encode(audio[1:]).codes[0])


def test_callers_mistakes_are_value_errors() -> None:
    audio = _audio(4 * HOP)
    tokens = CODEC.encode(audio)
    with pytest.raises(ValueError, match=r"audio must be float \[B, 1, T\]"):
        CODEC.encode(audio[0])
    with pytest.raises(ValueError, match="audio must be float"):
        CODEC.encode((audio * 100).long())
    with pytest.raises(ValueError, match="NaN or infinity"):
        CODEC.encode(audio * float("inf"))
    with pytest.raises(ValueError, match=r"num_samples must be \[1\] values in 0..256"):
        CODEC.encode(audio, torch.tensor([257]))
    with pytest.raises(ValueError, match="num_quantizers=4 is not one of"):
        CODEC.encode(audio, num_quantizers=4)
    with pytest.raises(ValueError, match="made by codec 'other'"):
        CODEC.decode(dataclasses.replace(tokens, codec_id="other"))
    with pytest.raises(ValueError, match="more than the 4 frames"):
        CODEC.decode(dataclasses.replace(tokens, num_samples=torch.tensor([5 * HOP])))
    with pytest.raises(ValueError, match=r"codes must lie in -1..31"):
        CODEC.decode(dataclasses.replace(tokens, codes=tokens.codes + 32))
    with pytest.raises(ValueError, match=r"audio must be \[B, 1, n \* 64\]"):
        CODEC.encode_step(audio[:, :, :-1], CODEC.encode_init(1))
    with pytest.raises(ValueError, match="no global codes"):
        CODEC.decode_init(1, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must name 3 rates"):
        tiny_config(encoder_channels=(8, 8))
