"""BiCodec: lengths, batches, voices, how far it hears, and the speech model that it hears by."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_models import save_model
from torch import Tensor

import codec
from codec.features import SpeechModel, load_speech_model
from codec.layers.convnext import AdaptiveNorm, ConvNeXtStack
from codec.models.bicodec import BiCodec, BiCodecConfig, at_normal_volume
from codec.models.bicodec_speaker import MelMagnitudes
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.scalar import FSQConfig
from codec.testing import speech_like
from codec.tokens import Tokens

TINY: dict[str, Any] = {
    "quantizer": FactorizedVQConfig(latent_dim=14, num_stages=1, codebook_size=32, codebook_dim=4),
    "voice_quantizer": FSQConfig(latent_dim=8, levels=(4, 5, 4)),
    "num_global_codes": 5,
    "voice_dim": 18,
    "voice_samples": 4000,
    "feature_dim": 16,
    "feature_layers": (1, 3),
    "hidden_dim": 12,
    "expanded_dim": 20,
    "encoder_blocks": 3,
    "prenet_blocks": 2,
    "postnet_blocks": 1,
    "num_mels": 10,
    "mel_fft_samples": 256,
    "mel_window_samples": 160,
    "mel_hop_samples": 80,
    "speaker_channels": 16,
    "bottleneck_dim": 6,
    "num_heads": 2,
    "head_dim": 4,
    "decoder_dim": 8,
    "decoder_rates": (4, 2),
    "decoder_kernel_sizes": (8, 4),
}
HOP, FIELD = 8, 20  # of the speech model, too


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("speech") / "model", "xlsr", head="Model")


@pytest.fixture(scope="module")
def speech_model(speech_folder: Path) -> SpeechModel:
    return load_speech_model(str(speech_folder))


def _codec(speech_model: SpeechModel | None = None, **changes: Any) -> BiCodec:
    """A tiny one of random weights, whose voices differ and whose audio is loud enough to compare."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BiCodec(BiCodecConfig(**(TINY | changes)))
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and name.startswith(("prenet", "postnet", "speaker_encoder", "voice_quantizer")):
                torch.nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
            elif name.startswith("speaker_encoder") and name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    if speech_model is not None:
        made.attach_features(speech_model)
    return made.eval().requires_grad_(False)


def _audio(num_samples: int = 5000, *, seed: int = 0) -> Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None] * 0.5


# Lengths and batches


