"""`codec decode --conceal`: damaged blocks are bridged, lengths stay, and one line says what was lost."""

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import test_bicodec
import test_dac
import torch
from commands import (
    RATE_HZ,
    assert_wav,
    partial_files,
    pipe_through,
    read_json,
    refusal,
    run,
    succeed,
    the_line,
    write_wav,
)
from containers import CODED, END, GLOBAL, PACKED, blocks_of

from codec import token_format
from codec.bitstream import Reader
from codec.pretrained import load, save
from codec.salvage import SalvagingReader
from codec.streaming import StreamingDecoder
from codec.testing import speech_like
from codec.transcode import decode_events

pytest_plugins = ["commands"]

BLOCK = 640  # samples: 10 frames of the tiny codecs


@pytest.fixture
def blocks(speech: Path, model: Path) -> Path:
    """Two channels of 3000 samples in blocks of 10 frames."""
    succeed("encode", speech, "blocks.codec", "-m", model, "--frames-per-block", 10)
    return speech.with_name("blocks.codec")


def places(path: str | Path, *kinds: int) -> list[int]:
    """Where blocks of these kinds begin."""
    with Reader(path) as reader:
        header = reader.header
    return [at for kind, _, at in blocks_of(Path(path).read_bytes(), header) if kind in kinds]


def damage(path: str | Path, *offsets: int) -> None:
    data = bytearray(Path(path).read_bytes())
    for offset in offsets:
        data[offset] ^= 0x10
    Path(path).write_bytes(data)


def heard(path: str | Path) -> np.ndarray:
    audio: np.ndarray = soundfile.read(path, dtype="int16", always_2d=True)[0]
    return audio


def concealed(*args: object) -> str:
    """The one line on stderr of a command that succeeds."""
    result = run(*args)
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    return the_line(result.stderr)


def test_a_damaged_block_fades_and_the_rest_is_there(blocks: Path, model: Path) -> None:
    succeed("decode", blocks, "true.wav", "-m", model)
    second, third = places(blocks, PACKED, CODED)[1:3]
    damage(blocks, second + 5)
    assert "blocks.codec: a block is damaged (checksum)" in refusal("decode", blocks, "out.wav", "-m", model)
    said = concealed("decode", blocks, "out.wav", "-m", model, "--conceal")
    assert said == f"codec: {blocks}: damaged; concealed 0.040 to 0.080 s\n"
    assert_wav("out.wav", 2, 3000, RATE_HZ)
    out, true = heard("out.wav"), heard("true.wav")
    codec = load(model)
    reach = codec.hop_length * codec.decode_frames_before
    known = BLOCK - codec.decode_delay_samples
    assert np.array_equal(out[:known], true[:known])
    assert np.array_equal(out[2 * BLOCK + max(reach, 160) :], true[2 * BLOCK + max(reach, 160) :])
    assert not np.array_equal(out, true)
    assert 0 < np.abs(out[BLOCK : 2 * BLOCK]).max() <= 2 * np.abs(true[:BLOCK]).max()
    # One that is longer than the fade; and the first, before which there is nothing.
    damage(blocks, third + 5, places(blocks, END)[0] - 20)
    said = concealed("decode", blocks, "out.wav", "-m", model, "--conceal", "--force")
    assert "concealed 0.040 to 0.120 s, 0.160 to 0.188 s\n" in said


def test_silence_where_nothing_came_before_and_after_the_fade(folder: Path, model: Path) -> None:
    write_wav("long.wav", speech_like(12000)[None])
    succeed("encode", "long.wav", "long.codec", "-m", model, "--frames-per-block", 50)
    frames = places("long.codec", PACKED, CODED)
    damage("long.codec", frames[0] + 5, frames[2] + 5)
    said = concealed("decode", "long.codec", "out.wav", "-m", model, "--conceal")
    assert said.endswith("concealed 0.000 to 0.200 s, 0.400 to 0.600 s\n")
    out = heard("out.wav")
    assert out.shape == (12000, 1)
    assert not out[:3200].any()
    assert out[3200:6400].any()
    assert not out[6400 + 1920 : 9600].any()
    assert out[9700:].any()


