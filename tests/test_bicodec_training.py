"""How BiCodec is trained: features of more than the crop, references at one volume, a frozen speech model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import DictConfig, OmegaConf
from runs import LIGHTNING_WARNINGS, tiny_run, write_recordings
from speech_models import save_model
from torch import Tensor

import codec
from codec.config import build, to_dict
from codec.features import load_speech_model
from codec.models.bicodec import BiCodec, BiCodecConfig
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.scalar import FSQConfig
from codec.testing import speech_like
from recipes.crops import Place
from recipes.data import Batch, SpeechData, collate
from recipes.module import CodecTraining
from recipes.recordings import Recording
from recipes.settings import VoiceSettings, parse
from recipes.train import train
from recipes.voice import VoiceTraining
from tools.export import export

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

HOP = 320
TINY = BiCodecConfig(
    quantizer=FactorizedVQConfig(latent_dim=12, num_stages=1, codebook_size=16, codebook_dim=4),
    voice_quantizer=FSQConfig(latent_dim=4, levels=(4, 4, 4)),
    num_global_codes=3,
    voice_dim=10,
    voice_samples=6400,
    feature_dim=16,
    feature_layers=(1, 2),
    feature_padding="end",
    hidden_dim=8,
    expanded_dim=12,
    num_stages=1,
    encoder_blocks=1,
    prenet_blocks=1,
    postnet_blocks=1,
    num_mels=8,
    mel_fft_samples=512,
    mel_window_samples=320,
    speaker_channels=8,
    bottleneck_dim=4,
    num_heads=1,
    head_dim=4,
    decoder_dim=16,
)
WEIGHTS = {"commitment": 0.25, "codebook": 2.0, "features": 1.0}
OVERRIDES = (
    *(f"++loss.weights.{name}={weight}" for name, weight in WEIGHTS.items()),
    *("data.reference_samples=6400", "data.context_samples=640", "quantization.start_step=0", "weight_norm=true"),
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"), num_samples=32000)


@pytest.fixture(scope="module")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a frame in 20 ms, as the codec has."""
    return save_model(tmp_path_factory.mktemp("speech") / "model", "w2v-bert", head="Model")


@pytest.fixture
def made(speech_folder: Path) -> BiCodec:
    torch.manual_seed(0)
    made: BiCodec = build(TINY)
    made.attach_features(load_speech_model(str(speech_folder)))
    return made


def _audio(num_samples: int, *, seed: int = 0) -> Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None]


# Crops and what surrounds them


def _crops(folder: Path, **values: Any) -> Any:
    settings = {"train_dir": str(folder), "dev_dir": str(folder), "num_workers": 0, "crop_samples": 4000}
    data = SpeechData({**settings, "dev_crop_samples": 4000, **values}, sample_rate_hz=16000, seed=3)
    data.setup()
    return data.crops()


def test_a_crop_is_the_middle_of_what_surrounds_it(tmp_path: Path) -> None:
    ramp = np.arange(1, 9001) / 2**16
    soundfile.write(tmp_path / "ramp.wav", ramp, 16000, subtype="FLOAT")
    plain, wide = _crops(tmp_path, min_rms_db=-80.0), _crops(tmp_path, min_rms_db=-80.0, context_samples=1600)
    for item in range(10):
        crop = wide[item]
        assert torch.equal(crop.audio, plain[item].audio)
        assert plain[item].surround is None
        first = crop.place.first_sample
        expected = np.pad(ramp, 1600)[first : first + 7200]  # silence where there is no more of the recording
        np.testing.assert_allclose(crop.surround[0].numpy(), expected, atol=1e-7)
    batch = collate([wide[0], wide[1]])
    assert batch.surround is not None
    assert batch.surround.shape == (2, 1, 7200)
    assert collate([plain[0]]).surround is None


