"""Reading and writing tokens without a model: `codec.open`, `write`, `cut`, `join`, and what they know of models."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import CODED, END, GLOBAL, HEADER, INDEX, PACKED, SEGMENT, blocks_of, likely_codes, some_tables
from safetensors import safe_open
from safetensors.numpy import save_file

import codec
from codec.audio import read_audio, resample
from codec.bitstream import BitstreamError, Reader
from codec.header import packed_bytes
from codec.token_format import FILE_NAME, TokenFormat
from tools.make_golden import FOLDER, golden_files

ROOT = Path(__file__).resolve().parent.parent
SIZES = (5, 8, 16)
TABLES = some_tables(SIZES)
FORMAT = TokenFormat(
    codec_id="0123456789abcdef",
    model="tiny@1",
    sample_rate_hz=16000,
    hop_length=320,
    codebook_sizes=SIZES,
    valid_num_quantizers=(1, 3),
    num_frames_before=2,
    num_frames_after=1,
    tables=TABLES,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    FORMAT.save(tmp_path / "tiny")
    return tmp_path / "tiny"


WITHOUT_TORCH = """
import sys
for name in ("torch", "typer", "rich", "soundfile", "soxr"):
    sys.modules[name] = None  # an import of it fails
import io, numpy as np, codec
model = codec.TokenFormat.load()
rng = np.random.default_rng(0)
codes = np.minimum(rng.integers(0, 1024, (2, 4, 300)), rng.integers(0, 1024, (2, 4, 300)))
codec.write("whole.codec", codes, num_samples=95900, rate_hz=16000)
codec.cut("whole.codec", "first.codec", 0, 40000)
codec.cut("whole.codec", "rest.codec", 40000, 55900)
codec.join(["first.codec", "rest.codec"], "joined.codec")
with codec.open("whole.codec") as file:
    assert (file.read() == codes).all()
    assert (file.read(100, 7) == codes[:, :, 100:107]).all()
    assert file.num_samples == 95900
    assert (np.concatenate(list(file), axis=2) == codes).all()
with codec.open("joined.codec") as file:
    assert [s.num_samples for s in file.segments] == [40000, 55900]
