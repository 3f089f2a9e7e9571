"""`codec import`, the detection of checkpoints behind it, and folders that appear whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_import_bicodec as bicodec
import test_import_dac as dac
import test_import_encodec as encodec
import test_import_hificodec as hificodec
import test_import_mimi as mimi
import test_import_speechtokenizer as speechtokenizer
import torch
from commands import assert_wav, partial_files, refusal, run, snapshot, succeed, write_wav
from safetensors.torch import save_file

import codec
from codec.files import discard_all, new_folder
from codec.importers.detect import KINDS, detect_kind, load_checkpoint
from codec.importers.hificodec import read_config
from codec.testing import speech_like

pytest_plugins = ["commands"]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

# As small as settings of HiFi-Codec can be: its code takes the width of the encoder and of the latents from nowhere.
HIFICODEC_SETTINGS = hificodec._settings(
    upsample_rates=[2],
    upsample_kernel_sizes=[4],
    upsample_initial_channel=8,
    resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1]],
    n_codes=16,
)


def _checkpoint(kind: str, folder: Path) -> Path:
    """A folder with a tiny checkpoint, as a user would have it."""
    source = folder / f"{kind}_source"
    source.mkdir()
    if kind == "bicodec":
        (source / "config.yaml").write_text(json.dumps({"audio_tokenizer": bicodec.TINY}))  # which is YAML, too
        save_file(bicodec._tensors(), source / "model.safetensors")
        return source
    if kind == "hificodec":
        settings: dict[str, Any] = HIFICODEC_SETTINGS
        (source / "config.json").write_text(json.dumps(settings))
        reference = hificodec._Reference(read_config(source / "config.json"))
        tensors = hificodec._flat(reference.state_dicts())
    elif kind == "dac":
        settings = dac._transformers_config(dac.TINY)
        tensors = dac._of_transformers(dac._original(dac._random_codec(dac.TINY), "folded"))
    elif kind == "mimi":
        settings = mimi._transformers_config(mimi.TINY)
        tensors = mimi._of_transformers(mimi._original(mimi._random_codec(mimi.TINY)))
    elif kind == "speechtokenizer":
        settings, tensors = speechtokenizer.TINY, speechtokenizer._tensors(speechtokenizer.TINY)
    else:
        config = {"encodec": encodec.TINY, "encodec_stereo": encodec.TINY_STEREO}[kind]
        settings = encodec._transformers_config(config)
        tensors = encodec._of_transformers(encodec._original(encodec._random_codec(config), "g_and_v"))
    (source / "config.json").write_text(json.dumps(settings))
    save_file({key: value.contiguous() for key, value in tensors.items()}, source / "model.safetensors")
    return source


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("encodec", ["audio 1 channel(s) at 8000 Hz, 6 per frame", "codes 1 to 4 rows", "streams yes"]),
        ("encodec_stereo", ["audio 2 channel(s) at 8000 Hz, 6 per frame", "streams no: it looks ahead"]),
        ("dac", ["audio 1 channel(s) at 8000 Hz, 10 per frame", "bitrate 3.2 to 12.8 kbps", "streams no: it looks"]),
        ("hificodec", ["audio 1 channel(s) at 16000 Hz, 2 per frame", "codes 2 to 4 rows", "bitrate 64 to 128 kbps"]),
        (
            "speechtokenizer",
            ["audio 1 channel(s) at 16000 Hz, 6 per frame", "codes 1 to 4 rows", "streams no: it looks"],
        ),
        ("mimi", ["audio 1 channel(s) at 8000 Hz, 12 per frame", "codes 1 to 4 rows", "streams yes"]),
        ("bicodec", ["audio 1 channel(s) at 16000 Hz, 8 per frame", "codes 1 rows", "encodes once its speech model"]),
    ],
)
def test_a_checkpoint_becomes_a_model(folder: Path, kind: str, lines: list[str]) -> None:
    source = _checkpoint(kind, folder)
    told = [" ".join(line.split()) for line in succeed("import", source, "ours").splitlines()]
    model = codec.load("ours")
    assert f"model ours@1, id {model.codec_id}" in told
    assert all(any(found.startswith(line) for found in told) for line in lines)
    assert sorted(os.listdir("ours")) == ["config.json", "model.safetensors", "tokens.safetensors"]
    assert not partial_files(folder)
    expected = load_checkpoint(source)
    assert model.config == expected.config
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key  # float32 is what it was read as


@pytest.mark.parametrize("kind", ["encodec", "mimi"])
def test_an_imported_model_works_with_the_other_commands(folder: Path, kind: str) -> None:
    succeed("import", _checkpoint(kind, folder), "ours", "--name", "tiny@3")
    write_wav("speech.wav", speech_like(1000)[None], 8000)
    succeed("encode", "speech.wav", "speech.codec", "--model", "ours")
    assert "tiny@3" in succeed("info", "speech.codec")
    succeed("decode", "speech.codec", "back.wav", "--model", "ours")
    assert_wav("back.wav", 1, 1000, 8000)
    assert "tiny@3, 4 rows of codes" in succeed("verify", "speech.wav", "--model", "ours")


def test_pickles_need_a_flag(folder: Path) -> None:
    source = _checkpoint("encodec", folder)
    tensors = encodec._of_transformers(encodec._original(encodec._random_codec(encodec.TINY), "g_and_v"))
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    assert "allow_pickle=True (--allow-pickle) reads it" in refusal("import", source, "ours")
    assert "--allow-pickle reads it" in refusal("import", source / "pytorch_model.bin", "ours")
    assert not Path("ours").exists()
    succeed("import", source, "ours", "--allow-pickle")
    assert Path("ours/config.json").is_file()


def test_pickles_run_no_code(folder: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return Path.write_text, (folder / "harm", "done")  # type: ignore[return-value]

    torch.save({"generator": {"x": Harmful()}, "encoder": {}, "quantizer": {}}, "bad.pth")
    assert "bad.pth cannot be read" in refusal("import", "bad.pth", "ours", "--allow-pickle")
    assert not Path("harm").exists()
    assert not Path("ours").exists()


def test_an_existing_model_is_replaced_with_force_only(folder: Path) -> None:
    succeed("import", _checkpoint("encodec", folder), "ours")
    other = _checkpoint("dac", folder)
    before = snapshot(folder)
    assert "ours exists already; --force replaces the model in it" in refusal("import", other, "ours")
    assert snapshot(folder) == before
    succeed("import", other, "ours", "--force")
    assert json.loads(Path("ours/config.json").read_text())["type"] == "dac"
    assert not partial_files(folder)


def test_what_is_no_model_is_never_replaced(folder: Path) -> None:
    source = _checkpoint("encodec", folder)
    Path("home/photos").mkdir(parents=True)
    Path("file").write_text("mine")
    Path("empty").mkdir()
    Path("nowhere").symlink_to("gone/away")
    Path("link").symlink_to("empty")
    before = snapshot(folder)
    assert "home exists already" in refusal("import", source, "home")
    assert "home: It holds photos, which is not to be replaced" in refusal("import", source, "home", "--force")
    assert "file: Not a directory" in refusal("import", source, "file", "--force")
    assert "Its folder does not exist" in refusal("import", source, "no/such/place")
    assert "Its folder does not exist" in refusal("import", source, "nowhere")
    assert "is the input itself" in refusal("import", source, source, "--force")
    assert snapshot(folder) == before
    succeed("import", source, "link")
    assert Path("link").is_symlink()
    assert Path("empty/model.safetensors").is_file()


def test_a_failure_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _checkpoint("encodec", folder)
    succeed("import", source, "ours")
    before = snapshot(folder)

    def failing(model: object, path: Path, **values: object) -> str:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("codec.pretrained.save", failing)
    assert "No space left on device" in refusal("import", source, "ours", "--force")
    assert "No space left on device" in refusal("import", source, "other")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing.safetensors", "ours"], "nothing.safetensors is no file"),
        (["noise.safetensors", "ours"], "noise.safetensors cannot be read"),
        (
            ["other.safetensors", "ours"],
            "is no checkpoint that is known (encodec, dac, hificodec, speechtokenizer, bicodec, mimi)",
        ),
        ([".", "ours"], "config.json cannot be read"),
        (["encodec_source", "ours", "--kind", "mp3"], "kind='mp3' is not one of"),
        (["encodec_source", "ours", "--kind", "dac"], "does not describe a DAC model"),
        (["encodec_source", "ours", "--sample-rate-hz", "44100"], "is a model for 8000 Hz, not for 44100 Hz"),
        (["encodec_source", "ours", "--name", "a\nb"], "the name 'a\\nb' is longer than 255 bytes, or not printable"),
        (["encodec_source", "ours", "--name", "x" * 256], "is longer than 255 bytes"),
    ],
)
def test_mistakes_are_one_line(folder: Path, args: list[str], message: str) -> None:
    _checkpoint("encodec", folder)
    Path("noise.safetensors").write_bytes(b"noise")
    save_file({"weight": torch.zeros(1)}, "other.safetensors")
    assert message in refusal("import", *args)
    assert not Path("ours").exists()
    assert not partial_files(folder)


def test_wrong_usage_is_status_2() -> None:
    assert run("import", "only_one").exit_code == 2
    assert run("import", "a", "b", "--sample-rate-hz", "0").exit_code == 2


# Detection


@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_told_by_their_settings(folder: Path, kind: str) -> None:
    assert detect_kind(_checkpoint(kind, folder)) == kind
    unknown = "no checkpoint that is known"
    for config, reason in (("[]", "is not a mapping"), ("{}", unknown), ('{"model_type": "bert"}', unknown)):
        (folder / f"{kind}_source" / "config.json").write_text(config)
        with pytest.raises(ValueError, match=reason):
            detect_kind(folder / f"{kind}_source")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("encodec", "quantizer.vq.layers.0._codebook.embed"),
        ("encodec", "quantizer.layers.0.codebook.embed"),
        ("dac", "quantizer.quantizers.0.codebook.weight"),
        ("hificodec", "quantizer.quantizer_modules.0.embedding.weight"),
        ("speechtokenizer", "encoder.model.13.lstm.weight_ih_l0_reverse"),
        ("mimi", "quantizer.rvq_first.input_proj.weight"),
        ("mimi", "quantizer.semantic_residual_vector_quantizer.input_proj.weight"),
    ],
)
def test_files_are_told_by_their_tensors(tmp_path: Path, kind: str, name: str) -> None:
    tensors = {"encoder.bias": torch.zeros(1), name: torch.zeros(1)}
    save_file(tensors, tmp_path / "some.safetensors")
    assert detect_kind(tmp_path / "some.safetensors") == kind
    part, _, rest = name.partition(".")
    layouts: dict[str, Any] = {
        "bare.pth": tensors,
        "package.pth": {"state_dict": tensors, "metadata": {"kwargs": {}}},
        "parts": {"generator": {}, "encoder": {"bias": torch.zeros(1)}, part: {rest: torch.zeros(1)}},
    }
    for file, content in layouts.items():
        torch.save(content, tmp_path / file)
        assert detect_kind(tmp_path / file, allow_pickle=True) == kind
        with pytest.raises(ValueError, match=r"allow_pickle=True .--allow-pickle. reads it"):
            detect_kind(tmp_path / file)


def test_the_sample_rate_decides_where_nothing_else_does(tmp_path: Path) -> None:
    """Of HiFi-Codec's published models, two have the same shapes. What else is missing here comes to light later."""
    path = tmp_path / "g.safetensors"
    tensors = {f"generator.ups.{i}.weight": torch.zeros(1, 1, size) for i, size in enumerate((16, 11, 8, 4))}
    save_file({"quantizer.quantizer_modules.0.embedding.weight": torch.zeros(1024, 256), **tensors}, path)
    with pytest.raises(ValueError, match="sample_rate_hz must say which"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"does not fit its config: missing \['quantizer.quantizer_modules.1"):
        load_checkpoint(path, sample_rate_hz=24000)


