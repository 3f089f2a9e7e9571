"""Frozen speech models: where frames lie, what layers are called, rows apart, and folders that cannot be loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech_models import KINDS, LABELS, save_model
from torch import Tensor

from codec.features import Features, SpeechModel, at_frames, load_ctc_model, load_speech_model
from codec.speech_input import Entrance

transformers = pytest.importorskip("transformers")
torchaudio = pytest.importorskip("torchaudio")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of every kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def hubert(folders: dict[str, Path]) -> SpeechModel:
    return load_speech_model(str(folders["hubert"]))


def _audio(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Models


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_published_model(kind: str, folders: dict[str, Path]) -> None:
    """Without padding, all is as `transformers` computes it; the last layer is the model's output."""
    model = load_speech_model(str(folders[kind]))
    network = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folders[kind])
    audio = _audio(1, 6000) + 0.3
    inputs = extractor(audio[0].numpy(), sampling_rate=16000, return_tensors="pt", pad_to_multiple_of=None)
    with torch.no_grad():
        expected = network(**inputs, output_hidden_states=True)
    states, num_frames = model.hidden(audio, padding="none")
    assert states.shape == (4, 1, int(num_frames), 16)
    assert (model.num_layers, model.feature_dim, model.sample_rate_hz) == (3, 16, 16000)
    # Log-mels are made in float64 here, in float32 there.
    tolerance = 1e-3 if kind == "w2v-bert" else 1e-5
    for layer in range(3):
        assert torch.allclose(states[layer], expected.hidden_states[layer], atol=tolerance), layer
    assert torch.allclose(states[3], expected.last_hidden_state, atol=tolerance)