def test_quiet_crops_are_told_by_themselves_not_by_their_surroundings(tmp_path: Path) -> None:
    """What is loud around a crop must not keep it: the crops are those that are drawn without context."""
    audio = np.where(np.arange(40000) // 4000 % 2, 0.3, 1e-4) * np.sin(np.arange(40000))
    soundfile.write(tmp_path / "a.wav", audio, 16000)
    plain, wide = _crops(tmp_path), _crops(tmp_path, context_samples=3200)
    assert all(torch.equal(plain[item].audio, wide[item].audio) for item in range(20))


def test_reverberation_takes_what_surrounds_a_crop(tmp_path: Path) -> None:
    write_recordings(tmp_path / "audio")
    crops = _crops(tmp_path / "audio", reverb_probability=1.0, context_samples=1600)
    crop = crops[0]
    assert crop.surround.shape == (1, 7200)
    assert torch.equal(crop.surround[:, 1600:5600], crop.audio)


# The step


def test_features_are_those_of_the_surroundings(made: BiCodec) -> None:
    whole = _audio(9600)
    inner, seen = whole[:, :, 1600:8000], []

    def quantize(latents: Tensor) -> Tensor:
        seen.append(latents)
        return latents

    voice = torch.randn(1, 10)
    audio, losses = made.reconstruct_for_training(inner, quantize, voice, surround=whole)
    features = made.features(whole)[:, 5:25]
    torch.testing.assert_close(seen[0], made.latents_of(features))
    assert audio.shape == inner.shape
    predicted = made.predict_features(made.hidden(seen[0], voice))
    torch.testing.assert_close(losses["features"], (predicted - features).square().mean())
    alone, _ = made.reconstruct_for_training(inner, quantize, voice)
    torch.testing.assert_close(seen[1], made.analyze(inner))
    assert (alone - audio).abs().max() > 0
    with pytest.raises(ValueError, match="1500 samples of context are not whole frames"):
        made.reconstruct_for_training(whole[:, :, 1500:8100], quantize, voice, surround=whole)


def test_the_features_loss_knows_only_frames_that_there_are(speech_folder: Path) -> None:
    """Without padding the last frame has no features, and takes part in nothing but the audio."""
    torch.manual_seed(0)
    made: BiCodec = build(BiCodecConfig(**(vars(TINY) | {"feature_padding": "none"})))
    made.attach_features(load_speech_model(str(speech_folder)))
    audio, voice = _audio(6400), torch.randn(1, 10)
    estimate, losses = made.reconstruct_for_training(audio, lambda latents: latents, voice)
    features = made.features(audio)
    num_frames = features.shape[1]
    assert num_frames < 20
    predicted = made.predict_features(made.hidden(made.analyze(audio), voice))[:, :num_frames]
    torch.testing.assert_close(losses["features"], (predicted - features).square().mean())
    assert estimate.shape == audio.shape


def test_the_voice_is_the_x_vector_first_and_heard_at_one_volume(made: BiCodec) -> None:
    reference = torch.cat([_audio(6400), _audio(6400, seed=1)])
    places = 2 * (Place("here", Recording("a.wav"), 0),)
    training = VoiceTraining(made.eval(), VoiceSettings(warmup_steps=2))
    before, losses = training.voices(reference, 1)
    assert not losses
    torch.testing.assert_close(before, made.hear_voice(made.levelled(reference)).x_vector)
    after, losses = training.voices(reference, 2)
    torch.testing.assert_close(after, made.voice_of(made.encode_global(reference)))
    torch.testing.assert_close(losses["speaker"], (after - before).square().mean())
    losses["speaker"].backward()
    assert made.from_voice_latents.weight.grad is not None
    assert made.speaker_encoder.ecapa.leave.weight.grad is None  # x-vectors are not drawn to voice vectors
    softer, _ = training.voices(reference * 0.5, 2)
    torch.testing.assert_close(softer, after)
    draws = torch.Generator().manual_seed(0)
    batch = Batch(reference[:, :, :3200], torch.arange(2), places, reference, surround=None)
    audio, losses = training.reconstruct(batch, lambda latents: latents, 2, draws)
    assert losses.keys() == {"speaker", "features"}
    assert audio.shape == (2, 1, 3200)


# Runs


def test_a_run_trains_exports_and_encodes(recordings: Path, speech_folder: Path, tmp_path: Path) -> None:
    config = tiny_run(
        recordings,
        tmp_path / "run",
        *(f"features={speech_folder}", "trainer.max_steps=4", *OVERRIDES),
        model=to_dict(TINY),
        voice={"warmup_steps": 2, "speaker_weight": 1.0},
    )
    module = train(config)
    made = module.codec
    assert isinstance(made, BiCodec)
    (speech_model,) = made._speech_models
    # Validation is over, and training went on after it: the speech model heard all of it as it is.
    assert made.training
    assert not any(part.training for part in speech_model.modules())
    published = load_speech_model(str(speech_folder)).state_dict()
    assert all(torch.equal(value, published[name]) for name, value in speech_model.state_dict().items())
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for name in state["state_dict"] if "speech_model" in name or "network" in name]
    logged = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/features", "train/speaker", "train/commitment"} <= set(logged)
    export(tmp_path / "run", tmp_path / "model", name="tiny@1", dtype="float32")
    loaded = codec.load(tmp_path / "model")
    assert all("parametrizations" not in name for name in loaded.state_dict())
    audio = _audio(8000)
    tokens = loaded.encode(audio)
    assert tokens.codes.shape == (1, 1, 25)
    assert loaded.decode(tokens).shape == audio.shape
    # Another export over it, and a run from it, which finds the speech model beside its weights.
    export(tmp_path / "run", tmp_path / "model", name="tiny@1", dtype="float32")
    again = tiny_run(recordings, tmp_path / "next", "trainer.max_steps=1", *OVERRIDES, model=to_dict(TINY))
    again.init_from = str(tmp_path / "model")
    assert isinstance(train(again).codec, BiCodec)


