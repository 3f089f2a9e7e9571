import functools
import importlib
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codec.importers.ecdc import EcdcFile, from_tokens, read_ecdc, to_tokens, write_ecdc
from codec.importers.encodec import ENCODEC_24KHZ, ENCODEC_48KHZ, load_encodec
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like

CONFIGS = {"encodec_24khz": ENCODEC_24KHZ, "encodec_48khz": ENCODEC_48KHZ}
MODELS = list(CONFIGS)


def _num_frames(model: str, num_samples: int) -> list[int]:
    """Frames of each segment, as the model's own code counts them."""
    codec = _codec(model)
    return [frames.stop - frames.start for _, _, frames in codec._segments(num_samples)] if num_samples else []


@functools.cache
def _codec(model: str) -> SEANetCodec:
    """A codec of the published shape, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = SEANetCodec(CONFIGS[model]).eval().requires_grad_(False)
    codec.codec_id = "0123456789abcdef"
    return codec


def _random_file(model: str, num_samples: int, num_quantizers: int) -> EcdcFile:
    rng = np.random.default_rng(0)
    frames = _num_frames(model, num_samples)
    codes = rng.integers(0, 1024, (num_quantizers, sum(frames)))
    scales = rng.random(len(frames)).astype(np.float32) if model == "encodec_48khz" else None
    return EcdcFile(model, num_samples, codes, scales)


def _bytes_of(tmp_path: Path, file: EcdcFile) -> bytes:
    write_ecdc(tmp_path / "some.ecdc", file)
    return (tmp_path / "some.ecdc").read_bytes()


def _read(tmp_path: Path, data: bytes) -> EcdcFile:
    (tmp_path / "given.ecdc").write_bytes(data)
    return read_ecdc(tmp_path / "given.ecdc")


def _assert_same(found: EcdcFile, expected: EcdcFile) -> None:
    assert (found.model, found.num_samples, found.codes.dtype) == (expected.model, expected.num_samples, np.int64)
    assert np.array_equal(found.codes, expected.codes)
    assert (found.scales is None) == (expected.scales is None)
    if found.scales is not None and expected.scales is not None:
        assert np.array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("model", MODELS)
@given(num_samples=st.integers(0, 150_000), num_quantizers=st.integers(1, 16))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, model: str, num_samples: int, num_quantizers: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    file = _random_file(model, num_samples, num_quantizers)
    _assert_same(_read(folder, _bytes_of(folder, file)), file)


def test_bytes_of_a_small_file(tmp_path: Path) -> None:
    """Written by hand: two frames of three codes are 60 bits, the lowest of each first, in 8 bytes."""
    codes = np.array([[1, 1023], [512, 0], [2, 5]])
    data = _bytes_of(tmp_path, EcdcFile("encodec_24khz", 321, codes))
    text = b'{"m": "encodec_24khz", "al": 321, "nc": 3, "lm": false}'
    packed = sum(int(code) << (10 * i) for i, code in enumerate([1, 512, 2, 1023, 0, 5]))
    assert data == b"ECDC\x00" + struct.pack(">I", len(text)) + text + packed.to_bytes(8, "little")


def test_each_segment_begins_with_its_scale_and_ends_at_a_byte(tmp_path: Path) -> None:
    num_samples = 47520 + 320  # a whole segment, and one of a single frame
    codes = np.zeros((1, 151), np.int64)
    codes[0, 150] = 1023
    scales = np.array([0.5, 2.0], np.float32)
    data = _bytes_of(tmp_path, EcdcFile("encodec_48khz", num_samples, codes, scales))
    start = data.index(b"}") + 1
    assert data[start:] == struct.pack(">f", 0.5) + bytes(-(-1500 // 8)) + struct.pack(">f", 2.0) + b"\xff\x03"


@pytest.mark.parametrize("model", MODELS)
def test_every_cut_is_a_value_error(tmp_path: Path, model: str) -> None:
    data = _bytes_of(tmp_path, _random_file(model, 48_100, 1))
    for num_bytes in range(len(data)):
        with pytest.raises(ValueError, match=r"given\.ecdc: it is (cut off|no \.ecdc file)"):
            _read(tmp_path, data[:num_bytes])
    with pytest.raises(ValueError, match="it goes on for 3 bytes after its end"):
        _read(tmp_path, data + b"abc")


@given(data=st.data())
def test_damage_is_a_value_error_or_other_codes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("files")
    good = bytearray(_bytes_of(folder, _random_file("encodec_48khz", 50_000, 2)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    reasons = []
    try:
        assert _read(folder, bytes(good)).model in CONFIGS
    except ValueError as error:
        reasons.append(str(error))
    assert all(reason.startswith(str(folder)) and "\n" not in reason for reason in reasons)


def _with_header(**changes: Any) -> bytes:
    header = {"m": "encodec_24khz", "al": 320, "nc": 1, "lm": False} | changes
    text = json.dumps({key: value for key, value in header.items() if value is not None}).encode()
    return b"ECDC\x00" + struct.pack(">I", len(text)) + text + bytes(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"it is no \.ecdc file"),
        (b"RIFF\x00\x00\x00\x00\x00", r"it is no \.ecdc file"),
        (b"ECDC\x01\x00\x00\x00\x02{}", "its version is 1; 0 is known"),
        (b"ECDC\x00\xff\xff\xff\xff{}", "it is cut off within its header"),
        (b"ECDC\x00\x00\x00\x00\x02[]", "its header is damaged: it must say m, al, nc, lm"),
        (b"ECDC\x00\x00\x00\x00\x02{]", "its header is damaged: it is no JSON"),
        (b"ECDC\x00\x00\x00\x00\x02\xff\xff", "its header is damaged: it is no JSON"),
        (b"ECDC\x00\x00\x01\x00\x00" + b"[" * 65536, "its header is damaged: it is no JSON"),
        (_with_header(al=None), "its header is damaged: it must say"),
        (_with_header(al=320.0), "its header is damaged: it must say"),
        (_with_header(nc=True), "its header is damaged: it must say"),
        (_with_header(lm=0), "its header is damaged: it must say"),
        (_with_header(m="encodec_32khz"), "model 'encodec_32khz' is not one of encodec_24khz, encodec_48khz"),
        (_with_header(lm=True), "it was written with a language model .* must be the same to the last bit"),
        (_with_header(nc=0), "its header is damaged: 320 samples, 0 rows of codes"),
        (_with_header(nc=33), "its header is damaged: 320 samples, 33 rows of codes"),
        (_with_header(al=-1), "its header is damaged: -1 samples, 1 rows of codes"),
        (_with_header(al=10**300), "it is cut off: [0-9]+ bytes are too few for 1000"),
        (_with_header(m="encodec_48khz", al=10**300), "it is cut off"),
    ],
)
def test_files_that_cannot_be_read_are_value_errors_and_take_no_memory(
    tmp_path: Path, data: bytes, message: str
) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_impossible_scales_are_value_errors(tmp_path: Path, scale: float) -> None:
    data = bytearray(_bytes_of(tmp_path, _random_file("encodec_48khz", 320, 1)))
    start = data.index(b"}") + 1
    data[start : start + 4] = struct.pack(">f", scale)
    with pytest.raises(ValueError, match="scales must be finite and not negative"):
        _read(tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("encodec", 320, np.zeros((1, 1), int)), "model 'encodec' is not one of"),
        (("encodec_24khz", -1, np.zeros((1, 1), int)), "num_samples must not be negative"),
        (("encodec_24khz", 320, np.zeros(1, int)), r"codes of encodec_24khz must be \[1..32, F\], got \(1,\)"),
        (("encodec_48khz", 320, np.zeros((17, 1), int)), r"must be \[1..16, F\], got \(17, 1\)"),
        (("encodec_24khz", 321, np.zeros((1, 1), int)), "321 samples are 2 frames, not 1"),
        (("encodec_24khz", 320, np.full((1, 1), 1024)), r"codes must be integers in 0\.\.1023"),
        (("encodec_24khz", 320, np.full((1, 1), -1)), r"codes must be integers in 0\.\.1023"),
        (("encodec_24khz", 320, np.zeros((1, 1))), r"codes must be integers in 0\.\.1023"),
        (("encodec_24khz", 320, np.zeros((1, 1), int), np.ones(1)), "encodec_24khz has no scale for each segment"),
        (("encodec_48khz", 320, np.zeros((1, 1), int)), "encodec_48khz has a scale for each segment"),
        (("encodec_48khz", 320, np.zeros((1, 1), int), np.ones(2)), "1 segments need as many scales"),
    ],
)
def test_parts_that_do_not_belong_together_are_value_errors(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EcdcFile(*values)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, full_disk: Any) -> None:
    small, large = _random_file("encodec_24khz", 3200, 2), _random_file("encodec_24khz", 48_000, 32)
    before = _bytes_of(tmp_path, small)
    with full_disk(), pytest.raises(OSError, match=r"some\.ecdc"):
        write_ecdc(tmp_path / "some.ecdc", large)
    assert (tmp_path / "some.ecdc").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["some.ecdc"]


# Tokens


def _audio(model: str, num_samples: int) -> Tensor:
    num_channels = CONFIGS[model].num_channels
    return torch.stack([torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(num_channels)])[None]


@pytest.mark.parametrize("model", MODELS)
def test_tokens_through_a_file(tmp_path: Path, model: str) -> None:
    codec = _codec(model)
    num_samples = {"encodec_24khz": 4801, "encodec_48khz": 49_000}[model]
    tokens = codec.encode(_audio(model, num_samples), num_quantizers=4)
    write_ecdc(tmp_path / "some.ecdc", from_tokens(tokens, codec))
    again = to_tokens(read_ecdc(tmp_path / "some.ecdc"), codec)
    assert torch.equal(again.codes, tokens.codes)
    assert torch.equal(again.num_samples, tokens.num_samples)
    assert again.codec_id == tokens.codec_id
    assert torch.equal(codec.decode(again), codec.decode(tokens))


def test_a_row_of_a_padded_batch_goes_into_a_file() -> None:
    codec = _codec("encodec_48khz")
    audio = torch.zeros(2, 2, 48_000)
    audio[0, :, :3200] = _audio("encodec_48khz", 3200)[0]
    tokens = codec.encode(audio, torch.tensor([3200, 48_000]), num_quantizers=1)
    assert tokens.codes.shape[2] > 10
    file = from_tokens(tokens.row(0), codec)
    assert (file.num_samples, file.codes.shape, file.scales.shape) == (3200, (1, 10), (1,))
    assert np.array_equal(file.codes, tokens.codes[0, :, :10])


def test_tokens_that_no_file_can_hold_are_value_errors() -> None:
    codec, other = _codec("encodec_24khz"), _codec("encodec_48khz")
    tokens = codec.encode(_audio("encodec_24khz", 640), num_quantizers=1)
    file = from_tokens(tokens, codec)
    with pytest.raises(ValueError, match="the file was made by encodec_24khz, and this codec is encodec_48khz"):
        to_tokens(file, other)
    tiny = SEANetCodec(
        SEANetConfig(sample_rate_hz=24000, num_filters=2, quantizer=ResidualVQConfig(latent_dim=2, num_stages=1))
    )
    with pytest.raises(ValueError, match=r"\.ecdc files are of the published EnCodec models, and this codec is none"):
        to_tokens(file, tiny)
    with pytest.raises(ValueError, match="made by codec '', not by this one"):
        from_tokens(tiny.encode(torch.zeros(1, 1, 640)), codec)
    with pytest.raises(ValueError, match="one recording, not a batch of 2"):
        from_tokens(codec.encode(torch.zeros(2, 1, 640), num_quantizers=1), codec)


# Against the package itself.


def _peer(model: str) -> Any:
    encodec = pytest.importorskip("encodec")
    torch.manual_seed(0)
    peer = getattr(encodec.EncodecModel, model.replace("encodec_", "encodec_model_"))(pretrained=False).eval()
    peer.name = model
    for layer in peer.quantizer.vq.layers:
        layer._codebook.embed.normal_()
        layer._codebook.inited.fill_(1)
    return peer


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "num_samples", "kbps", "num_rows"),
    [
        ("encodec_24khz", 4801, 1.5, 2),
        ("encodec_24khz", 3200, 24.0, 32),
        ("encodec_48khz", 49_000, 3.0, 2),
        ("encodec_48khz", 6400, 24.0, 16),
    ],
)
@torch.no_grad()
def test_files_of_the_package_and_ours_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, num_samples: int, kbps: float, num_rows: int
) -> None:
    pytest.importorskip("encodec")
    compress = importlib.import_module("encodec.compress")  # the package hides it behind a function
    peer = _peer(model)
    peer.set_target_bandwidth(kbps)
    monkeypatch.setitem(compress.MODELS, model, lambda: peer)  # the released weights would be downloaded
    audio = _audio(model, num_samples)
    theirs = compress.compress(peer, audio[0], use_lm=False)
    file = _read(tmp_path, theirs)
    frames = peer.encode(audio)
    assert np.array_equal(file.codes, torch.cat([codes for codes, _ in frames], dim=2)[0])
    assert file.codes.shape[0] == num_rows
    if file.scales is not None:
        assert np.array_equal(file.scales, torch.cat([scale for _, scale in frames])[:, 0])
    assert _bytes_of(tmp_path, file) == theirs
    # What we write, the package decompresses; what it hears, we hear.
    heard, rate_hz = compress.decompress_from_file(io.BytesIO(_bytes_of(tmp_path, file)))
    assert rate_hz == CONFIGS[model].sample_rate_hz
    torch.save(peer.state_dict(), tmp_path / "peer.th")
    codec = load_encodec(tmp_path / "peer.th", allow_pickle=True)
    ours = codec.decode(to_tokens(file, codec))[0]
    # Their weight norm rounds otherwise than folded weights do: see test_import_encodec.
    torch.testing.assert_close(ours, heard, rtol=0, atol=1e-5 * float(heard.abs().max()))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@torch.no_grad()
def test_lengths_that_the_package_cannot_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("encodec")
    compress = importlib.import_module("encodec.compress")  # the package hides it behind a function
    peer = _peer("encodec_24khz")
    peer.set_target_bandwidth(1.5)
    monkeypatch.setitem(compress.MODELS, "encodec_24khz", lambda: peer)
    theirs = compress.compress(peer, _audio("encodec_24khz", 6720)[0], use_lm=False)
    with pytest.raises(EOFError, match="ended sooner than expected"):
        compress.decompress(theirs)
    assert _read(tmp_path, theirs).codes.shape == (2, 21)