@pytest.mark.parametrize("padding", ["centered", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_influence_one_another(kind: str, padding: str, folders: dict[str, Path]) -> None:
    model = load_speech_model(str(folders[kind]))
    unit = 100 if kind == "w2v-bert" else 10
    audio, lengths = _audio(3, 30 * unit), torch.tensor([30 * unit, 17 * unit, 30 * unit])
    audio[1] += 0.5  # each row has its own mean
    states, num_frames = model.hidden(audio, lengths, padding=padding)
    for row, length in enumerate(lengths.tolist()):
        alone, (num_alone,) = model.hidden(audio[row : row + 1, :length], padding=padding)
        assert num_alone == num_frames[row]
        assert torch.allclose(states[:, row, :num_alone], alone[:, 0], atol=2e-5)
        assert not states[:, row, num_alone:].any()
    if padding == "centered":
        assert num_frames.tolist() == [-(-length // model.stride_samples) for length in lengths.tolist()]


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [((8, 4), (4, 2)), ((10, 3, 2), (5, 2, 2)), ((5, 3), (5, 1)), ((6, 1), (3, 1)), ((2, 1), (4, 1))],
)
def test_centered_frames_hear_what_lies_around_their_middle(
    kernels: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
) -> None:
    """Samples are changed one by one; layer 0, without its convolution over positions, is local."""
    folder = save_model(
        tmp_path / "m",
        "xlsr",
        normalize=False,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_dim=(8,) * len(kernels),
        num_feat_extract_layers=len(kernels),
    )
    model = load_speech_model(str(folder))
    with torch.no_grad():  # through its weight norm
        model.network.encoder.pos_conv_embed.conv.parametrizations.weight.original0.zero_()  # type: ignore
    stride = model.stride_samples
    num_samples = 6 * stride + 1
    audio = _audio(1, num_samples).expand(1 + num_samples, -1).clone()
    audio[1:] += torch.eye(num_samples)
    states, num_frames = model.hidden(audio)
    assert num_frames[0] == 7
    changed = (states[0, 1:] != states[0, :1]).any(2)  # [sample, frame]
    for frame in (2, 3):
        heard = changed[:, frame].nonzero()[:, 0] + 0.5
        assert len(heard) == model.entrance.field_samples
        assert abs(float(heard.mean()) - (frame + 0.5) * stride) <= 0.5
    if model.entrance.field_samples >= stride:
        assert changed[[0, -1], [0, -1]].all()


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 300))
def test_all_geometries_have_a_frame_for_each_stride(stride: int, field: int, num_samples: int) -> None:
    entrance = Entrance(16000, stride, field)
    padded = entrance(torch.arange(1.0, num_samples + 1)[None], "centered")
    frames = padded.unfold(1, field, stride)[0]
    assert len(frames) == entrance.num_frames(num_samples, "centered") == -(-num_samples // stride)
    assert padded.shape[1] == (len(frames) - 1) * stride + field
    before = (field - stride) // 2
    for index, frame in enumerate(frames):
        places = torch.arange(field) + index * stride - before  # of samples
        inside = (places >= 0) & (places < num_samples)
        assert torch.equal(frame, torch.where(inside, places + 1, 0).float())


def test_centered_log_mels_are_symmetric_about_frames() -> None:
    """A click in the middle of a frame sounds alike in both of its columns, and more than in any other."""
    filters = torch.ones(257, 1).double()
    window = torch.signal.windows.hann(400, dtype=torch.float64)
    entrance = Entrance(16000, 320, 560, mel_filters=filters, window=window, num_columns=2)
    audio = torch.zeros(1, 10 * 320)
    audio[0, 4 * 320 + 159 : 4 * 320 + 161] = 0.5
    columns = entrance(audio, "centered")[0]
    assert columns.shape == (10, 2)
    assert columns[4, 0] == pytest.approx(float(columns[4, 1]), abs=0.01)
    others = columns.flatten()[[*range(8), *range(10, 20)]]
    assert columns[4].min() > others.max() + 1
    # A clip's end that no column hears counts for nothing, and becomes the mean.
    assert torch.equal(entrance(_audio(1, 330), "centered")[0, 1, 1:], torch.zeros(1))


def test_layers_can_be_one_or_the_mean_of_several(hubert: SpeechModel) -> None:
    audio, lengths = _audio(2, 200), torch.tensor([200, 120])
    states, num_frames = hubert.hidden(audio, lengths)
    for layers, expected in [
        ("last", states[3]),
        (0, states[0]),
        (2, states[2]),
        ((1, 3), (states[1] + states[3]) / 2),
        ([0, 1, 2, 3], states.mean(0)),
    ]:
        features = hubert(audio, lengths, layers=layers)
        assert torch.allclose(features.values, expected, atol=1e-6)
        assert torch.equal(features.num_frames, num_frames)
    for wrong in (4, -1, (), (1, 4), "first", (True,)):
        with pytest.raises(ValueError, match=r"layers=.*hubert has \"last\" and 0 to 3"):
            hubert(audio, layers=wrong)


def test_models_are_frozen_and_exact(hubert: SpeechModel) -> None:
    audio = _audio(1, 200).requires_grad_()
    expected, _ = hubert.hidden(audio)
    parent = torch.nn.ModuleList([copy.deepcopy(hubert)]).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = parent[0].hidden(audio)  # type: ignore
    assert states.dtype == torch.float32
    assert not states.requires_grad
    assert torch.equal(states, expected)


@pytest.mark.parametrize("kind", ["hubert", "w2v-bert"])
def test_recognisers_tell_labels_and_their_probabilities(kind: str, folders: dict[str, Path]) -> None:
    model = load_ctc_model(str(folders[kind]))
    assert (list(model.labels), model.blank, model.delimiter) == (LABELS, 0, "|")
    audio, lengths = _audio(2, 6000), torch.tensor([6000, 4000])
    log_probs, num_frames = model.log_probs(audio, lengths, padding="none")
    assert log_probs.shape == (2, int(num_frames.max()), len(LABELS))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folders[kind])
    network = transformers.AutoModelForCTC.from_pretrained(folders[kind]).eval()
    inputs = extractor(audio[1, :4000].numpy(), sampling_rate=16000, return_tensors="pt", pad_to_multiple_of=None)
    with torch.no_grad():
        expected = network(**inputs).logits.log_softmax(-1)[0]
    tolerance = 1e-3 if kind == "w2v-bert" else 1e-5
    assert torch.allclose(log_probs[1, : num_frames[1]], expected, atol=tolerance)
    assert not log_probs[1, num_frames[1] :].any()
    assert model.train() is model
    assert not model.network.training
    centered, num_frames = model.log_probs(audio, lengths)
    assert num_frames.tolist() == [-(-length // model.stride_samples) for length in (6000, 4000)]
    assert torch.allclose(centered[0].exp().sum(1), torch.ones(centered.shape[1]), atol=1e-5)


def test_audio_that_cannot_be_is_a_clear_error(hubert: SpeechModel) -> None:
    with pytest.raises(ValueError, match=r"audio must be floating-point \[B, T\], not torch\.float32 \[100\]"):
        hubert.hidden(_audio(100))
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        hubert.hidden(torch.ones(1, 100, dtype=torch.int64))
    with pytest.raises(ValueError, match="a row must have 1 to 100 samples, not 0 to 50"):
        hubert.hidden(_audio(2, 100), torch.tensor([50, 0]))
    with pytest.raises(ValueError, match="a row must have 1 to 0 samples"):
        hubert.hidden(_audio(1, 0))
    with pytest.raises(ValueError, match="not 100 to 101"):
        hubert.hidden(_audio(2, 100), torch.tensor([100, 101]))
    with pytest.raises(ValueError, match="a length for each of 2 rows"):
        hubert.hidden(_audio(2, 100), torch.tensor([100]))
    with pytest.raises(ValueError, match="audio of 19 samples is shorter than the 20 that one frame needs"):
        hubert.hidden(_audio(2, 100), torch.tensor([100, 19]), padding="none")
    with pytest.raises(ValueError, match="padding='reflect' is not one of"):
        hubert.hidden(_audio(1, 100), padding="reflect")
    assert hubert.hidden(_audio(1, 1))[0].isfinite().all()
    assert hubert.hidden(torch.zeros(1, 100))[0].isfinite().all()


def test_the_shortest_and_silent_log_mels_are_finite(folders: dict[str, Path]) -> None:
    model = load_speech_model(str(folders["w2v-bert"]))
    assert model.hidden(_audio(1, 1))[0].isfinite().all()
    assert model.hidden(torch.zeros(1, 1000))[0].isfinite().all()


# Folders


def _rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_version_follows_from_the_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "small", head="Model")
    model = load_speech_model(str(folder))
    assert model.name == "small"
    assert model.version.startswith("small, weights ")
    assert load_speech_model(f"{folder}/").version == model.version
    _rewrite(folder, lambda tensors: tensors["encoder.layer_norm.bias"].add_(1e-3))
    assert load_speech_model(str(folder)).version != model.version


def test_folders_load_without_a_word(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load_speech_model(str(folders["hubert"]))  # leaves out the CTC head, which `transformers` would report
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_an_error_unless_nothing_uses_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    before, _ = load_speech_model(str(folder)).hidden(_audio(1, 100))
    _rewrite(folder, lambda tensors: tensors.pop("hubert.masked_spec_embed"))  # as in facebook/wav2vec2-base-960h
    after, _ = load_speech_model(str(folder)).hidden(_audio(1, 100))
    assert torch.equal(before, after)
    assert load_ctc_model(str(folder)).labels
    _rewrite(folder, lambda tensors: tensors.pop("hubert.encoder.layers.1.layer_norm.bias"))
    with pytest.raises(ValueError, match=r"m cannot be loaded: weights are missing: .*layers\.1\.layer_norm\.bias"):
        load_speech_model(str(folder))
    with pytest.raises(ValueError, match="weights are missing"):
        load_ctc_model(str(save_model(tmp_path / "headless", head="Model")))


def test_folders_that_hold_no_speech_model_are_one_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_speech_model(str(tmp_path))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_speech_model(str(pickled))
    bert = tmp_path / "bert"
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=16
    )
    transformers.BertModel(config).save_pretrained(bert)
    with pytest.raises(ValueError, match="holds a model of kind 'bert', not one of data2vec-audio, hubert"):
        load_speech_model(str(bert))
    with pytest.raises(ValueError, match="holds a model with an adapter"):
        load_speech_model(str(save_model(tmp_path / "adapter", "xlsr", add_adapter=True)))
    wrong = save_model(tmp_path / "wrong")
    (wrong / "preprocessor_config.json").write_text((folders["w2v-bert"] / "preprocessor_config.json").read_text())
    with pytest.raises(ValueError, match="SeamlessM4TFeatureExtractor does not go with a model 'hubert'"):
        load_speech_model(str(wrong))
    (wrong / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="wrong cannot be loaded: ") as caught:
        load_speech_model(str(wrong))
    assert "\n" not in str(caught.value)
    wide = save_model(tmp_path / "wide", "w2v-bert", feature_projection_input_dim=20)
    with pytest.raises(ValueError, match="2 columns of 8 mel bands are not the 20 inputs of the model"):
        load_speech_model(str(wide))


# Bundles of torchaudio


def _bundle(
    monkeypatch: pytest.MonkeyPatch, kind: str, folder: Path, *, normalize: bool = False, with_head: bool = False
) -> str:
    """Weights of a folder as a bundle of torchaudio, "torchaudio:SMALL=FILE"."""
    from torchaudio.models.wav2vec2.utils import import_huggingface
    from torchaudio.pipelines import Wav2Vec2ASRBundle, Wav2Vec2Bundle

    load = transformers.AutoModelForCTC if with_head else transformers.AutoModel
    original = load.from_pretrained(folder)
    is_wavlm = kind == "wavlm"
    read_config = import_huggingface._get_config_wavlm if is_wavlm else import_huggingface._get_config
    params = read_config(original.config) | {"aux_num_out": len(LABELS) if with_head else None}
    torch.save(import_huggingface.import_huggingface_model(original).state_dict(), folder / "bundle.pt")
    values: tuple[Any, ...] = "nowhere", params, 16000, normalize, "WavLM" if is_wavlm else "Wav2Vec2"
    bundle = Wav2Vec2ASRBundle(*values, tuple(LABELS[1:]), ()) if with_head else Wav2Vec2Bundle(*values)
    monkeypatch.setattr(torchaudio.pipelines, "SMALL", bundle, raising=False)
    return f"torchaudio:SMALL={folder / 'bundle.pt'}"


@pytest.mark.parametrize("kind", ["hubert", "xlsr", "wavlm"])
def test_bundles_of_torchaudio_number_layers_alike(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", kind, head="Model", normalize=False)
    model, bundled = load_speech_model(str(folder)), load_speech_model(_bundle(monkeypatch, kind, folder))
    audio, lengths = _audio(2, 300), torch.tensor([300, 200])
    for padding in ("centered", "none"):
        expected, num_expected = model.hidden(audio, lengths, padding=padding)
        states, num_frames = bundled.hidden(audio, lengths, padding=padding)
        assert torch.equal(num_frames, num_expected)
        assert torch.allclose(states, expected, atol=2e-5)
    same = ("num_layers", "feature_dim", "sample_rate_hz", "stride_samples", "frame_rate_hz")
    assert [getattr(bundled, name) for name in same] == [getattr(model, name) for name in same]
    assert bundled.name == "SMALL"
    assert bundled.version.startswith("SMALL, weights ")


def test_bundles_normalise_each_row_as_torchaudio_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", "xlsr", head="Model")
    source = _bundle(monkeypatch, "xlsr", folder, normalize=True)
    model = load_speech_model(source)
    audio = _audio(2, 300) * torch.tensor([[0.03], [3.0]])  # so quiet that the epsilon matters
    states, _ = model.hidden(audio, padding="none")
    dl_kwargs = {"model_dir": str(folder), "file_name": "bundle.pt"}
    network = torchaudio.pipelines.SMALL.get_model(dl_kwargs=dl_kwargs)
    with torch.no_grad():
        expected = torch.stack([network.extract_features(row[None])[0][1][0] for row in audio])
    assert torch.allclose(states[2], expected, atol=2e-5)


def test_bundles_of_torchaudio_recognise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", "xlsr", normalize=False)
    model = load_ctc_model(str(folder))
    bundled = load_ctc_model(_bundle(monkeypatch, "xlsr", folder, with_head=True))
    assert (bundled.labels, bundled.blank, bundled.delimiter) == (("-", *LABELS[1:]), 0, "|")
    audio, lengths = _audio(2, 300), torch.tensor([300, 200])
    expected, num_expected = model.log_probs(audio, lengths)
    log_probs, num_frames = bundled.log_probs(audio, lengths)
    assert torch.equal(num_frames, num_expected)
    assert torch.allclose(log_probs, expected, atol=2e-5)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not be run",)


def test_bundles_that_cannot_be_loaded_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _bundle(monkeypatch, "hubert", save_model(tmp_path / "m", head="Model"))
    for unknown in ("NOTHING", "SQUIM_OBJECTIVE", "__name__", ""):
        with pytest.raises(ValueError, match=f"no bundle of a speech model that is called '{unknown}'"):
            load_speech_model(f"torchaudio:{unknown}")
    with pytest.raises(ValueError, match=r"missing\.pt is no file with weights of SMALL"):
        load_speech_model(f"torchaudio:SMALL={tmp_path / 'missing.pt'}")
    with pytest.raises(ValueError, match="is no recogniser"):
        load_ctc_model(source)
    for content in ({"a": torch.zeros(1)}, {"a": _Evil()}):
        torch.save(content, tmp_path / "m" / "bundle.pt")
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            load_speech_model(source)
        assert "\n" not in str(caught.value)
    assert "this must not be run" not in capsys.readouterr().out


# Frames of another rate


def _features(*rows: list[float]) -> Features:
    """One dimension; rows may differ in length."""
    values = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return Features(values[..., None], torch.tensor([len(row) for row in rows]))


def test_frames_of_the_same_rate_are_the_features_themselves() -> None:
    features = Features(_audio(2, 7, 3), torch.tensor([7, 5]))
    values, mask = at_frames(features, from_hz=50.0, to_hz=50.0, num_frames=7)
    assert mask.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    assert torch.equal(values[0], features.values[0])
    assert torch.equal(values[1, :5], features.values[1, :5])
    assert not values[1, 5:].any()


def test_to_a_lower_rate_is_the_mean_over_the_frame() -> None:
    values, mask = at_frames(_features([1.0, 3.0, 5.0, 9.0]), from_hz=50.0, to_hz=25.0, num_frames=2)
    assert values[0, :, 0].tolist() == [2.0, 7.0]
    assert mask.all()
    # 50 to 20 Hz: a frame is 2.5 features long.
    values, _ = at_frames(_features([1.0, 2.0, 4.0, 8.0, 16.0]), from_hz=50.0, to_hz=20.0, num_frames=2)
    assert values[0, :, 0].tolist() == pytest.approx([(1 + 2 + 4 / 2) / 2.5, (4 / 2 + 8 + 16) / 2.5])


def test_to_a_higher_rate_interpolates_between_middles() -> None:
    values, mask = at_frames(_features([1.0, 3.0, 7.0]), from_hz=25.0, to_hz=50.0, num_frames=6)
    # Middles of frames lie at 0.25, 0.75, 1.25... of the features, whose own are 0.5, 1.5, 2.5; ends are held.
    assert values[0, :, 0].tolist() == [1.0, 1.5, 2.5, 4.0, 6.0, 7.0]
    assert mask.all()


def test_frames_may_begin_anywhere_in_the_features() -> None:
    features = _features([1.0, 3.0, 7.0, 5.0], [2.0, 2.0])
    start = torch.tensor([0.01, 0.02])  # half a frame, and one
    values, mask = at_frames(features, from_hz=50.0, to_hz=50.0, num_frames=3, start_seconds=start)
    assert values[0, :, 0].tolist() == pytest.approx([2.0, 5.0, 6.0])
    assert values[1, :, 0].tolist() == pytest.approx([2.0, 0.0, 0.0])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    early, mask = at_frames(features, from_hz=50.0, to_hz=50.0, num_frames=2, start_seconds=-start)
    assert early[0, :, 0].tolist() == pytest.approx([1.0, 2.0])  # the first's middle is where the features begin
    assert mask.tolist() == [[True, True], [False, True]]


def test_a_teacher_may_be_a_frame_longer_or_shorter() -> None:
    for num_features, num_valid in ((9, 9), (10, 10), (11, 10)):
        values, mask = at_frames(_features([1.0] * num_features), from_hz=50.0, to_hz=50.0, num_frames=10)
        assert int(mask.sum()) == num_valid
        assert torch.equal(values[..., 0], mask.float())
    for num_features in (7, 13, 20):
        with pytest.raises(ValueError, match=r"teacher rate against codec rate: .* at 50 Hz do not fit 0\.200 s"):
            at_frames(_features([1.0] * num_features), from_hz=50.0, to_hz=50.0, num_frames=10)
    with pytest.raises(ValueError, match="cannot bring features from 0"):
        at_frames(_features([1.0]), from_hz=0.0, to_hz=50.0, num_frames=1)


@given(
    st.integers(1, 12),
    st.sampled_from([12.5, 20.0, 25.0, 50.0, 75.0, 86.1328125, 100.0]),
    st.floats(0, 0.05),
    st.integers(1, 20),
)
def test_values_are_means_and_masks_are_where_middles_lie(
    num_features: int, to_hz: float, start: float, num_frames: int
) -> None:
    features = Features(torch.rand(1, num_features, 2) + 1, torch.tensor([num_features]))
    starts = torch.tensor([start], dtype=torch.float64)
    values, mask = at_frames(features, from_hz=50.0, to_hz=to_hz, num_frames=num_frames, start_seconds=starts)
    middles = start + (torch.arange(num_frames, dtype=torch.float64) + 0.5) / to_hz
    sure = (middles - num_features / 50.0).abs() > 1e-9
    assert torch.equal(mask[0, sure], (middles < num_features / 50.0)[sure])
    held = values[mask]
    assert bool((held >= features.values.min() - 1e-6).all())
    assert bool((held <= features.values.max() + 1e-6).all())
    assert not values[~mask].any()
