"""Codecs as ONNX graphs: what `tools.export_onnx` writes does in onnxruntime what the codec does in PyTorch."""

import contextlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch

from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_reference, rvq_search
from codec.layers.recurrent import LSTM
from codec.models.interface import StreamableCodec, streamable
from codec.models.mimi import MimiCodec, MimiConfig
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.pretrained import load, save
from codec.quantizers import residual
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.split import SplitVQConfig
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec
from tools import export_onnx
from tools.onnx_export import plain
from tools.onnx_export.graphs import Shape, encoder_graph

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from tools.examples.onnx_stream import Stream  # noqa: E402  (they import onnxruntime)
from tools.onnx_export.check import Agreement, compare  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tools" / "examples" / "onnx_stream.py"
SMALL: dict[str, Any] = {  # two rates: tracing takes time for every operation
    "strides": (8,),
    "encoder_channels": (8, 16),
    "encoder_blocks": (1, 1),
    "decoder_channels": (8, 16),
    "decoder_blocks": (1, 1),
}


def _export(model: Path, out: Path, *arguments: str) -> str:
    """What the program prints."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["export_onnx", str(model), str(out), "--seconds", "2", *arguments]),
        mock.patch.object(logging.getLogger("torch.__trace"), "propagate", False),  # pytest would keep all of that
        contextlib.redirect_stdout(printed),
    ):
        export_onnx.main()
    return printed.getvalue()


def _seanet(**changes: object) -> SEANetCodec:
    values: dict[str, object] = {
        "sample_rate_hz": 16000,
        "quantizer": ResidualVQConfig(latent_dim=8, num_stages=2, codebook_size=16),
        "ratios": (4, 2),
        "num_filters": 4,
        "num_lstm_layers": 2,
    }
    torch.manual_seed(0)
    return SEANetCodec(SEANetConfig(**values | changes)).eval().requires_grad_(False)  # type: ignore[arg-type]


@dataclass
class Exported:
    """A codec, its graphs, and what the program printed when it wrote them."""

    codec: StreamableCodec
    graphs: Path
    printed: str = ""


def _exported(codec: StreamableCodec, folder: Path, *arguments: str) -> Exported:
    save(codec, folder / "model", name="tiny@1", dtype="float32")
    printed = _export(folder / "model", folder / "graphs", *arguments)
    return Exported(streamable(load(folder / "model")), folder / "graphs", printed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Steps of 3 frames, the quickest to trace, and 2 of the 3 rows of codes."""
    return _exported(tiny_codec(**SMALL), tmp_path_factory.mktemp("tiny"), "--frames", "3", "--num-quantizers", "2")