def test_a_run_is_learning(recordings: Path, speech_folder: Path, tmp_path: Path) -> None:
    """The same two items over and over: what is heard and what the postnet predicts both get better."""
    config = tiny_run(
        recordings, tmp_path, f"features={speech_folder}", *OVERRIDES, model=to_dict(TINY), voice={"warmup_steps": 0}
    )
    settings = parse(config)
    torch.manual_seed(0)
    made: BiCodec = build(TINY)
    made.attach_features(load_speech_model(settings.features or ""))
    module = CodecTraining(made, settings)
    audio = torch.cat([_audio(6400), _audio(6400, seed=1)])
    places = 2 * (Place("here", Recording("a.wav"), 0),)
    assert module.voice is not None
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    history = []
    for step in range(40):
        estimate, losses = module.voice.reconstruct(
            Batch(audio, torch.arange(2), places), lambda latents: latents, step, torch.Generator()
        )
        heard = module.reconstruction(estimate, audio)
        loss = sum([*heard.values(), *losses.values()], torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((float(heard["spectral_mel"].detach()), float(losses["features"].detach())))
    assert history[-1][0] < 0.6 * history[0][0]
    assert history[-1][1] < 0.6 * history[0][1]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ((), "features is needed: the folder of the speech model"),
        (("features=nowhere",), "features: nowhere holds no model.safetensors"),
        (("features={folder}", "model.feature_dim=24"), "features: model has 16 dims"),
        (("features={folder}", "data.context_samples=300"), "data.context_samples must be whole frames, of 320"),
        (("features={folder}", "++voice.disguise=[0.8,1.2]"), "voice.disguise: this model cannot hide voices"),
    ],
)
def test_mistakes_are_told_before_the_first_step(
    recordings: Path, speech_folder: Path, tmp_path: Path, overrides: tuple[str, ...], complaint: str
) -> None:
    told = [override.format(folder=speech_folder) for override in overrides]
    plain = tiny_run(recordings, tmp_path / "run", *OVERRIDES, model=to_dict(TINY))
    config = OmegaConf.merge(plain, OmegaConf.from_dotlist([override.lstrip("+") for override in told]))
    assert isinstance(config, DictConfig)
    with pytest.raises(ValueError, match=complaint):
        train(config)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [("features=x", "features: this model hears audio itself"), ("data.context_samples=320", "nothing hears it")],
)
def test_what_other_models_do_not_hear_is_refused(
    recordings: Path, tmp_path: Path, override: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(tiny_run(recordings, tmp_path / "run", override))