assert sorted(codec.available()) and codec.__version__
print(sorted(name for name in ("torch", "typer", "rich", "soundfile", "soxr") if sys.modules.get(name)))
"""


def test_tokens_need_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", "[]\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.codec",
        "joined.codec",
        "rest.codec",
        "whole.codec",
    ]


@pytest.mark.parametrize("tables", [None, TABLES])
def test_what_was_saved_is_loaded(tables: Any, tmp_path: Path) -> None:
    saved = replace(FORMAT, tables=tables)
    saved.save(tmp_path)
    loaded = TokenFormat.load(tmp_path)
    assert replace(loaded, tables=None) == replace(saved, tables=None)
    assert (loaded.tables and loaded.tables.id) == (tables and tables.id)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert TokenFormat.load(str(tmp_path)).header() == saved.header()


def _metadata(facts: object) -> dict[str, str]:
    return {"token_format": json.dumps(facts)}


FACTS = {name: value for name, value in vars(FORMAT).items() if name != "tables"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), f"nor a folder with {FILE_NAME}"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 100), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
        (lambda path: save_file({}, path), "cannot be read: 'token_format'"),
        (lambda path: save_file({}, path, {"token_format": "{"}), "cannot be read"),
        (lambda path: save_file({}, path, _metadata([1])), "cannot be read"),
        (lambda path: save_file({}, path, _metadata(None)), "cannot be read"),
        (lambda path: save_file({}, path, _metadata({"model": "a@1"})), "cannot be read: 'codebook_sizes'"),
        (lambda path: save_file({}, path, _metadata(FACTS | {"codebook_sizes": ["x"]})), "cannot be read"),
        (lambda path: save_file({}, path, _metadata(FACTS | {"num_global_codes": "x"})), "cannot be read"),
        (lambda path: save_file({}, path, _metadata(FACTS | {"more": 1})), "cannot be read"),
        (lambda path: save_file(TABLES.to_tensors(), path, _metadata({})), "cannot be read"),
        (
            lambda path: save_file(some_tables((5, 8)).to_tensors(), path, _metadata(FACTS)),
            "the entropy tables do not fit the codebooks",
        ),
        (
            lambda path: save_file({"parents": TABLES.to_tensors()["parents"]}, path, _metadata(FACTS)),
            "the entropy tables are incomplete: 'row0.groups0'",
        ),
        (
            lambda path: save_file(
                TABLES.to_tensors() | {"row0.counts": np.array(3, np.uint16)}, path, _metadata(FACTS)
            ),
            "counts must be uint16",
        ),
        (
            lambda path: save_file(TABLES.to_tensors() | {"parents": np.array(3, np.uint8)}, path, _metadata(FACTS)),
            "the entropy tables are incomplete",
        ),
    ],
)
def test_bad_files_are_one_line(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder / FILE_NAME)
    with pytest.raises(ValueError, match=message) as caught:
        TokenFormat.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_models_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    for use in (
        lambda: TokenFormat.load("nothing"),
        lambda: codec.write(tmp_path / "a", np.zeros((1, 1, 1), int), model="nothing"),
    ):
        with pytest.raises(
            ValueError, match=r"'nothing' is neither a bundled model \(.*speech_16k.*\) nor a folder with"
        ):
            use()
    assert not list(tmp_path.iterdir())


def test_headers_tell_of_the_format() -> None:
    header = FORMAT.header(rate_hz=8000, num_channels=2, num_quantizers=1)
    assert header == replace(
        HEADER,
        model="tiny@1",
        num_channels=2,
        codebook_sizes=(5,),
        num_frames_before=2,
        num_frames_after=1,
        entropy_id=TABLES.id,
    )
    assert FORMAT.header() == replace(header, rate_hz=16000, num_channels=1, codebook_sizes=SIZES)
    for num_quantizers in (0, 2, 4):
        with pytest.raises(ValueError, match=rf"num_quantizers={num_quantizers} is not one of \(1, 3\)"):
            FORMAT.header(num_quantizers=num_quantizers)
    with pytest.raises(ValueError, match="must be positive"):
        FORMAT.header(rate_hz=0)


def test_tables_are_found_by_the_id_in_the_file(folder: Path, tmp_path: Path) -> None:
    path, codes = tmp_path / "a.codec", likely_codes(TABLES, 1, 60)
    codec.write(path, codes, model=folder, num_samples=19000)
    with codec.open(path, model=folder) as file:
        np.testing.assert_array_equal(file.read(), codes)
    bundled_tables = TokenFormat.load().tables
    assert bundled_tables is not None
    bundled, bundled_codes = tmp_path / "b.codec", likely_codes(bundled_tables, 1, 100)
    codec.write(bundled, bundled_codes)
    with codec.open(bundled) as file:
        np.testing.assert_array_equal(file.read(), bundled_codes)
    # A model that did not make the file has other tables.
    for source, model in ((path, None), (bundled, folder)):
        with codec.open(source, model=model) as file:
            assert file.num_samples == (19000 if source == path else 32000)
            assert len(file.segments) == 1
            with pytest.raises(BitstreamError) as caught:
                file.read()
            name = f"{file.header.entropy_id} of {file.header.model}"
            assert str(caught.value) == f"the codes are coded with tables {name}, which are not here"
        with pytest.raises(BitstreamError, match="tables"):
            codec.cut(source, tmp_path / "c", 0, 5, model=model)
        with pytest.raises(BitstreamError, match="tables"):
            codec.join([source], tmp_path / "c", model=model)
    assert not (tmp_path / "c").exists()


def test_packed_and_coded_files_hold_the_same_codes(folder: Path, tmp_path: Path) -> None:
    codes = likely_codes(TABLES, 2, 400)
    codec.write(tmp_path / "coded", codes, model=folder)
    replace(FORMAT, tables=None).save(folder)
    codec.write(tmp_path / "packed", codes, model=folder)
    FORMAT.save(folder)
    read = []
    for name in ("coded", "packed"):
        with codec.open(tmp_path / name, model=folder) as file:
            read.append(file.read())
            assert file.num_samples == 400 * 320
    np.testing.assert_array_equal(read[0], codes)
    np.testing.assert_array_equal(read[1], codes)
    assert (tmp_path / "coded").stat().st_size < 0.8 * (tmp_path / "packed").stat().st_size
    codec.join([tmp_path / "packed", tmp_path / "coded"], tmp_path / "both", model=folder)
    with codec.open(tmp_path / "both") as file:  # packed like the first: it needs no tables
        np.testing.assert_array_equal(file.read(), np.concatenate([codes, codes], axis=2))


def test_write_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    good = np.zeros((1, 3, 10), np.int64)
    cases: list[tuple[np.ndarray, dict[str, Any], str]] = [
        (good[0], {}, r"codes must be \[channels, K, F\], got \[3, 10\]"),
        (good[:, :2], {}, r"num_quantizers=2 is not one of \(1, 3\)"),
        (good[:0], {}, "must be positive"),
        (good + 5, {}, "outside its codebook"),
        (good.astype(float), {}, "must be integers"),
        (good, {"num_samples": 3201}, "take 11 frames, but 10 came"),
        (good, {"num_samples": -1}, "-1 samples"),
        (good, {"rate_hz": 0}, "must be positive"),
        (good, {"global_codes": np.zeros((1, 4), int)}, "tiny@1 has no global codes"),
    ]
    for codes, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            codec.write(tmp_path / "a.codec", codes, model=folder, **options)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    with pytest.raises(BitstreamError, match="there is nothing to join"):
        codec.join([], tmp_path / "a.codec")


VOICED = replace(FORMAT, num_global_codes=3, global_codebook_size=5)


def test_models_without_global_codes_say_nothing_of_them(tmp_path: Path) -> None:
    """So what older programs read stays the same, and what they wrote is read."""
    for token_format, names in ((FORMAT, set()), (VOICED, {"num_global_codes", "global_codebook_size"})):
        token_format.save(tmp_path)
        with safe_open(tmp_path / FILE_NAME, "numpy") as file:
            facts = json.loads(file.metadata()["token_format"])
        assert {name for name in facts if "global" in name} == names
        assert replace(TokenFormat.load(tmp_path), tables=None) == replace(token_format, tables=None)


def test_write_refuses_global_codes_that_are_not_the_models(tmp_path: Path) -> None:
    VOICED.save(tmp_path)
    for global_codes, message in (
        (None, r"tiny@1 needs global codes, \[2, 3\] in 0..4: they say the voice"),
        (np.zeros((2, 4), int), r"must be integers \[2, 3\] in 0..4, got int64 \[2, 4\]"),
        (np.zeros((1, 3), int), r"must be integers \[2, 3\] in 0..4, got int64 \[1, 3\]"),
        (np.zeros((2, 3)), r"must be integers \[2, 3\] in 0..4, got float64 \[2, 3\]"),
        (np.array([[0, 1, 2], [0, 5, 0]]), r"must be integers \[2, 3\] in 0..4, got 0..5"),
        (np.array([[0, 1, 2], [0, -1, 0]]), r"must be integers \[2, 3\] in 0..4, got -1..2"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.write(io.BytesIO(), np.zeros((2, 3, 5), int), model=tmp_path, global_codes=global_codes)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_streams_and_global_codes(dtype: Any, tmp_path: Path) -> None:
    VOICED.save(tmp_path)
    target, codes = io.BytesIO(), likely_codes(TABLES, 1, 20)
    global_codes = np.array([[3, 1, 4]])
    codec.write(target, codes.tolist(), model=tmp_path, global_codes=global_codes.astype(dtype))  # type: ignore[arg-type]
    file = codec.open(io.BytesIO(target.getvalue()), model=tmp_path)
    np.testing.assert_array_equal(file.read(), codes)
    start = file.segments[0].start
    np.testing.assert_array_equal(start.global_codes, global_codes)
    assert (start.global_codebook_size, start.num_global_bits) == (5, 9)
    cut, joined = io.BytesIO(), io.BytesIO()
    codec.cut(io.BytesIO(target.getvalue()), cut, 1000, 2000, model=tmp_path)
    codec.join([io.BytesIO(f.getvalue()) for f in (cut, target)], joined, model=tmp_path)
    segments = codec.open(io.BytesIO(joined.getvalue()), model=tmp_path).segments
    assert [segment.num_samples for segment in segments] == [2000, 6400]
    assert all(np.array_equal(segment.start.global_codes, global_codes) for segment in segments)  # type: ignore[arg-type]


def test_files_that_cannot_be_opened_are_closed_and_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        codec.open(tmp_path / "nothing.codec")
    (tmp_path / "a").write_bytes(b"no codec file")
    with pytest.raises(BitstreamError, match=r"not a \.codec file"):
        codec.open(tmp_path / "a")
    codec.write(tmp_path / "b", np.zeros((1, 1, 5), int))
    with pytest.raises(ValueError, match="neither a bundled model"):
        codec.open(tmp_path / "b", model="nothing")


# The bundled model


def test_the_bundled_tables_belong_to_the_bundled_model_and_save_what_they_should() -> None:
    model = codec.load()
    token_format = TokenFormat.load()
    assert token_format.codec_id == model.codec_id
    assert token_format.model == model.name
    assert token_format.codebook_sizes == tuple(model.codebook_sizes)
    assert (token_format.sample_rate_hz, token_format.hop_length) == (model.sample_rate_hz, model.hop_length)
    assert token_format.num_frames_before == model.decode_frames_before
    assert token_format.num_frames_after == model.decode_frames_after
    assert token_format.tables is not None

    audio, rate_hz = read_audio(ROOT / "tests" / "data" / "speech.flac")
    audio = resample(audio[:1], rate_hz, model.sample_rate_hz)
    codes = model.encode(torch.from_numpy(audio.copy())[None], num_quantizers=6).codes.numpy()
    target = io.BytesIO()
    codec.write(target, codes)
    reader = Reader(io.BytesIO(target.getvalue()), tables=token_format.tables)
    np.testing.assert_array_equal(reader.read(), codes)
    list(reader)
    kinds = [kind for kind, _, _ in blocks_of(target.getvalue(), reader.header)]
    assert reader.num_code_bytes < 0.95 * packed_bytes(codes.shape[2], reader.header), kinds


# Golden files

# For each: SHA-256 of its codes as little-endian int64, their shape, and skipped and counted samples of each segment.
GOLDEN: dict[str, tuple[str, tuple[int, ...], list[tuple[int, int]]]] = {
    "mono_packed": ("1b8bcf9688fb2c7a556e6278a9116944f1c350be2934a079ba548044ad1bd9c7", (1, 3, 150), [(0, 41343)]),
    "stereo_coded": ("2bc5decf055ad121fa905b4e6fef33c8d77c4814fae8319d0656e3459f2d84aa", (2, 8, 100), [(0, 88199)]),
    "cut": ("75b36d0b611393bc506dc5d650436026b5842ed4c90a69d231a9a1c8ab7614bf", (1, 4, 124), [(9121, 30000)]),
    "joined": (
        "9ecf3d0a882a64968a7a90eb9d38d1afb5ae3d4c08f7d3b017d6950976dc599b",
        (1, 4, 75),
        [(8960, 9000), (0, 5000)],
    ),
    "global_codes": ("d6e4d6d90d0da3baa98ee312d1a0689b2204734dcb8a1df0c4e4c7d83dcc7a36", (1, 1, 90), [(0, 28800)]),
    "index": ("299ba766330c9f653e5053dc5a3363358d491eefb57ddd12557ad5d22c1a95d2", (1, 2, 120), [(0, 33000)]),
    "empty": ("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", (1, 4, 0), [(0, 0)]),
}


def test_the_golden_files_are_those_that_the_tests_know() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.codec" for name in GOLDEN}
    made = golden_files()
    assert list(made) == list(GOLDEN)
    kinds = {kind for data in made.values() for kind, _, _ in blocks_of(data, Reader(io.BytesIO(data)).header)}
    assert kinds == {END, PACKED, CODED, GLOBAL, SEGMENT, INDEX}
    for name, data in made.items():
        assert data == (FOLDER / f"{name}.codec").read_bytes(), f"files of this version have other bytes: {name}"
        assert len(data) < 4096


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_hold_the_same_codes_for_ever(name: str) -> None:
    digest, shape, lengths = GOLDEN[name]
    with codec.open(FOLDER / f"{name}.codec") as file:
        codes = file.read()
        blocks = list(file)
        assert [(s.start.skip_samples, s.num_samples) for s in file.segments] == lengths
        assert file.has_index == (name == "index")
        if name == "global_codes":
            found = file.segments[0].start.global_codes
            assert found is not None
            assert (found.tolist(), file.segments[0].start.global_codebook_size) == (
                [[125, 173, 3986, 2219, 443, 3198, 756, 2538]],
                4096,
            )
    assert codes.shape == shape
    assert hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest() == digest
    if blocks:
        np.testing.assert_array_equal(np.concatenate(blocks, axis=2), codes)
