"""Coded bytes are what `codec.entropy` says they are: a decoder written from its docstring alone reads them."""

import numpy as np
import pytest

from codec.entropy import EntropyTables
from codec.token_format import TokenFormat


def decode(tables: EntropyTables, data: bytes, num_channels: int, num_rows: int, num_frames: int) -> np.ndarray:
    words = iter(np.frombuffer(data + bytes(-len(data) % 4), "<u4").tolist())
    lower, width = 0, 2**64 - 1
    point = next(words, 0) << 32 | next(words, 0)
    codes = np.zeros((num_channels, num_rows, num_frames), np.int64)
    for frame in range(num_frames):
        for channel in range(num_channels):
            for k in range(num_rows):
                row = tables.rows[k]
                groups = [
                    table[codes[channel, parent.row, frame - parent.lag] if frame >= parent.lag else -1]
                    for parent, table in zip(row.parents, row.groups, strict=True)
                ]
                counts = row.counts[row.classes[groups[0], groups[1]]].tolist()
                scale = (2**24 - len(counts)) / float(sum(counts))
                left = [int(sum(counts[:i]) * scale) + i for i in range(len(counts))] + [2**24]
                step = width >> 24
                quantile = ((point - lower) % 2**64) // step
                code = int(np.searchsorted(left, quantile, side="right")) - 1
                lower = (lower + step * left[code]) % 2**64
                width = step * (left[code + 1] - left[code])
                if width < 2**32:
                    lower, width = lower << 32 & (2**64 - 1), width << 32
                    point = point << 32 & (2**64 - 1) | next(words, 0)
                codes[channel, k, frame] = code
    return codes


@pytest.mark.parametrize("shape", [(1, 8, 20), (2, 3, 15), (1, 1, 1)])
def test_a_decoder_written_from_the_description_reads_coded_bytes(shape: tuple[int, int, int]) -> None:
    tables = TokenFormat.load("speech_16k").tables
    assert tables is not None
    codes = np.random.default_rng(0).integers(0, 1024, shape)
    np.testing.assert_array_equal(decode(tables, tables.encode(codes), *shape), codes)
