"""Our own codec with semantic and global codes: bits, lengths, causality, and who hears the voice."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import codec
from codec.config import build, from_dict
from codec.layers.causal import Linear, leaves, where_rows
from codec.layers.pitch import track_pitch
from codec.models.interface import UNLIMITED, AudioCodec
from codec.models.multirate import MultirateConfig
from codec.models.semantic_global import SemanticGlobalCodec
from codec.models.voice import VoicedCodec
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like, tiny_codec, tiny_config, tiny_voiced_codec, tiny_voiced_config

CODEC = tiny_voiced_codec()
HOP = CODEC.hop_length
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "model" / "semantic_global_16k.yaml"


def _audio(num_samples: int, *, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None]


def test_it_says_what_it_is() -> None:
    assert isinstance(CODEC, AudioCodec)
    assert isinstance(CODEC, VoicedCodec)
    assert (CODEC.hop_length, CODEC.decode_delay_samples, CODEC.encode_delay_samples) == (64, 64, 0)
    assert CODEC.codebook_sizes == (48, 32, 32, 32)
    assert CODEC.valid_num_quantizers == (1, 2, 3, 4)
    assert (CODEC.num_global_codes, CODEC.global_codebook_size, CODEC.num_semantic_quantizers) == (4, 64, 1)
    assert tiny_codec().num_global_codes == 0


def test_the_rates_of_the_published_configuration() -> None:
    model: SemanticGlobalCodec = build(from_dict(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))))
    assert model.sample_rate_hz / model.hop_length == 50
    assert model.bitrate_bps(1) == 600
    assert model.bitrate_bps() == 4600
    assert model.num_global_codes * (model.global_codebook_size - 1).bit_length() == 384
    assert model.voice_samples == 3 * model.sample_rate_hz


@pytest.mark.parametrize("num_samples", [0, 1, HOP - 1, HOP, HOP + 1, 10 * HOP, 300 * HOP + 17])
def test_lengths_are_exact(num_samples: int) -> None:
    tokens = CODEC.encode(_audio(num_samples))
    assert tokens.codes.shape == (1, 4, -(-num_samples // HOP))
    assert tokens.global_codes is not None
    assert tokens.global_codes.shape == (1, 4)
    assert CODEC.decode(tokens).shape == (1, 1, num_samples)


@given(cuts=st.lists(st.integers(0, 7), min_size=1, max_size=10), batch_size=st.integers(1, 3))
@settings(max_examples=25)
def test_steps_give_the_bits_of_the_whole(num_threads: int, cuts: list[int], batch_size: int) -> None:
    audio = torch.cat([_audio(sum(cuts) * HOP, seed=seed) for seed in range(batch_size)])
    tokens = CODEC.encode(audio)
    state = CODEC.encode_init(batch_size)
    parts = []
    for piece in audio.split([cut * HOP for cut in cuts], dim=2):
        codes, state = CODEC.encode_step(piece, state)
        parts.append(codes)
    assert torch.equal(torch.cat([*parts, CODEC.encode_flush(state)], dim=2), tokens.codes)

    state = CODEC.decode_init(batch_size, tokens.global_codes)
    parts = []
    for piece in tokens.codes.split(cuts, dim=2):
        heard, state = CODEC.decode_step(piece, state)
        parts.append(heard)
    joined = torch.cat([*parts, CODEC.decode_flush(state)], dim=2)[:, :, CODEC.decode_delay_samples :]
    assert torch.equal(joined, CODEC.decode(tokens))


@given(lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=4), extra=st.integers(0, 3 * HOP))
@settings(max_examples=25)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(num_threads: int, lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    audio = torch.full((len(lengths), 1, width), 0.7)  # what lies past a row's end must not matter
    for row, length in enumerate(lengths):
        audio[row, :, :length] = _audio(length, seed=row)[0]
    tokens = CODEC.encode(audio, torch.tensor(lengths))
    heard = CODEC.decode(tokens)
    assert tokens.global_codes is not None
    for row, length in enumerate(lengths):
        alone = CODEC.encode(_audio(length, seed=row))
        assert alone.global_codes is not None
        assert torch.equal(tokens.codes[row, :, : alone.codes.shape[2]], alone.codes[0])
        assert torch.equal(tokens.global_codes[row], alone.global_codes[0])
        assert torch.equal(heard[row, :, :length], CODEC.decode(alone)[0])
        assert not heard[row, :, length:].any()


def test_prefixes_are_what_fewer_quantizers_encode() -> None:
    audio = _audio(20 * HOP)
    whole = CODEC.encode(audio)
    for num_quantizers in CODEC.valid_num_quantizers:
        fewer = CODEC.encode(audio, num_quantizers=num_quantizers)
        assert torch.equal(fewer.codes, whole.prefix(num_quantizers).codes)
        absent = dataclasses.replace(whole, codes=whole.codes.clone())
        absent.codes[:, num_quantizers:] = -1
        assert torch.equal(CODEC.decode(absent), CODEC.decode(fewer))


def test_the_voice_is_of_the_first_seconds_and_of_no_more() -> None:
    audio = _audio(9000)
    changed = audio.clone()
    changed[:, :, CODEC.voice_samples :] = 0.3
    before, after = CODEC.encode(audio).global_codes, CODEC.encode(changed).global_codes
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert torch.equal(before, CODEC.encode_global(audio[:, :, : CODEC.voice_samples]))
    others = {tuple(CODEC.encode_global(torch.rand(1, 1, 4000) * n).flatten().tolist()) for n in range(1, 5)}
    assert len(others) > 1


def test_a_given_voice_changes_what_is_heard_and_no_code_of_a_frame() -> None:
    audio, other = _audio(5000), torch.tensor([[1, 2, 3, 4]])
    own, given = CODEC.encode(audio), CODEC.encode(audio, global_codes=other)
    assert given.global_codes is not None
    assert torch.equal(given.codes, own.codes)
    assert torch.equal(given.global_codes, other)
    assert not torch.equal(CODEC.decode(given), CODEC.decode(own))


def test_of_loudness_the_voice_knows_nothing() -> None:
    noise = torch.rand(2, 1, 4000, generator=torch.Generator().manual_seed(0)) - 0.5
    noise[1] = noise[1].cumsum(1) / 10
    loud, other = CODEC.hear_voice(noise).x_vector
    torch.testing.assert_close(CODEC.hear_voice(0.25 * noise[:1]).x_vector[0], loud, rtol=0, atol=0.02)
    assert not torch.allclose(other, loud, atol=0.2)


def test_the_encoder_is_causal_and_the_decoder_looks_one_frame_ahead() -> None:
    model = tiny_voiced_codec().requires_grad_(True)
    audio = torch.randn(1, 1, 12 * HOP, requires_grad=True)
    for dims in (slice(0, 8), slice(8, 20)):
        latents = model.analyze(audio)
        weights = torch.arange(latents[:, dims].shape[1])
        (gradient,) = torch.autograd.grad(latents[0, dims, 5].square().mul(weights).sum(), audio)
        assert gradient[0, 0, 5 * HOP : 6 * HOP].any()
        assert not gradient[0, 0, 6 * HOP :].any()

    latents = torch.randn(1, 20, 12, requires_grad=True)
    heard = model.synthesize(latents, 11 * HOP, torch.randn(1, 16))[0, 0]
    (gradient,) = torch.autograd.grad(heard[5 * HOP : 6 * HOP].sum(), latents)
    assert gradient[0, :, 6].any()
    assert not gradient[0, :, 7:].any()


def test_the_decoder_hears_as_far_back_as_it_says() -> None:
    tokens = CODEC.encode(_audio(200 * HOP))
    changed = dataclasses.replace(tokens, codes=tokens.codes.clone())
    changed.codes[:, :, 0] = (changed.codes[:, :, 0] + 1) % 32
    before, after = CODEC.decode(tokens), CODEC.decode(changed)
    # The phase of the pulses goes on from there for ever.
    assert CODEC.decode_frames_before == UNLIMITED
    assert not torch.equal(before[:, :, 150 * HOP :], after[:, :, 150 * HOP :])


def test_one_row_of_a_batch_can_begin_anew_with_another_voice() -> None:
    codes = CODEC.encode(torch.cat([_audio(6 * HOP, seed=1), _audio(6 * HOP, seed=2)])).codes
    voices = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    _, state = CODEC.decode_step(codes, CODEC.decode_init(2, voices[:2]))
    fresh = CODEC.decode_init(2, voices[[0, 2]])
    heard, _ = CODEC.decode_step(codes, where_rows(torch.tensor([True, False]), state, fresh))
    alone, _ = CODEC.decode_step(codes[1:], CODEC.decode_init(1, voices[2:]))
    assert torch.equal(heard[1:], alone)
    assert all(part.shape[0] == 2 for part in leaves(state))


def test_a_disguise_is_heard_by_the_semantic_encoder_alone() -> None:
    audio = torch.cat([_audio(4000)] * 3)
    plain, disguised = CODEC.analyze(audio), CODEC.analyze(audio, torch.tensor([1.0, 0.8, 1.25]))
    torch.testing.assert_close(disguised[0], plain[0])
    assert torch.equal(disguised[:, 8:], plain[:, 8:])
    for row in (1, 2):
        assert not torch.allclose(disguised[row, :8], plain[row, :8], atol=0.1)


def test_reconstruction_is_in_the_voice_that_is_given_or_else_in_its_own() -> None:
    audio = _audio(6000)
    own = CODEC.reconstruct(audio, lambda latents: latents)
    voice = CODEC.voice_of(CODEC.encode_global(audio))
    assert torch.equal(CODEC.reconstruct(audio, lambda latents: latents, voice), own)
    assert not torch.allclose(CODEC.reconstruct(audio, lambda latents: latents, -voice), own, atol=1e-3)


def test_frames_of_row_0_alone_are_pulses_and_noise_and_nothing_else() -> None:
    silent = tiny_voiced_codec()
    with torch.no_grad():
        silent.decoder.shape_source.weight.zero_()
        assert silent.decoder.shape_source.bias is not None
        silent.decoder.shape_source.bias.fill_(-50.0)
    tokens = silent.encode(_audio(12 * HOP))
    assert silent.decode(tokens.prefix(1)).abs().max() < 1e-15
    frames = silent.decode(tokens).unflatten(2, (12, HOP)).abs().amax(3)[0, 0]
    assert (frames > 1e-4).all()  # the last one, too
    some = dataclasses.replace(tokens, codes=tokens.codes.clone())
    some.codes[:, 1:, 4:7] = -1
    frames = silent.decode(some).unflatten(2, (12, HOP)).abs().amax(3)[0, 0]
    assert [bool(loud) for loud in frames > 1e-4] == [True] * 4 + [False] * 3 + [True] * 5
    # What training sees is the same.
    latents = silent.quantizer(silent.analyze(_audio(12 * HOP)), num_quantizers=1).latents
    assert silent.synthesize(latents, 12 * HOP, torch.zeros(1, 16)).abs().max() < 1e-15


def test_training_has_pulses_at_the_pitch_of_the_audio_and_teaches_the_decoder_its_own() -> None:
    model = tiny_voiced_codec().requires_grad_(True)
    with torch.no_grad():  # pulses alone, as loud as can be
        for layer in model.decoder.layers:
            if isinstance(layer, Linear) and layer.weight.shape[0] == 4:
                layer.weight.zero_()
        bias = model.decoder.shape_source.bias
        assert bias is not None
        bias[1:41] = 0.0
        bias[41:] = -20.0
    time = torch.arange(16000) / 16000
    harmonics = torch.arange(1, 20)[:, None]
    audio = torch.sin(2 * torch.pi * 150 * harmonics * time).mean(0)[None, None]
    voice = torch.zeros(1, 16)
    heard, losses = model.reconstruct_for_training(audio, lambda latents: latents, voice)
    assert heard.shape == audio.shape
    pitch_hz, is_voiced = track_pitch(heard[0], sample_rate_hz=16000, hop_samples=160)
    assert is_voiced[0, 10:-10].all()
    torch.testing.assert_close(pitch_hz[0, 10:-10], torch.full((80,), 150.0), rtol=0.01, atol=0)
    # Alone it speaks at a pitch of its own, and learns which one it should be.
    own_hz, _ = track_pitch(
        model.reconstruct(audio, lambda latents: latents, voice)[0], sample_rate_hz=16000, hop_samples=160
    )
    error = (own_hz[0, 10:-10].log() - math.log(150.0)).abs().median()
    assert error > 0.02
    assert 0.5 * error < losses["pitch"] < 2.0 * error  # a mean, and of the first and last rows, too
    losses["pitch"].backward()
    assert model.decoder.shape_source.weight.grad is not None
    assert model.decoder.shape_source.weight.grad[0].any()
    assert not model.decoder.shape_source.weight.grad[1:].any()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    codec.save(CODEC, tmp_path / "voiced", name="voiced@1", dtype="float32")
    loaded = codec.load(tmp_path / "voiced")
    audio = _audio(5000)
    tokens = loaded.encode(audio)
    assert torch.equal(tokens.codes, CODEC.encode(audio).codes)
    assert tokens.global_codes is not None
    expected = CODEC.decode(dataclasses.replace(tokens, codec_id=CODEC.codec_id))
    assert torch.equal(loaded.decode(tokens), expected)


def test_names_of_weights_are_those_of_the_multirate_family() -> None:
    own, theirs = CODEC.state_dict(), tiny_codec().state_dict()
    shared = {name for name in theirs if name.startswith(("encoder.", "decoder."))}
    assert shared
    for name in shared:
        assert own[name].shape == theirs[name].shape


def test_callers_mistakes_are_value_errors() -> None:
    tokens = CODEC.encode(_audio(1000))
    with pytest.raises(ValueError, match=r"needs global codes, int64 \[1, 4\] in 0..63"):
        CODEC.decode(dataclasses.replace(tokens, global_codes=None))
    with pytest.raises(ValueError, match=r"global_codes must be int64 \[1, 4\] in 0..63, got torch.int64 \(1, 3\)"):
        CODEC.encode(_audio(1000), global_codes=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got 0\.\.64"):
        CODEC.decode_init(1, torch.tensor([[0, 1, 2, 64]]))
    with pytest.raises(ValueError, match=r"got -1\.\.2"):
        CODEC.decode_init(1, torch.tensor([[0, 1, 2, -1]]))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        CODEC.decode_init(1, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="needs a voice"):
        CODEC.synthesize(torch.zeros(1, 20, 5), 64)
    with pytest.raises(ValueError, match=r"audio must be \[B, 1, n \* 64\]"):
        CODEC.encode_step(torch.zeros(1, 1, 65), CODEC.encode_init(1))
    with pytest.raises(ValueError, match="codes must be int64"):
        CODEC.decode_step(torch.zeros(1, 1, 2), CODEC.decode_init(1, tokens.global_codes))


def test_impossible_configurations() -> None:
    with pytest.raises(ValueError, match="must be of type 'semantic_acoustic'"):
        tiny_voiced_config(quantizer=ResidualVQConfig(latent_dim=12, num_stages=3))
    with pytest.raises(ValueError, match="num_global_codes must be positive, got 0"):
        tiny_voiced_config(num_global_codes=0)
    with pytest.raises(ValueError, match=r"semantic_cepstra=81 is not in 1\.\.80"):
        tiny_voiced_config(semantic_cepstra=81)
    with pytest.raises(ValueError, match="speaker_channels must be 8 or more"):
        tiny_voiced_config(speaker_channels=7)
    with pytest.raises(ValueError, match="a multiple of 2 samples"):
        tiny_voiced_config(patch_samples=3, strides=(1, 1))
    one_rate = {f"{part}_{what}": (8,) for part in ("encoder", "decoder") for what in ("channels", "blocks")}
    with pytest.raises(ValueError, match="strides must name at least one"):
        tiny_voiced_config(strides=(), **one_rate)
    assert {f.name for f in dataclasses.fields(MultirateConfig)} <= {
        f.name for f in dataclasses.fields(tiny_voiced_config())
    }
    assert tiny_config().kernel_size == tiny_voiced_config().kernel_size
