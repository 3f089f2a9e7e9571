"""The comparison of quantizers trains each of them, tells the truth about them, and its mistakes are one line."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import soundfile
import torch

import codec
from codec.quantizers.interface import Quantizer
from codec.testing import speech_like, tiny_codec
from tools import benchmark_quantizers
from tools.benchmark_quantizers import MEMBERS, Member, latents_of, main, measure


def _small(member: Member) -> Member:
    """The same with codebooks of 16 entries, about 16 bits a frame, and a learning rate for such latents."""
    small = {"codebook_size": 16, "codebook_dim": 4, "num_bits": 16, "num_scalars": 8, "levels": [4, 4]}
    settings = {key: small.get(key, value) for key, value in member.settings.items()}
    return dataclasses.replace(member, settings=settings, lr=0.02)


def _frames(num_frames: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(16, 8, generator=torch.Generator().manual_seed(9))
    chosen = places[torch.randint(16, (num_frames,), generator=generator)]
    return chosen + 0.1 * torch.randn(num_frames, 8, generator=generator)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_learns(name: str) -> None:
    """Little in a few steps; those that start from k-means are good already, and stay so."""
    member = _small(MEMBERS[name])
    train, held_out = _frames(2000, seed=0), _frames(500, seed=1)
    first, last = (measure(name, member, train, held_out, steps=steps, batch_frames=256, seed=0) for steps in (1, 60))
    assert last.distortion < first.distortion
    assert last.distortion < max(0.7 * first.distortion, 0.1)
    assert last.distortion < 0.75
    assert 0.0 < last.usage <= 1.05
    assert last.entropy <= last.bits
    assert last.step_ms > 0.0
    again = measure(name, member, train, held_out, steps=1, batch_frames=256, seed=0)
    assert dataclasses.replace(again, step_ms=0.0) == dataclasses.replace(first, step_ms=0.0)


@pytest.mark.parametrize("name", MEMBERS)
def test_members_have_forty_bits_where_they_can(name: str) -> None:
    bits = {"simvq": 12, "fsq": 16, "fsq_residual": 39}.get(name, 40)
    settings = {**MEMBERS[name].settings, "latent_dim": 128}
    quantizer: Quantizer = codec.config.build(codec.config.from_dict(settings))
    assert sum(math.ceil(math.log2(size)) for size in quantizer.codebook_sizes) == bits
    losses = quantizer(torch.randn(1, 128, 20)).losses
    assert set(losses) == set(MEMBERS[name].weights), "every loss has a weight"


def test_numbers_by_hand() -> None:
    """One codebook with an entry on each of four places, of which latents use three."""
    places = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [9.0, 9.0]])
    rows = places[[0, 0, 1, 1, 2, 2, 2, 2]] + torch.tensor([0.0, 0.5])
    member = Member({"type": "residual_vq", "num_stages": 1, "codebook_size": 4, "learning": "gradient"}, {}, lr=1e-9)
    torch.manual_seed(0)

    class Fixed(benchmark_quantizers._Mapped):
        def __init__(self, member: Member, latent_dim: int) -> None:
            super().__init__(member, latent_dim)
            self.quantizer.load_state_dict({"codebooks": places[None]})

    weights = {"commitment": 0.25, "codebook": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_quantizers, "_Mapped", Fixed)
        found = measure("x", dataclasses.replace(member, weights=weights), rows, rows, steps=1, batch_frames=4, seed=0)
    variance = (rows - rows.mean(0)).square().mean()
    assert found.distortion == pytest.approx(float(0.5**2 / 2 / variance), rel=1e-4)
    assert (found.bits, found.entropy, found.perplexity) == (2, 1.5, 2**1.5)
    assert found.usage == pytest.approx(3 / (4 * (1 - 0.75**8)))


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    for index in range(5):
        soundfile.write(tmp_path / f"{index}.wav", speech_like(16000, seed=index), 16000)
    return tmp_path


def test_recordings_are_held_out_as_a_whole(recordings: Path) -> None:
    model = tiny_codec()
    train, held_out = latents_of(model, str(recordings), minutes=1.0, seed=0)
    num_frames = model.num_frames_for(16000)
    assert len(train) == 4 * num_frames
    assert len(held_out) == num_frames
    audio = [torch.from_numpy(soundfile.read(recordings / f"{i}.wav", dtype="float32")[0]) for i in range(5)]
    with torch.inference_mode():
        alone = [model.analyze(samples[None, None])[0, :, :num_frames].t() for samples in audio]
    parts = [held_out, *train.split(num_frames)]
    for part in alone:
        assert sum(torch.equal(part, other) for other in parts) == 1, "each is in one place, whole"
    with pytest.raises(ValueError, match="1 recordings are too few, at least 4 are needed"):
        latents_of(model, str(recordings), minutes=0.01, seed=0)


def test_the_command_prints_a_table_or_json(recordings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec.save(tiny_codec(), recordings / "model", name="tiny@1")
    arguments = ["--data", str(recordings), "--model", str(recordings / "model"), "--steps", "5"]
    arguments += ["--batch-frames", "64", "--only", "fsq", "latent_scalars"]
    main(arguments)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["distortion", "bits", "entropy", "usage", "perplexity", "step_ms"]
    assert [row.split()[0] for row in rows] == ["fsq", "latent_scalars"]
    main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 5
    assert [len(result["perplexities"]) for result in report["quantizers"]] == [1, 4]
    for row, result in zip(rows, report["quantizers"], strict=True):
        assert float(row.split()[1]) == pytest.approx(result["distortion"], abs=6e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "error: --steps, --batch-frames, --threads and --minutes must be positive"),
        (["--only", "nothing"], "error: --only: 'nothing' is not one of rvq, "),
        ([], "error: no audio files under"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--data", str(tmp_path), *arguments])
