import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import codec
from codec.evaluation import measure
from codec.pretrained import DEFAULT_MODEL, compute_codec_id
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like, tiny_codec

SPEECH = Path(__file__).parent / "data" / "speech.flac"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    codec.save(tiny_codec(), tmp_path / "tiny", name="tiny@3")
    return tmp_path / "tiny"


def test_a_saved_codec_loads_as_it_was(tmp_path: Path) -> None:
    original = tiny_codec()
    codec_id = codec.save(original, tmp_path, name="tiny@1", dtype="float32")
    loaded = codec.load(tmp_path)
    assert (loaded.codec_id, loaded.name, loaded.config) == (codec_id, "tiny@1", original.config)
    audio = torch.from_numpy(speech_like(5000))[None, None]
    assert torch.equal(loaded.encode(audio).codes, original.encode(audio).codes)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_float16_is_for_storage_only(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = codec.load(folder)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    # What float16 rounds away is rounded once: saving what was loaded gives the same bytes, hence the same id.
    assert codec.save(loaded, folder.parent / "again", name="tiny@3") == loaded.codec_id


def test_the_id_names_every_bit_of_config_and_weights(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    before = compute_codec_id(data, tensors)
    assert compute_codec_id(dict(reversed(data.items())), dict(reversed(tensors.items()))) == before
    assert compute_codec_id(data | {"kernel_size": 5}, tensors) != before
    name = sorted(tensors)[0]
    changed = tensors[name].clone()
    changed.view(torch.int16).view(-1)[0] ^= 1
    assert compute_codec_id(data, tensors | {name: changed}) != before


def test_folders_that_are_wrong_are_value_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="neither a bundled model"):
        codec.load("no_such_model")
    cases = {
        "not_json": ("config.json", b"{", "cannot be read"),
        "unknown_type": ("config.json", b'{"type": "magic"}', "type: 'magic' is unknown"),
        "not_weights": ("model.safetensors", b"garbage", "cannot be read"),
        "a_pickle": ("model.safetensors", b"\x80\x04]\x94.", "cannot be read"),
    }
    for name, (file, content, message) in cases.items():
        broken = folder.parent / name
        shutil.copytree(folder, broken)
        (broken / file).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            codec.load(broken)
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    for changed, message in [
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        (tensors | {"extra": torch.zeros(1)}, "unknown"),
        (tensors | {name: tensors[name][:1]}, "the config asks for"),
    ]:
        save_file({k: v.contiguous() for k, v in changed.items()}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            codec.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        codec.load(folder)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = tiny_codec()
    model.decoder.layers[0].weight.mul_(1e6)
    with pytest.raises(ValueError, match="float16 cannot store"):
        codec.save(model, tmp_path, name="tiny@1")
    with pytest.raises(ValueError, match="is not one of"):
        codec.save(model, tmp_path, name="tiny@1", dtype="int8")
    assert not list(tmp_path.iterdir())


# The model in the box


@pytest.mark.parametrize("name", codec.available())
def test_bundled_models_keep_their_limits(name: str) -> None:
    folder = codec.available()[name]
    model = codec.load(name)
    assert model.name.split("@")[0] == name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 25_000_000
    for part in (model.encoder, model.decoder):
        assert sum(parameter.numel() for parameter in part.parameters()) <= 6_000_000
    assert (
        max(model.hop_length + model.encode_delay_samples, model.decode_delay_samples) <= model.sample_rate_hz * 0.040
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("Data", "Licence", "Recipe", "Metrics", "Limits", model.codec_id):
        assert word in card


def test_the_default_model_is_bundled() -> None:
    assert DEFAULT_MODEL in codec.available()


@pytest.mark.parametrize("name", codec.available())
def test_bundled_models_stream_to_the_bits_of_the_file(num_threads: int, name: str) -> None:
    model = codec.load(name)
    audio = torch.from_numpy(soundfile.read(SPEECH, dtype="float32")[0])[None]
    tokens = model.encode(audio[None])
    heard = model.decode(tokens)
    generator = torch.Generator().manual_seed(num_threads)
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model, global_codes=tokens.global_codes)
    codes, pieces, at = [], [], 0
    while at < audio.shape[1]:
        size = int(torch.randint(0, 3000, (1,), generator=generator))
        codes.append(encoder.push(audio[:, at : at + size]))
        pieces.append(decoder.push(codes[-1]))
        at += size
    codes.append(encoder.flush())
    pieces += [decoder.push(codes[-1]), decoder.flush()]
    assert torch.equal(torch.cat(codes, dim=1), tokens.codes[0])
    assert torch.equal(torch.cat(pieces, dim=1)[:, : audio.shape[1]], heard[0])

    lengths = [audio.shape[1], 20001, 1, 0, 33333]
    batch = torch.stack([audio] * len(lengths))
    together = model.encode(batch, torch.tensor(lengths))
    heard_together = model.decode(together)
    for row, length in enumerate(lengths):
        alone = model.encode(audio[None, :, :length])
        assert torch.equal(together.codes[row, :, : alone.codes.shape[2]], alone.codes[0])
        assert torch.equal(heard_together[row, :, :length], model.decode(alone)[0])


def test_the_bundled_model_is_intelligible_and_more_stages_help() -> None:
    model = codec.load()
    audio = soundfile.read(SPEECH, dtype="float32")[0]
    tokens = model.encode(torch.from_numpy(audio)[None, None])
    scores = []
    for num_quantizers in (2, 4, 8):
        heard = model.decode(tokens.prefix(num_quantizers))[0, 0].numpy()
        scores.append(measure(audio, heard, 16000, ("stoi", "si_sdr_db")))
    for name in ("stoi", "si_sdr_db"):
        assert scores[0][name] < scores[1][name] < scores[2][name]
    # The speech is synthetic, of a kind the model never heard; natural speech scores higher.
    assert scores[2]["stoi"] > 0.7
