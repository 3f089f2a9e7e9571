"""Pictures for the report, made here so that it needs nothing else: rate-quality plots in SVG, spectrograms in PNG."""

from __future__ import annotations

import base64
import html
import math
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codec.audio import AudioWriter
from codec.evaluation.metrics import Metric, power_spectrum
from codec.evaluation.results import Summary, SystemResult
from codec.evaluation.tables import ARROWS, number

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_DYNAMIC_RANGE_DB = 80
_SPECTROGRAM_ROWS, _SPECTROGRAM_COLUMNS = 128, 480
# From dark to light, evenly rising in lightness, so that it also reads in grey.
_COLOURS = (
    *((8, 6, 24), (44, 16, 92), (106, 24, 110), (170, 40, 96)),
    *((224, 74, 68), (248, 140, 52), (252, 208, 110), (254, 252, 220)),
)
# Outlines of markers around (0, 0): codecs differ by shape as well as by colour.
MARKERS = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5.5L5,4H-5Z",
    "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "M0,5.5L5,-4H-5Z",
    "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)
NUM_COLOURS = 8  # that the style sheet has: .c0 to .c7


def marker(position: int) -> str:
    """A legend's swatch for the codec at this position."""
    return (
        f'<svg class="swatch c{position % NUM_COLOURS}" viewBox="-14 -8 28 16" width="28" height="16" '
        f'aria-hidden="true"><path class="line" d="M-13,0H13"/>'
        f'<path class="mark" d="{MARKERS[position % len(MARKERS)]}"/></svg>'
    )


def rate_plot(metric: Metric, systems: Sequence[SystemResult], coders: Sequence[str], original: Summary | None) -> str:
    """Inline SVG: the metric against the bit rate, a line per codec, bars for the intervals of the means.

    `original`: the value that the original recordings have, drawn as a line across.
    """
    points = [(s.rate_bps, s.summaries[metric.name], s) for s in systems if s.rate_bps]
    points = [point for point in points if point[1].num_files]
    if not points:
        return ""
    low_rate, high_rate = min(rate for rate, _, _ in points) / 1.25, max(rate for rate, _, _ in points) * 1.25
    bounds = [bound for _, summary, _ in points for bound in (summary.low, summary.high)]
    bounds += [original.mean] if original else []
    ticks = _ticks(min(bounds), max(bounds))

    def x_of(rate_bps: float) -> float:
        share = math.log(rate_bps / low_rate) / math.log(high_rate / low_rate)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{_LEFT},{y_of(tick):.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for rate in _rate_ticks(low_rate, high_rate):
        parts.append(f'<path class="grid" d="M{x_of(rate):.1f},{_TOP}V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x_of(rate):.1f}" y="{bottom + 16}" text-anchor="middle">{rate / 1000:g}</text>'
        )
    parts.append(f'<text class="tick" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">kbps</text>')
    if original:
        y = y_of(original.mean)
        parts.append(f'<path class="original" d="M{_LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{right - 2}" y="{y - 5:.1f}" text-anchor="end">original</text>')
    for position, coder in enumerate(coders):
        own = sorted(((rate, summary, s) for rate, summary, s in points if s.coder == coder), key=lambda p: p[0])
        places = [(x_of(rate), y_of(summary.mean), summary, system) for rate, summary, system in own]
        parts.append(f'<g class="c{position % NUM_COLOURS}">')
        if len(places) > 1:
            parts.append('<path class="line" d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places) + '"/>')
        for x, y, summary, system in places:
            told = (
                f"{system.name}: {number(summary.mean)} ({number(summary.low)} to {number(summary.high)}) "
                f"at {(system.rate_bps or 0) / 1000:.2f} kbps, {summary.num_files} files"
            )
            parts.append(
                f'<g><title>{html.escape(told)}</title><path class="bar" d="M{x:.1f},{y_of(summary.low):.1f}'
                f'V{y_of(summary.high):.1f}"/><path class="mark" transform="translate({x:.1f},{y:.1f})" '
                f'd="{MARKERS[position % len(MARKERS)]}"/></g>'
            )
        parts.append("</g>")
    name = html.escape(f"{metric.title} against bit rate; the numbers are in the table of results")
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def plot_title(metric: Metric) -> str:
    """Label, unit, and which way is better."""
    better = f", {metric.better} is better {ARROWS[metric.better]}" if metric.better else ""
    return metric.title + better


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, that enclose both."""
    span = max(high - low, 1e-6 * max(abs(high), abs(low), 1))
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _rate_ticks(low_bps: float, high_bps: float) -> list[int]:
    """Bit rates to name on a logarithmic axis."""
    all_ticks = [digit * 10**power for power in range(1, 7) for digit in (1, 2, 3, 4, 6, 8)]
    ticks = [tick for tick in all_ticks if low_bps <= tick <= high_bps]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if str(tick)[0] in "124"]
    return ticks


def spectrogram(audio: np.ndarray, rate_hz: int, loudest: float) -> bytes:
    """A PNG, 0 Hz to half the rate upwards, of 80 dB below `loudest`, a power of `peak_power`."""
    size = max(64, rate_hz * 32 // 1000)
    padded = np.pad(audio.astype(np.float64), (0, max(0, size - len(audio))))
    starts = np.linspace(0, len(padded) - size, _SPECTROGRAM_COLUMNS).astype(int)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.linspace(0, power.shape[1], _SPECTROGRAM_ROWS + 1).astype(int)[:-1]
    rows = np.maximum.reduceat(power, edges, axis=1).T[::-1]
    level = 1 + 10 * np.log10(np.maximum(rows, 1e-12) / max(loudest, 1e-12)) / _DYNAMIC_RANGE_DB
    return _png(np.clip(np.round(level * 63), 0, 63).astype(np.uint8))


def peak_power(audio: np.ndarray, rate_hz: int) -> float:
    """The loudest power in a signal's spectrogram: what the scale of several is common to."""
    size = max(64, rate_hz * 32 // 1000)
    padded = np.pad(audio.astype(np.float64), (0, max(0, size - len(audio))))
    return float(power_spectrum(padded, size, size // 2).max())


def _png(levels: np.ndarray) -> bytes:
    """A picture [height, width] of levels 0..63. Source: PNG specification, W3C (2003): palette, 8 bits, no filter."""
    at = np.linspace(0, len(_COLOURS) - 1, 64)
    channels = [np.interp(at, range(len(_COLOURS)), [colour[i] for colour in _COLOURS]) for i in range(3)]
    palette = np.round(np.stack(channels, axis=1)).astype(np.uint8).tobytes()
    lines = np.pad(levels, ((0, 0), (1, 0))).tobytes()  # each begins with its filter, 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(lines, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def flac(audio: np.ndarray, rate_hz: int) -> bytes:
    """A 16-bit FLAC file: lossless, and every browser plays it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.flac"
        with AudioWriter(path, rate_hz, 1, num_samples=len(audio)) as writer:
            writer.write(audio[None])
            writer.finish()
        return path.read_bytes()


def data_url(kind: str, data: bytes) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