def test_an_undamaged_file_sounds_the_same(blocks: Path, model: Path) -> None:
    for options in ([], ["--start", "0.05", "--duration", "0.1"], ["-k", 1]):
        succeed("decode", blocks, "plain.wav", "-m", model, "--force", *options)
        succeed("decode", blocks, "concealed.wav", "-m", model, "--force", "--conceal", *options)
        assert Path("plain.wav").read_bytes() == Path("concealed.wav").read_bytes()


def test_stretches_pipes_and_raw_output(blocks: Path, model: Path) -> None:
    damage(blocks, places(blocks, PACKED, CODED)[1] + 5)
    concealed("decode", blocks, "whole.wav", "-m", model, "--conceal")
    said = concealed("decode", blocks, "part.wav", "-m", model, "--conceal", "--start", "0.06", "--duration", "0.1")
    assert said.endswith("concealed 0.040 to 0.080 s\n")
    assert_wav("part.wav", 2, 1600, RATE_HZ)
    # Behind the damage, not a word of it.
    succeed("decode", blocks, "late.wav", "-m", model, "--conceal", "--start", "0.13")
    assert np.array_equal(heard("late.wav"), heard("whole.wav")[2080:])
    done = pipe_through("decode", "-", "-", "-m", model, "--conceal", "--raw", stdin=blocks.read_bytes())
    assert (done.status, done.stderr) == (0, "codec: standard input: damaged; concealed 0.040 to 0.080 s\n")
    assert np.array_equal(np.frombuffer(done.stdout, "<i2").reshape(-1, 2), heard("whole.wav"))


def test_a_folder_of_files_and_what_json_tells(blocks: Path, model: Path) -> None:
    Path("codes").mkdir()
    for name in ("bad", "good"):
        Path(f"codes/{name}.codec").write_bytes(blocks.read_bytes())
    damage("codes/bad.codec", places("codes/bad.codec", PACKED, CODED)[2] + 5)
    result = run("decode", "codes", "audio", "-m", model, "--jobs", 1)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 2)
    assert not Path("audio/bad.wav").exists()
    result = run("decode", "codes", "audio", "-m", model, "--jobs", 1, "--conceal", "--resume", "--json")
    assert result.exit_code == 0
    report = read_json(result.stdout)
    assert (report["num_done"], report["num_skipped"], report["num_failed"]) == (1, 1, 0)
    bad, good = report["files"]
    assert (good["notice"], bad["warning"], bad["error"]) == (None, None, None)
    assert bad["notice"] == f"{Path('codes/bad.codec')}: damaged; concealed 0.080 to 0.120 s"
    assert result.stderr == f"codec: {bad['notice']}\n"
    assert_wav("audio/bad.wav", 2, 3000, RATE_HZ)


def test_many_losses_are_one_line(folder: Path, model: Path) -> None:
    write_wav("long.wav", speech_like(10000)[None])
    succeed("encode", "long.wav", "long.codec", "-m", model, "--frames-per-block", 5)
    damage("long.codec", *(at + 5 for at in places("long.codec", PACKED, CODED)[::4]))
    said = concealed("decode", "long.codec", "out.wav", "-m", model, "--conceal")
    assert said.endswith("0.320 to 0.340 s and 3 more\n")
    assert said.count(" to ") == 5


def test_what_cannot_be_concealed_is_refused(blocks: Path, speech: Path, model: Path, voiced_model: Path) -> None:
    whole = blocks.read_bytes()
    damage(blocks, 20)
    assert "the header is damaged" in refusal("decode", blocks, "out.wav", "-m", model, "--conceal")
    blocks.write_bytes(whole[: places_in(whole)[0] + 3])
    assert "neither its END nor a good block" in refusal("decode", blocks, "out.wav", "-m", model, "--conceal")
    succeed("encode", speech, "voiced.codec", "-m", voiced_model, "--frames-per-block", 10)
    damage("voiced.codec", places("voiced.codec", GLOBAL)[0] + 3)
    assert "global codes" in refusal("decode", "voiced.codec", "out.wav", "-m", voiced_model, "--conceal")
    assert not partial_files(Path.cwd())


def places_in(data: bytes) -> list[int]:
    Path("copy.codec").write_bytes(data)
    found = places("copy.codec", PACKED, CODED)
    Path("copy.codec").unlink()
    return found


