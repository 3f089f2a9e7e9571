"""Write the golden files: `python -m tools.make_golden` makes `tests/data/golden/*.codec` anew.

They are what files of this format version look like, byte for byte, and whoever reads them must get the same codes for
ever: people have such files. So run this only where the format's version changes on purpose, or, as long as no release
has a bundled model's tables, where those do. A test that fails on these files is right, and the change it judges wrong.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from codec.bitstream import SegmentStart, Writer
from codec.files import AtomicFile
from codec.header import Header
from codec.token_format import TokenFormat, cut, join
from tools.fuzz import draw_codes

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "data" / "golden"


def golden_files() -> dict[str, bytes]:
    """Every golden file by its name; the same bytes on every machine."""
    rng = np.random.Generator(np.random.PCG64(2024))
    model = TokenFormat.load("speech_16k")
    tables = model.tables
    assert tables is not None  # bundled models have them

    def written(
        header: Header, codes: np.ndarray, num_samples: int, *, per_block: int = 125, num_global: int = 0
    ) -> bytes:
        used = None if header.entropy_id is None else tables
        start = SegmentStart()
        if num_global:
            start = SegmentStart(0, rng.integers(0, 4096, (header.num_channels, num_global)), 4096)
        target = io.BytesIO()
        with Writer(target, header, tables=used, start=start, frames_per_block=per_block) as writer:
            writer.write(codes)
            writer.finish(num_samples)
        return target.getvalue()

    def cut_out(data: bytes, first_sample: int, num_samples: int) -> io.BytesIO:
        target = io.BytesIO()
        cut(io.BytesIO(data), target, first_sample, num_samples)
        return io.BytesIO(target.getvalue())

    uneven = Header("0123456789abcdef", "golden@1", 24000, 22050, 1, 300, (4, 1000, 1025), 3, 2)
    hop = model.hop_length
    mono = model.header(num_quantizers=4)
    stereo = model.header(rate_hz=44100, num_channels=2)
    voice = model.header(num_quantizers=1)
    whole = written(mono, draw_codes(tables, rng, 1, 200)[:, :4], 200 * hop - 100)
    joined = io.BytesIO()
    join([cut_out(whole, 40_000, 9_000), cut_out(whole, 0, 5_000)], joined)
    return {
        "mono_packed": written(uneven, rng.integers(0, [[4], [1000], [1025]], (1, 3, 150)), 41_343),
        "stereo_coded": written(stereo, draw_codes(tables, rng, 2, 100), stereo.num_samples_in(100) - 1),
        "cut": cut_out(whole, 20_001, 30_000).getvalue(),
        "joined": joined.getvalue(),
        "global_codes": written(voice, draw_codes(tables, rng, 1, 90)[:, :1], 90 * hop, num_global=8),
        "index": written(replace(uneven, codebook_sizes=(8, 8)), rng.integers(0, 8, (1, 2, 120)), 33_000, per_block=3),
        "empty": written(mono, np.zeros((1, 4, 0), np.int64), 0),
    }


def main() -> None:
    """Write them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in golden_files().items():
        with AtomicFile(FOLDER / f"{name}.codec") as new:
            new.file.write(data)
            new.commit()
        print(f"{len(data):6}  {name}")


if __name__ == "__main__":
    main()