@pytest.fixture(scope="module")
def voiced(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Steps of any number of frames, all rows, and voices."""
    return _exported(tiny_voiced_codec(**SMALL, semantic_blocks=1), tmp_path_factory.mktemp("voiced"))


def _check_told(graphs: Path) -> dict[str, Any]:
    """What `streams.json` says, which is what the graphs have."""
    told: dict[str, Any] = json.loads((graphs / "streams.json").read_text())
    for side in ("encoder", "decoder"):
        part = told[side]
        leaves = part["state"]
        session = onnxruntime.InferenceSession(graphs / part["graph"])
        assert [x.name for x in session.get_inputs()] == [part["input"]["name"], *(leaf["name"] for leaf in leaves)]
        outputs = [part["output"]["name"], *(leaf["next_name"] for leaf in leaves)]
        assert [x.name for x in session.get_outputs()] == outputs
        shapes = {x.name: x.shape for x in session.get_inputs()}
        first = dict(np.load(graphs / part["initial_state"]))
        from_voice = told["voice"]["outputs"] if side == "decoder" and "voice" in told else []
        assert set(first) == {leaf["name"] for leaf in leaves} - set(from_voice)
        for leaf in leaves:
            assert shapes[leaf["name"]] == leaf["shape"]
            if leaf["name"] in first:
                assert first[leaf["name"]].dtype == leaf["dtype"]
                assert first[leaf["name"]].shape == (1, *leaf["shape"][1:])
    return told


def _run_example(exported: Exported, folder: Path, audio: np.ndarray) -> np.ndarray:
    """What the example makes of a recording, without PyTorch or anything of this project."""
    soundfile.write(folder / "in.wav", audio, 16000, subtype="FLOAT")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'codec', 'tools', 'onnx'} & set(sys.modules)"
    )
    arguments = [str(EXAMPLE), str(exported.graphs), str(folder / "in.wav"), str(folder / "out.wav")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=folder)
    heard: np.ndarray = soundfile.read(folder / "out.wav", dtype="float32")[0]
    return heard


def test_what_the_program_prints_and_tells(tiny: Exported) -> None:
    assert re.search(r"^(\d+) of \1 codes are equal$", tiny.printed, re.MULTILINE)
    told = _check_told(tiny.graphs)
    files = {"encoder_step.onnx", "decoder_step.onnx", "encoder_state.npz", "decoder_state.npz", "streams.json"}
    assert {file.name for file in tiny.graphs.iterdir()} == files
    for words in ("encode, 3 frames ", "decode, 3 frames ", *files):
        assert words in tiny.printed
    assert told["codec_id"] == tiny.codec.codec_id
    assert (told["hop_length"], told["decode_delay_samples"], told["frames_per_step"]) == (32, 32, 3)
    assert (told["codebook_sizes"], told["valid_num_quantizers"]) == ([32, 32], [1, 2])
    assert told["decoder"]["input"]["shape"] == ["batch", 2, 3]
    names = [leaf["name"] for leaf in told["encoder"]["state"]]
    assert names == ["encoder.layers.0", "encoder.layers.2.conv", "encoder.layers.4.conv"]


def test_graphs_tell_nothing_of_the_machine(tiny: Exported) -> None:
    for file in tiny.graphs.glob("*.onnx"):
        assert str(ROOT).encode() not in file.read_bytes()


def test_a_state_that_is_not_carried_is_noticed(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stream.__call__

    def forgetful(stream: Stream, x: np.ndarray) -> dict[str, np.ndarray]:
        before = stream.state
        told = real(stream, x)
        stream.state = before
        return told

    assert not compare(tiny.codec, tiny.graphs, seconds=2.0).failures()
    monkeypatch.setattr(Stream, "__call__", forgetful)
    failures = compare(tiny.codec, tiny.graphs, seconds=2.0).failures()
    assert [line.split()[0] for line in failures] == ["only", "a", "audio"]  # codes, margins, audio


def test_a_stream_without_torch(tiny: Exported, tmp_path: Path) -> None:
    # Absent codes at the end bring out what is late, and the last frames need not fill a step.
    audio = speech_like(1000)
    heard = _run_example(tiny, tmp_path, audio)
    tokens = tiny.codec.encode(torch.from_numpy(audio)[None, None], num_quantizers=2)
    np.testing.assert_allclose(heard, tiny.codec.decode(tokens)[0, 0].numpy(), rtol=0, atol=2**-14)  # 16 bits
    assert len(EXAMPLE.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_codec_with_voices(voiced: Exported, tmp_path: Path) -> None:
    found = compare(voiced.codec, voiced.graphs, seconds=2.0, seed=1)
    assert found.has_pulses
    assert not found.failures()
    assert found.num_codes >= 2 * 4 * 1000
    assert found.num_equal_global_codes == found.num_global_codes == 2 * 4
    told = _check_told(voiced.graphs)
    assert {file.name for file in voiced.graphs.iterdir()} == set(export_onnx.FILES)
    assert len(told["voice"]["outputs"]) == 2  # scales and shifts of both rates
    assert {"decoder.source.history.0", "decoder.source.history.1"} <= {x["name"] for x in told["decoder"]["state"]}
    for words in ("8 of 8 global codes are equal", "encode, 1 frame ", "decode, 16 frames "):
        assert words in voiced.printed
    audio = speech_like(20007)
    heard = _run_example(voiced, tmp_path, audio)
    wanted = voiced.codec.decode(voiced.codec.encode(torch.from_numpy(audio)[None, None]))[0, 0].numpy()
    assert heard.shape == wanted.shape
    assert np.square(heard - wanted.clip(-1, 1)).sum() < 1e-4 * np.square(wanted).sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["seanet", "mimi"])
def test_other_families(family: str, tmp_path: Path) -> None:
    codec: StreamableCodec = _seanet()
    if family == "mimi":
        quantizer = SplitVQConfig(latent_dim=8, num_stages=3, codebook_size=16, codebook_dim=4)
        config = MimiConfig(
            quantizer=quantizer, ratios=(4, 2), num_filters=4, num_layers=1, num_heads=2, feedforward_dim=16, window=6
        )
        codec = MimiCodec(config)
    exported = _exported(codec, tmp_path)
    _check_told(exported.graphs)
    assert not compare(exported.codec, exported.graphs, seconds=1.0, seed=1).failures()


def test_bounds() -> None:
    good = Agreement(10000, 9991, 9e-5, 9e-6, 120.0, 8, 8, has_pulses=False)
    assert not good.failures()
    for changed, words in [
        (replace(good, num_equal_codes=9989), "only 9989 of 10000 codes"),
        (replace(good, largest_margin=2e-4), "a margin of 0.0002"),
        (replace(good, difference=2e-5), "audio differs by 2e-05"),
        (replace(good, difference=float("nan")), "audio differs by nan"),
        (replace(good, num_equal_global_codes=7), "only 7 of 8 global codes"),
        (replace(good, has_pulses=True, difference=0.1, snr_db=39.0), "audio differs by -39.0 dB"),
    ]:
        (line,) = changed.failures()
        assert words in line
    assert not replace(good, has_pulses=True, difference=0.1, snr_db=41.0).failures()


def test_lstm_layers_make_way_for_operators() -> None:
    copied = plain.plain_copy(_seanet())
    assert not any(isinstance(module, LSTM) for module in copied.modules())


@pytest.mark.parametrize("form", ["plain", "grouped", "by direction", "factorised"])
def test_the_search_is_the_reference(form: str) -> None:
    torch.manual_seed(0)
    if form == "grouped":
        tables = SearchTables(torch.randn(4, 50, 6), num_groups=2)
    elif form == "by direction":
        tables = SearchTables(torch.randn(3, 50, 6), by="direction")
    elif form == "factorised":
        takes = [(6, torch.randn(50, 12)), (12, torch.randn(50, 6)), (0, torch.zeros(50, 6))]
        tables = SearchTables(torch.randn(3, 50, 6), chains=(0, 1, 2), takes=takes)
    else:
        codebooks = torch.randn(3, 50, 6)
        codebooks[:, 7] = codebooks[:, 3]  # a tie: the lower index wins
        tables = SearchTables(codebooks)
    latents_ND = torch.randn(300, tables.num_dims)
    if tables.is_distance:  # of nothing, all directions are tied, and only four are candidates
        latents_ND[:50] = 0.0
        latents_ND[50:100, :6] = tables.entries_KCd[0]
    codes_NK = plain._search(latents_ND, tables)
    assert torch.equal(codes_NK, rvq_reference(latents_ND, tables))
    assert torch.equal(plain._search(latents_ND, tables, num_rows=2), codes_NK[:, :2])


def test_near_ties_are_decided_in_float64() -> None:
    torch.manual_seed(0)
    codebooks = torch.randn(1, 40, 8).repeat_interleave(3, dim=1)
    codebooks += 1e-7 * torch.randn(codebooks.shape)  # three entries that float32 does not tell apart
    tables = SearchTables(codebooks)
    latents_ND = 100.0 * torch.randn(2000, 8)
    exact_N = rvq_reference(latents_ND, tables)[:, 0]
    rough_N = (latents_ND @ tables.entries_KCd[0].T + tables.exact_offsets_KC[0].float()).argmax(1)
    assert not torch.equal(rough_N, exact_N)
    assert torch.equal(plain._search(latents_ND, tables)[:, 0], exact_N)


def test_sums_of_entries_are_those_of_the_library() -> None:
    codes_NK, codebooks_KCd = torch.randint(-1, 20, (100, 4)), torch.randn(4, 20, 6)
    for num_groups in (1, 2):
        wanted = rvq_decode(codes_NK, codebooks_KCd, num_groups=num_groups)
        found = plain._decode(codes_NK, codebooks_KCd, num_groups=num_groups)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # summed in another order


def test_the_library_is_itself_again_afterwards() -> None:
    before = residual.__dict__["rvq_search"]
    with plain.plain_forms():
        assert residual.__dict__["rvq_search"] is plain._search
    assert residual.__dict__["rvq_search"] is before is rvq_search


def test_mirrored_beginnings_have_no_fixed_state() -> None:
    with pytest.raises(ValueError, match="withholds the first frames"):
        encoder_graph(_seanet(pad_mode="reflect"), Shape(num_quantizers=2, num_frames=None, opset=20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "'nowhere' is neither a bundled model"),
        (["MODEL", "out"], "cannot stream"),
        (["speech_16k", "out", "--num-quantizers", "9"], "num_quantizers=9 is not one of"),
        (["speech_16k", "out", "--frames", "0"], "--frames=0 is neither"),
        (["speech_16k", "out", "--frames", "many"], "--frames=many is neither"),
        (["speech_16k", "out", "--opset", "11"], "--opset=11 is below 20"),
        (["speech_16k", "out", "--seconds", "0"], "--seconds=0.0 must be positive"),
        (["speech_16k", "full"], "It holds mine.txt, which is not to be replaced"),
        (["speech_16k", "out/of/reach"], "Its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    if "MODEL" in arguments:
        save(_seanet(causal=False), tmp_path / "MODEL", name="looks_ahead@1")
    monkeypatch.setattr(sys, "argv", ["export_onnx", *arguments])
    with pytest.raises(SystemExit) as stopped:
        export_onnx.main()
    assert message in str(stopped.value)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["export_onnx", "speech_16k", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"needs no_such_package: pip install 'exact-codec\[export\]'"):
        export_onnx.main()


def test_nothing_stays_of_what_is_out_of_bounds(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(codec: StreamableCodec, folder: Path, **_: object) -> None:
        shutil.copytree(tiny.graphs, folder, dirs_exist_ok=True)  # of another codec

    save(tiny_codec(seed=1, **SMALL), tmp_path / "model", name="other@1", dtype="float32")
    monkeypatch.setattr(export_onnx, "write_graphs", write)
    with pytest.raises(SystemExit, match=r"error: only .* codes are equal; .*audio differs"):
        _export(tmp_path / "model", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