@pytest.mark.parametrize("padding", ["none", "end"])
@settings(max_examples=12, deadline=None)
@given(num_samples=st.integers(1, 200))
def test_lengths_are_exact(speech_model: SpeechModel, padding: str, num_samples: int) -> None:
    made = _codec(speech_model, feature_padding=padding)
    audio = _audio()[:, :, 2000 : 2000 + num_samples]
    tokens = made.encode(audio)
    assert tokens.codes.shape == (1, 1, -(-num_samples // HOP))
    assert made.decode(tokens).shape == audio.shape


@pytest.mark.parametrize(("rates", "kernel_sizes"), [((8,), (8,)), ((4, 2), (10, 6)), ((2, 4), (4, 12))])
def test_wave_generators_of_other_kernels_are_as_long(rates: tuple[int, ...], kernel_sizes: tuple[int, ...]) -> None:
    made = _codec(decoder_rates=rates, decoder_kernel_sizes=kernel_sizes)
    assert made.synthesize(torch.randn(1, 14, 9), 9 * HOP, torch.randn(1, 18)).shape == (1, 1, 72)


def test_a_recording_alone_gives_what_it_gives_in_a_batch(speech_model: SpeechModel) -> None:
    made, lengths = _codec(speech_model), torch.tensor([3001, 0, 5000, 800, 3001])
    rows = [_audio(seed=seed) for seed in range(5)]
    batch = torch.cat(rows)
    tokens = made.encode(batch, lengths)
    heard = made.decode(tokens)
    assert heard.shape == (5, 1, 5000)
    for row, length in enumerate(lengths.tolist()):
        alone = made.encode(rows[row][:, :, :length])
        frames = made.num_frames_for(length)
        assert torch.equal(tokens.codes[row, :, :frames], alone.codes[0])
        assert not tokens.codes[row, :, frames:].any()
        assert tokens.global_codes is not None
        assert alone.global_codes is not None
        assert torch.equal(tokens.global_codes[row], alone.global_codes[0])
        # Convolutions round otherwise with two rows than with one: to 1e-5 of the peak, as with all of these codecs.
        torch.testing.assert_close(heard[row, :, :length], made.decode(alone)[0], rtol=0, atol=1e-5)
        assert not heard[row, :, length:].any()
    padded = batch.clone()
    padded[0, :, 3001:] = 0.9
    other = made.encode(padded, lengths)
    assert torch.equal(other.codes, tokens.codes)
    assert torch.equal(other.global_codes, tokens.global_codes)  # type: ignore[arg-type]


def test_an_empty_batch_and_an_empty_recording(speech_model: SpeechModel) -> None:
    made = _codec(speech_model)
    tokens = made.encode(torch.zeros(1, 1, 0))
    assert tokens.codes.shape == (1, 1, 0)
    assert made.decode(tokens).shape == (1, 1, 0)


# Features


def test_features_without_padding_are_as_published(speech_model: SpeechModel) -> None:
    """Published: one second has 49 frames. Here their codes are the same, and the last one is repeated."""
    audio = _audio(160) * 0.002  # so little that it matters at which volume it is heard
    made, padded = _codec(speech_model), _codec(speech_model, feature_padding="end")
    features = made.features(audio)
    assert features.shape == (1, 18, 16)
    states, _ = speech_model.hidden(at_normal_volume(audio)[:, 0], padding="none")
    torch.testing.assert_close(features, (states[1] + states[3]) / 2)
    latents = made.analyze(audio)
    assert latents.shape == (1, 14, 20)
    torch.testing.assert_close(latents[:, :, :18], made.latents_of(features))
    assert torch.equal(latents[:, :, 18:], latents[:, :, 17:18].expand(-1, -1, 2))
    assert padded.features(audio).shape == (1, 20, 16)


def test_padding_at_the_end_is_of_normalised_audio() -> None:
    """So the zeros do not shift its mean, and the frames lie as without padding."""
    from codec.speech_input import Entrance

    entrance, audio = Entrance(16000, HOP, FIELD, epsilon=1e-7), torch.rand(2, 100) + 5.0
    plain, padded = entrance(audio, "none"), entrance(audio, "end")
    assert padded.shape == (2, 12 * HOP + FIELD)
    assert torch.equal(padded[:, :100], plain)
    assert not padded[:, 100:].any()
    assert entrance.num_frames(100, "end") == 13


def test_the_speech_model_is_no_part_of_the_codec(speech_model: SpeechModel) -> None:
    made = _codec(speech_model)
    assert made.state_dict().keys() == _codec().state_dict().keys()
    made.train()
    assert not speech_model.network.training
    assert all(parameter is not weight for parameter in made.parameters() for weight in speech_model.parameters())
    assert not made.features(_audio()).requires_grad


def test_the_speech_model_is_looked_for_when_it_is_needed(speech_folder: Path, tmp_path: Path) -> None:
    codec.save(_codec(), tmp_path / "a", name="tiny@1", dtype="float32")
    made = codec.load(tmp_path / "a")
    assert isinstance(made, BiCodec)
    voices = made.encode_global(_audio())
    tokens = Tokens(torch.zeros(1, 1, 5, dtype=torch.int64), torch.tensor([33]), made.codec_id, global_codes=voices)
    assert made.decode(tokens).shape == (1, 1, 33)
    with pytest.raises(ValueError, match=r"tiny@1 hears speech .* which is missing: put its folder .*features$"):
        made.encode(_audio())
    (tmp_path / "a" / "features").symlink_to(speech_folder)
    assert made.encode(_audio()).codes.shape == (1, 1, 625)
    made.analyze(_audio()).sum()  # outside of inference mode, too
    with pytest.raises(ValueError, match=r"at features$"):
        _codec().encode(_audio())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"feature_dim": 24}, "has 16 dims every 8 samples at 16000 Hz, this codec needs 24 every 8 at 16000 Hz"),
        ({"decoder_rates": (4, 4), "decoder_kernel_sizes": (8, 8)}, "needs 16 every 16"),
        ({"feature_layers": (1, 4)}, "0 to 3"),
    ],
)
def test_a_speech_model_of_another_kind_is_refused(
    speech_model: SpeechModel, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        _codec(**changes).attach_features(speech_model)


# Voices


def test_a_voice_changes_the_audio_and_not_the_codes(speech_model: SpeechModel) -> None:
    made, audio = _codec(speech_model), _audio()
    other = made.encode_global(_audio(seed=3))
    own, told = made.encode(audio), made.encode(audio, global_codes=other)
    assert not torch.equal(own.global_codes, other)  # type: ignore[arg-type]
    assert torch.equal(own.codes, told.codes)
    assert torch.equal(told.global_codes, other)  # type: ignore[arg-type]
    assert (made.decode(own) - made.decode(told)).abs().max() > 1e-3
    assert torch.equal(made.decode(replace(own, global_codes=other)), made.decode(told))


def test_the_reference_is_its_first_seconds_repeated_if_short() -> None:
    made, audio = _codec(), _audio(5000)
    assert torch.equal(made.hear_voice(audio).latents, made.hear_voice(audio[:, :, :4000]).latents)
    short = audio[:, :, :1500]
    repeated = torch.cat([short, short, short[:, :, :1000]], dim=2)
    assert torch.equal(made.hear_voice(short).latents, made.hear_voice(repeated).latents)
    assert made.hear_voice(audio).x_vector.shape == (1, 18)


def test_loudness_is_no_part_of_a_voice_unless_told() -> None:
    audio = _audio()
    made, plain = _codec(), _codec(volume_normalize=False)
    assert torch.equal(made.encode_global(audio * 0.5), made.encode_global(audio))
    assert not torch.equal(plain.encode_global(audio * 0.1), plain.encode_global(audio))
    given = audio.clone()
    made.encode_global(given)
    assert torch.equal(given, audio)  # what is given stays as it is


@pytest.mark.parametrize("global_codes", [None, torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 5), 80)])
def test_global_codes_that_are_none_are_refused(global_codes: Tensor | None) -> None:
    made = _codec()
    tokens = Tokens(torch.zeros(1, 1, 5, dtype=torch.int64), torch.tensor([40]), "", global_codes=global_codes)
    with pytest.raises(ValueError, match=r"global.codes"):
        made.decode(tokens)