def test_a_file_that_was_cut_off_ends_with_its_last_good_block(blocks: Path, model: Path) -> None:
    frames = places(blocks, PACKED, CODED)
    damage(blocks, frames[1] + 5)
    blocks.write_bytes(blocks.read_bytes()[: frames[4] + 4])
    result = run("decode", blocks, "out.wav", "-m", model, "--conceal")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"codec: {blocks}: damaged; concealed 0.040 to 0.080 s",
        f"codec: {blocks}: the file is cut off; 0.160 s of it are good, and those were taken",
    ]
    assert_wav("out.wav", 2, 4 * BLOCK, RATE_HZ)


@pytest.mark.parametrize("kind", ["dac", "bicodec", "voiced"])
def test_codecs_that_look_ahead_or_keep_the_voice_conceal_as_well(kind: str, folder: Path, voiced_model: Path) -> None:
    if kind == "voiced":
        model = voiced_model
    else:
        model = folder / kind
        made = test_dac._codec() if kind == "dac" else test_bicodec._codec()
        save(made, model, name=f"{kind}@1", dtype="float32")
    codec = load(model)
    rng = np.random.default_rng(0)
    num_frames = 40000 // codec.hop_length
    sizes = np.array(codec.codebook_sizes)[None, :, None]
    voice = rng.integers(0, 4, (1, codec.num_global_codes)) if codec.num_global_codes else None
    codes = rng.integers(0, sizes, (1, len(codec.codebook_sizes), num_frames))
    token_format.write("whole.codec", codes, model=model, global_codes=voice)
    Path("broken.codec").write_bytes(Path("whole.codec").read_bytes())
    damage("broken.codec", places("broken.codec", PACKED, CODED)[1] + 9)
    said = concealed("decode", "broken.codec", "broken.wav", "-m", model, "--conceal")
    first, last = 125 * codec.hop_length, 250 * codec.hop_length
    assert f"concealed {first / codec.sample_rate_hz:.3f} to {last / codec.sample_rate_hz:.3f} s" in said
    succeed("decode", "whole.codec", "whole.wav", "-m", model)
    broken, whole = heard("broken.wav"), heard("whole.wav")
    assert broken.shape == whole.shape
    assert broken[first:last].any()
    if last - first > 0.13 * codec.sample_rate_hz:
        assert not broken[first + round(0.13 * codec.sample_rate_hz) : last].any()


def test_libraries_see_lost_frames_as_codes_of_minus_one(blocks: Path, model: Path) -> None:
    damage(blocks, places(blocks, PACKED, CODED)[1] + 5)
    codec = load(model)
    with token_format.open(blocks, model=model, allow_damaged=True) as reader:
        codes = reader.read()
        audio = np.concatenate(list(decode_events(codec, reader.header, reader.events())), axis=1)
        assert isinstance(reader, SalvagingReader)
        assert reader.lost == [(BLOCK, BLOCK)]
    assert codes.shape == (2, 3, 47)
    assert bool((codes[:, :, 10:20] == -1).all())
    assert (codes[:, :, :10] >= 0).all()
    assert (codes[:, :, 20:] >= 0).all()
    for channel, heard_there in zip(torch.from_numpy(codes), audio, strict=True):
        decoder = StreamingDecoder(codec)
        parts = [decoder.push(channel[:, :10]), decoder.conceal(10), decoder.push(channel[:, 20:]), decoder.flush()]
        assert np.array_equal(heard_there, torch.cat(parts, dim=1)[0, :3000].numpy())


def test_flips_anywhere_give_audio_of_full_length_or_an_error(blocks: Path, model: Path) -> None:
    rng, whole = random.Random(0), blocks.read_bytes()
    endings = set()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        blocks.write_bytes(data)
        result = run("decode", blocks, "out.wav", "-m", model, "--conceal", "--force")
        said = result.stderr
        if result.exit_code == 0:
            assert_wav("out.wav", 2, 3000, RATE_HZ)
            assert not said or "damaged; concealed" in the_line(said)
            endings.add("concealed" if said else "nothing lost")
        else:
            assert result.exit_code == 1
            assert all(line.startswith("codec: ") for line in said.splitlines())
            endings.add("cut off" if "cut off" in said else "refused")
    assert endings == {"concealed", "nothing lost", "cut off", "refused"}
