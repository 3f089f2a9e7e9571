import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec.importers.dac import load_dac
from codec.importers.dac_file import DACFile, decode_dac, read_dac, write_dac
from codec.models.dac import DACCodec, DACConfig
from codec.quantizers.factorized import FactorizedVQConfig
from codec.testing import speech_like

TINY = DACConfig(
    sample_rate_hz=16000,
    encoder_dim=4,
    encoder_rates=(2, 5),
    decoder_dim=12,
    decoder_rates=(5, 2),
    quantizer=FactorizedVQConfig(latent_dim=16, num_stages=4, codebook_size=16, codebook_dim=3),
)


def _file(**changes: Any) -> DACFile:
    values: dict[str, Any] = {
        "codes": np.random.default_rng(0).integers(0, 16, (2, 4, 30)),
        "sample_rate_hz": 44100,
        "num_samples": 801,
        "loudness_db": -23.5,
        "frames_per_chunk": 30,
        "is_padded": True,
    }
    return DACFile(**values | changes)


def _write_pickle(path: Path, artifacts: Any) -> None:
    """A .npy file as numpy writes it of any object."""
    with open(path, "wb") as file:
        np.save(file, np.array(artifacts, dtype=object))


def _artifacts(**changes: Any) -> dict[str, Any]:
    metadata = {
        "input_db": np.array([-20.0], dtype=np.float32),
        "original_length": 300,
        "sample_rate": 16000,
        "chunk_length": 30,
        "channels": 1,
        "padding": True,
        "dac_version": "1.0.0",
    }
    codes = changes.pop("codes", np.ones((1, 4, 30), dtype=np.uint16))
    return {"codes": codes, "metadata": metadata | changes}