def test_there_is_no_speech_without_a_voice(speech_model: SpeechModel) -> None:
    made = _codec(speech_model)
    with pytest.raises(ValueError, match="needs a voice"):
        made.synthesize(torch.zeros(1, 14, 3), 24)
    with pytest.raises(ValueError, match="cannot disguise"):
        made.analyze(_audio(), torch.ones(1))


def test_gradients_reach_all_that_is_to_be_learned(speech_model: SpeechModel) -> None:
    made, audio = _codec(speech_model).requires_grad_(True).train(), torch.cat([_audio(), _audio(seed=1)])
    heard = made.hear_voice(audio)
    voice = made.voice_vector(made.voice_quantizer(heard.latents).latents)
    quantized = made.quantizer(made.analyze(audio))
    estimate = made.reconstruct(audio, lambda latents: made.quantizer(latents).latents, voice)
    predicted = made.predict_features(made.hidden(quantized.latents, voice))
    losses = [estimate.square().mean(), predicted.square().mean(), heard.x_vector.square().mean()]
    (sum(losses, torch.zeros(())) + sum(quantized.losses.values())).backward()
    without = [name for name, parameter in made.named_parameters() if parameter.grad is None]
    assert not without


# Networks


def test_decoding_hears_as_far_as_it_says() -> None:
    made = _codec()
    before, after = made.decode_frames_before, made.decode_frames_after
    frame, num_frames = before + 2, before + after + 5
    latents = torch.randn(1, 14, num_frames, dtype=torch.float64).requires_grad_()
    made = made.double()
    audio = made.synthesize(latents, num_frames * HOP, torch.randn(1, 18, dtype=torch.float64))
    audio[:, :, frame * HOP : (frame + 1) * HOP].square().sum().backward()
    assert latents.grad is not None
    heard = latents.grad[0].abs().sum(0).nonzero()[:, 0]
    assert (frame - int(heard.min()), int(heard.max()) - frame) == (before, after)


