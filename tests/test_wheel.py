"""A built wheel, installed outside the checkout, has everything a user needs in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"codec", next(n for n in names if "dist-info" in n).split("/")[0]}
    for name in ("config.json", "model.safetensors", "tokens.safetensors"):
        assert f"codec/bundled/speech_16k/{name}" in names
    for name in ("page.html", "page.css", "page.js", "worklets.js"):
        assert f"codec/serving/page/{name}" in names

    site = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    out = _run(sys.executable, "-c", "import codec; print(codec.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(out.strip()).is_relative_to(site)
    command = [sys.executable, "-m", "codec"]
    speech = ROOT / "tests" / "data" / "speech.flac"
    _run(*command, "encode", speech, "speech.codec", cwd=tmp_path, PYTHONPATH=str(site))
    _run(*command, "decode", "speech.codec", "speech.wav", cwd=tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "speech.wav").stat().st_size > 100_000