def test_pickles_of_something_else_are_no_checkpoints(tmp_path: Path) -> None:
    for content in ([1, 2], {}, {"state_dict": torch.zeros(1)}, {1: {2: torch.zeros(1)}}):
        torch.save(content, tmp_path / "some.pth")
        with pytest.raises(ValueError, match="no checkpoint that is known"):
            detect_kind(tmp_path / "some.pth", allow_pickle=True)


# Folders


def test_an_ended_process_leaves_no_folder(tmp_path: Path) -> None:
    def end() -> None:
        with new_folder(tmp_path / "new") as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            discard_all()
            assert not list(tmp_path.iterdir())

    with pytest.raises(OSError, match="No such file"):  # there is nothing left to put in its place
        end()


def test_what_was_added_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()

    def replace() -> None:
        with new_folder(target, replaceable={"config.json"}) as partial:
            (partial / "config.json").write_text("{}")
            (target / "photo").write_text("mine")

    with pytest.raises(OSError, match="It holds photo"):
        replace()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "photo"]


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "model", os.rename
    target.mkdir()
    (target / "config.json").write_text("old")

    def failing(old: Path, new: Path) -> None:
        if (old / "new").exists():
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="Input/output"), new_folder(target, replaceable={"config.json"}) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]
    assert (target / "config.json").read_text() == "old"