def test_mels_are_those_of_torchaudio() -> None:
    import torchaudio

    ours = MelMagnitudes(
        sample_rate_hz=16000, fft_samples=1024, window_samples=640, hop_samples=320, num_mels=128, min_hz=10.0,
        max_hz=8000.0,
    )  # fmt: skip
    theirs = torchaudio.transforms.MelSpectrogram(
        16000, 1024, 640, 320, 10, None, n_mels=128, power=1, norm="slaney", mel_scale="slaney"
    )
    audio = _audio(96000)[:, 0]
    expected = theirs(audio).mT
    assert ours(audio).shape == (1, 301, 128)
    assert (ours(audio) - expected).abs().max() < 1e-4 * expected.max()  # filters there are of float32


def test_adaptive_norms_begin_as_plain_ones() -> None:
    stack, plain = ConvNeXtStack(6, 8, 16, 2, condition_dim=5), torch.nn.LayerNorm(8, eps=1e-6)
    norm, x = stack.norm, torch.randn(2, 7, 8)
    assert isinstance(norm, AdaptiveNorm)
    assert torch.equal(norm(x, torch.zeros(2, 5)), plain(x))
    told = norm(x, torch.randn(2, 5))
    assert 0 < (told - plain(x)).abs().max() < 1.0


def test_new_stacks_do_not_blur_time() -> None:
    """Of what an output tells, most is of its own frame, however many stacks stand in a row."""
    torch.manual_seed(0)
    stacks = [ConvNeXtStack(32, 32, 64, 2) for _ in range(9)]
    x = torch.randn(1, 41, 32, requires_grad=True)
    y = x
    for stack in stacks:
        y = stack(y)
    (y[0, 20] @ torch.randn(32)).backward()
    assert x.grad is not None
    shares = x.grad[0].square().sum(1)
    assert shares[20] > 0.25 * shares.sum()  # 0.07 with convolutions whose taps are all alike


@pytest.mark.parametrize("peak", [2.5, 0.9, 0.3, 0.05, 0.014, 0.004, 0.0003, 0.0])
def test_the_volume_is_that_of_the_published_front_end(peak: float) -> None:
    audio = speech_like(4000).astype(np.float64)
    audio = audio / np.abs(audio).max() * peak
    expected = audio
    magnitudes = np.sort(np.abs(audio))
    if peak < 0.1:
        expected = audio / max(peak, 1e-3) * 0.1
    loud = magnitudes[magnitudes > 0.01]
    if len(loud) > 10:
        volume = np.mean(loud[int(0.9 * len(loud)) : int(0.99 * len(loud))])
        expected = expected * np.clip(0.2 / volume, 0.1, 10)
        expected = expected / max(1.0, np.abs(expected).max())
    ours = at_normal_volume(torch.from_numpy(audio).float())
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be positive"),
        ({"feature_padding": "centered"}, "feature_padding='centered' is not one of"),
        ({"feature_layers": ()}, "feature_layers one or more"),
        ({"speaker_channels": 12}, "speaker_channels=12"),
        ({"mel_window_samples": 300}, "mel_window_samples=300"),
        ({"mel_min_hz": 8000.0}, "mel_min_hz"),
        ({"voice_samples": 128}, "voice_samples=128"),
        ({"decoder_rates": ()}, "decoder_rates"),
        ({"decoder_kernel_sizes": (8,)}, "decoder_kernel_sizes"),
        ({"decoder_kernel_sizes": (7, 4)}, "decoder_kernel_sizes"),
        ({"decoder_dim": 6}, "decoder_dim=6"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BiCodecConfig(**(TINY | changes))


def test_a_voice_quantizer_has_one_row() -> None:
    with pytest.raises(ValueError, match="one row"):
        _codec(voice_quantizer=FSQConfig(latent_dim=8, levels=(4, 4), num_stages=2))


def test_configurations_survive_json(tmp_path: Path) -> None:
    made = _codec()
    codec.save(made, tmp_path, name="tiny@1")
    loaded = codec.load(tmp_path)
    assert loaded.config == made.config
    assert {f.name for f in fields(made.config)} >= {"feature_padding", "voice_samples"}