@given(
    num_channels=st.integers(1, 3),
    num_rows=st.integers(1, 12),
    frames_per_chunk=st.integers(1, 9),
    num_chunks=st.integers(1, 4),
    loudness_db=st.floats(-70, 0, width=32),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(
    tmp_path: Path,
    num_channels: int,
    num_rows: int,
    frames_per_chunk: int,
    num_chunks: int,
    loudness_db: float,
    seed: int,
) -> None:
    shape = (num_channels, num_rows, frames_per_chunk * num_chunks)
    content = _file(
        codes=np.random.default_rng(seed).integers(0, 2**16, shape),
        frames_per_chunk=frames_per_chunk,
        is_padded=num_chunks == 1,
        loudness_db=loudness_db,
    )
    write_dac(tmp_path / "some.dac", content)
    read = read_dac(tmp_path / "some.dac", allow_pickle=True)
    assert np.array_equal(read.codes, content.codes)
    assert read.codes.dtype == np.int64
    for name in ("sample_rate_hz", "num_samples", "loudness_db", "frames_per_chunk", "is_padded"):
        assert getattr(read, name) == getattr(content, name)
    assert [path.name for path in tmp_path.iterdir()] == ["some.dac"]


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy2", "numpy1"])
def test_arrays_are_read_as_any_numpy_pickles_them(tmp_path: Path, module: bytes) -> None:
    codes = np.arange(120).reshape(1, 4, 30)
    for stored in (codes.astype(np.uint16), np.asfortranarray(codes.astype(">i8"))):
        content = pickle.dumps(np.array(_artifacts(codes=stored), dtype=object), protocol=3)
        names = [name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray") if b"c" + name in content]
        _write_header_and(tmp_path / "some.dac", content.replace(names[0], module))
        assert np.array_equal(read_dac(tmp_path / "some.dac", allow_pickle=True).codes, codes)


def test_it_is_read_on_request_only(tmp_path: Path) -> None:
    write_dac(tmp_path / "some.dac", _file())
    with pytest.raises(ValueError, match=r"some\.dac is a pickle; if you trust it, allow_pickle=True reads it"):
        read_dac(tmp_path / "some.dac")
    with pytest.raises(ValueError, match="is no file"):
        read_dac(tmp_path / "none.dac", allow_pickle=True)


class _Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def test_a_harmful_file_does_no_harm(tmp_path: Path) -> None:
    harm = str(tmp_path / "harm")
    for bad in (_Call(os.mkdir, harm), _Call(np.load, harm), _Call(eval, f"__import__('os').mkdir({harm!r})")):
        for artifacts in (bad, _artifacts(sample_rate=bad), _artifacts(codes=bad)):
            _write_pickle(tmp_path / "bad.dac", artifacts)
            with pytest.raises(ValueError, match=r"it asks for [\w.]+, which no such file needs"):
                read_dac(tmp_path / "bad.dac", allow_pickle=True)
            assert not os.path.exists(harm)


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever is on the stack: of a function that stands in, it would for all later files."""
    for name in ("numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct"):
        module, attribute = name.split()
        program = b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
        _write_header_and(tmp_path / "bad.dac", program)
        with pytest.raises(ValueError, match="cannot be read as a"):
            read_dac(tmp_path / "bad.dac", allow_pickle=True)
    from codec.importers import dac_file

    for stand_in in dac_file._STAND_INS.values():
        assert not hasattr(stand_in, "evil")


def _write_header_and(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(content)


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        (3, "'int' object is not subscriptable"),
        ({"codes": np.ones((1, 4, 30), np.uint16)}, "'metadata'"),
        (_artifacts(dac_version="2.0.0"), r"its version is '2\.0\.0', not '1\.0\.0'"),
        (_artifacts(sample_rate="16000"), "sample_rate='16000' is no whole number"),
        (_artifacts(channels=True), "channels=True is no whole number"),
        (_artifacts(padding=1), "padding=1 is neither True nor False"),
        (_artifacts(codes=np.ones((1, 4, 30), np.float32)), "codes must be integers"),
        (_artifacts(codes=np.array([["a"]])), "something else than numbers"),
        (_artifacts(codes=np.array([[{}]])), "something else than numbers"),
        (_artifacts(codes=np.ones((4, 30), np.uint16)), r"codes of shape \(4, 30\) are not those of a recording of 1"),
        (_artifacts(channels=2), "are not those of a recording of 2 channels"),
        (_artifacts(input_db=np.array([1.0, 2.0])), "are not those of a recording"),
        (_artifacts(input_db=np.array([np.nan])), "loudness_db must be finite"),
        (_artifacts(input_db=-20.0), "'float' object has no attribute"),
        (_artifacts(chunk_length=7), "30 frames are not a number of chunks of 7"),
        (_artifacts(chunk_length=0), "30 frames are not a number of chunks of 0"),
        (_artifacts(chunk_length=15), "codes in several chunks cannot have been padded"),
        (_artifacts(original_length=-1), "-1 samples at 16000 Hz are no recording"),
    ],
)
def test_contents_that_do_not_fit_are_value_errors(tmp_path: Path, artifacts: Any, message: str) -> None:
    _write_pickle(tmp_path / "odd.dac", artifacts)
    with pytest.raises(ValueError, match=rf"odd\.dac cannot be read as a \.dac file: .*{message}"):
        read_dac(tmp_path / "odd.dac", allow_pickle=True)


def test_other_files_are_value_errors(tmp_path: Path) -> None:
    path = tmp_path / "odd.dac"
    np.save(tmp_path / "numbers.npy", np.ones(3))
    for content in (b"", b"noise", (tmp_path / "numbers.npy").read_bytes(), pickle.dumps(_artifacts())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a"):
            read_dac(path, allow_pickle=True)
    for program in (b"", b"N.", b"]q\x00h\x00a.", b"(" * 5000 + b"l" * 5000 + b".", b"\x80\x04\x8a\xff."):
        _write_header_and(path, program)
        with pytest.raises(ValueError, match="cannot be read as a"):
            read_dac(path, allow_pickle=True)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_a_value_error_or_a_record(tmp_path: Path, at: int, value: int, cut: bool) -> None:
    """It has no checksum, so another number is another number; but nothing else can come of it."""
    path = tmp_path / "some.dac"
    write_dac(path, _file(codes=np.ones((1, 2, 30), np.int64)))
    content = bytearray(path.read_bytes())
    at %= len(content)
    path.write_bytes(content[:at] if cut else content[:at] + bytes([value]) + content[at + 1 :])
    outcome: DACFile | ValueError
    try:
        outcome = read_dac(path, allow_pickle=True)
    except ValueError as error:
        outcome = error
    assert isinstance(outcome, ValueError) or (isinstance(outcome, DACFile) and not cut)
    assert "\n" not in str(outcome) or not isinstance(outcome, ValueError)


def _codec() -> DACCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DACCodec(TINY).eval().requires_grad_(False)


def test_a_file_of_one_piece_is_decoded_as_tokens_are() -> None:
    codec, content = _codec(), _file(sample_rate_hz=48000, num_samples=850)
    audio = decode_dac(codec, content)
    assert audio.shape == (2, 284)  # a third of 850, rounded up
    expected = codec.synthesize(codec.quantizer.decode(torch.from_numpy(content.codes)), 300)[:, 0]
    assert torch.equal(audio, expected[:, :284])


def test_chunks_are_decoded_apart_and_without_padding() -> None:
    codec = _codec()
    chunk = np.random.default_rng(0).integers(0, 16, (2, 4, 100))
    content = _file(
        codes=np.tile(chunk, 2), frames_per_chunk=100, is_padded=False, sample_rate_hz=16000, num_samples=1500
    )
    audio = decode_dac(codec, content)
    # Convolutions of 7 make 94 of 100 frames; rates make (94 + 1) * 5 and (397 + 1) * 2, residual units take 78 each;
    # the last convolution takes 6.
    num_known = 712
    assert audio.shape == (2, 1500)
    assert torch.equal(audio[:, :num_known], audio[:, num_known : 2 * num_known])
    assert not audio[:, 2 * num_known :].any()
    # Far from the edges it is what a decoder that pads makes of the chunk; ((3 * 5 - 3 + 39) * 2 - 1 + 39) + 3 in.
    padded = codec.synthesize(codec.quantizer.decode(torch.from_numpy(chunk)), 1000)[:, 0]
    inner = slice(250, 450)
    torch.testing.assert_close(audio[:, inner], padded[:, 143:][:, inner], rtol=0, atol=1e-6)
    assert not torch.allclose(audio[:, :20], padded[:, 143:163], rtol=0, atol=1e-6)


def test_codes_that_do_not_fit_the_codec_are_value_errors() -> None:
    codec = _codec()
    with pytest.raises(ValueError, match="num_quantizers=5 is not one of"):
        decode_dac(codec, _file(codes=np.zeros((1, 5, 30), np.int64)))
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.15"):
        decode_dac(codec, _file(codes=np.full((1, 4, 30), 16)))
    with pytest.raises(ValueError, match="these chunks have too few frames to be decoded without padding"):
        decode_dac(codec, _file(codes=np.zeros((1, 4, 20), np.int64), frames_per_chunk=20, is_padded=False))
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.65535, got 0\.\.65536"):
        _file(codes=np.full((1, 4, 30), 2**16) * (np.arange(30) > 3))


# The package, whose own dependencies warn of what they call.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.peer
@pytest.mark.parametrize("window_seconds", [None, 0.2], ids=["whole", "chunks"])
@torch.no_grad()
def test_files_of_the_package(tmp_path: Path, window_seconds: float | None) -> None:
    dac, audiotools = pytest.importorskip("dac"), pytest.importorskip("audiotools")
    torch.manual_seed(0)
    quantizer = TINY.quantizer
    peer = dac.DAC(
        encoder_dim=TINY.encoder_dim,
        encoder_rates=list(TINY.encoder_rates),
        latent_dim=quantizer.latent_dim,
        decoder_dim=TINY.decoder_dim,
        decoder_rates=list(TINY.decoder_rates),
        n_codebooks=quantizer.num_stages,
        codebook_size=quantizer.codebook_size,
        codebook_dim=quantizer.codebook_dim,
        sample_rate=TINY.sample_rate_hz,
    ).eval()
    peer.save(tmp_path / "weights.pth", package=False)
    codec = load_dac(tmp_path / "weights.pth", allow_pickle=True)

    num_samples = 16_001 if window_seconds else 15_995  # of what is whole, its last samples are the zeros
    audio = np.stack([speech_like(num_samples, seed=seed) for seed in range(2)])
    signal = audiotools.AudioSignal(torch.from_numpy(audio)[None], TINY.sample_rate_hz)
    theirs = peer.compress(signal, win_duration=window_seconds)
    theirs.save(tmp_path / "theirs.dac")
    ours = read_dac(tmp_path / "theirs.dac", allow_pickle=True)
    assert np.array_equal(ours.codes, theirs.codes.numpy())
    assert ours.is_padded == (window_seconds is None) == theirs.padding
    assert (ours.sample_rate_hz, ours.num_samples) == (TINY.sample_rate_hz, num_samples)
    assert ours.frames_per_chunk == theirs.chunk_length
    assert ours.loudness_db == pytest.approx(float(theirs.input_db))

    write_dac(tmp_path / "ours.dac", ours)
    again = dac.DACFile.load(tmp_path / "ours.dac")
    for field in ("chunk_length", "original_length", "input_db", "channels", "sample_rate", "padding"):
        assert getattr(again, field) == getattr(theirs, field)
    assert torch.equal(again.codes, theirs.codes)

    # The package goes on to amplify each channel to the loudness of the recording.
    expected = peer.decompress(tmp_path / "ours.dac").audio_data[0]
    heard = decode_dac(codec, ours)
    num_known = heard.shape[1] - (6 if window_seconds is None else 0)
    peaks = [signal[:, :num_known].abs().amax(1, keepdim=True) for signal in (expected, heard)]
    loudest = float(expected.abs().max())
    # Float32, and weights that were folded into float32.
    torch.testing.assert_close(heard * (peaks[0] / peaks[1]), expected, rtol=0, atol=1e-4 * loudest)
