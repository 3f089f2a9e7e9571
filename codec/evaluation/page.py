"""The report: one HTML file with everything in it, that asks nothing of any network.

It is read in light and dark, on paper, on a telephone, by keyboard and by ear: tables have captions and scopes,
pictures have texts, players have names, and wide tables scroll by themselves.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from codec.evaluation.figures import data_url, flac, marker, peak_power, plot_title, rate_plot, spectrogram
from codec.evaluation.results import NUM_RESAMPLES, Evaluation, Example
from codec.evaluation.style import SCRIPT, STYLE
from codec.evaluation.tables import (
    Table,
    codebook_table,
    cost_table,
    described,
    difference_table,
    kbps,
    median_table,
    number,
    quality_table,
    remarks,
    semantics_metrics,
    semantics_table,
)

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(evaluation: Evaluation) -> str:
    """The whole page."""
    coders = list(dict.fromkeys(system.coder for system in evaluation.systems if system.setting is not None))
    sections = [
        ("quality", "Quality against bit rate", _plots(evaluation, coders)),
        ("results", "Results", _table(quality_table(evaluation)) + _details(median_table(evaluation))),
        ("costs", "Bits, speed, memory", _table(cost_table(evaluation))),
        ("differences", "File by file", _table(difference_table(evaluation))),
        ("semantics", "What codes tell of labels", _table(semantics_table(evaluation))),
        ("codebooks", "Use of codebooks", _table(codebook_table(evaluation))),
        ("listen", "Listen", "".join(_example(example, evaluation) for example in evaluation.examples)),
        ("remarks", "Left out", _list(remarks(evaluation))),
        ("method", "How it was measured", _method(evaluation)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    facts = evaluation.facts
    data = f"{facts['data']}, split {facts['split']}" if facts["split"] else facts["data"]
    told = (
        f"{evaluation.num_files} recordings ({_e(str(data))}), {evaluation.seconds / 60:.1f} minutes. "
        f"{_e(facts['machine'])}, {_e(facts['created'][:10])}"
        + (f", commit {_e(facts['commit'])}" if facts["commit"] else "")
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Codecs compared: {_e(', '.join(coders))}</title><style>{STYLE}</style></head><body>"
        f'<a class="skip" href="#main">Skip to the results</a>'
        f"<header><h1>Codecs compared</h1><p>{told}.</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{body}</main><script>{SCRIPT}</script></body></html>\n'
    )


def _e(text: str) -> str:
    return html.escape(text)


def _plots(evaluation: Evaluation, coders: Sequence[str]) -> str:
    original = next((system for system in evaluation.systems if system.setting is None), None)
    figures = []
    for name in evaluation.metrics:
        metric = described(name)
        across = original.summaries[name] if original and original.summaries[name].num_files else None
        plot = rate_plot(metric, evaluation.systems, coders, across)
        if plot:
            figures.append(f"<figure><figcaption>{_e(plot_title(metric))}</figcaption>{plot}</figure>")
    if not figures:
        return ""
    legend = "".join(f"<li>{marker(i)} {_e(coder)}</li>" for i, coder in enumerate(coders))
    return (
        "<p>Means over files; bars are their 95 % bootstrap intervals. Bits are those of the codes as coded, "
        "without file format.</p>"
        f'<ul class="legend" aria-label="Codecs">{legend}</ul><div class="plots">{"".join(figures)}</div>'
    )


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{_e(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_e(row[0])}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_e(table.caption)}"><table>'
        f"<caption>{_e(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    value, plus_minus, reach = text.partition(" ±")
    return f'{_e(value)} <span class="reach">±{_e(reach)}</span>' if plus_minus else _e(text)


def _details(table: Table) -> str:
    return f"<details><summary>{_e(table.caption)}</summary>{_table(table)}</details>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _example(example: Example, evaluation: Evaluation) -> str:
    """A recording: the original and every codec, each with a player and a spectrogram on one scale."""
    loudest = peak_power(example.original, example.rate_hz)
    rates = {system.name: f"{kbps(system.rate_bps)} kbps" for system in evaluation.systems if system.rate_bps}
    rows = []
    for name, audio in {"original": example.original, **example.heard}.items():
        seconds = len(audio) / example.rate_hz
        whole = np.pad(audio, (0, max(0, len(example.original) - len(audio))))  # one axis of time for all
        picture = data_url("image/png", spectrogram(whole, example.rate_hz, loudest))
        sound = data_url("audio/flac", flac(audio, example.rate_hz))
        told = f"Spectrogram of {name}, 0 to {example.rate_hz / 2000:g} kHz, {seconds:.1f} s"
        rows.append(
            f'<li><div class="who"><strong>{_e(name)}</strong> <span>{_e(rates.get(name, ""))}</span></div>'
            f'<audio controls preload="metadata" aria-label="{_e(f"{name}: {example.file}")}" src="{sound}"></audio>'
            f'<img alt="{_e(told)}" src="{picture}" width="480" height="128"></li>'
        )
    chosen = ""
    if example.metric is not None:
        chosen = f"{described(example.metric).label} {number(example.value)} by {example.chosen_for}. "
    return (
        f'<article><h3>{_e(example.file)}</h3><p class="spoken">{_e(example.text)}</p>'
        f'<p class="note">{_e(chosen)}Spectrograms: 0 to {example.rate_hz / 2000:g} kHz upwards, 80 dB, '
        f'the same scale for all.</p><ul class="sounds">{"".join(rows)}</ul></article>'
    )


def _method(evaluation: Evaluation) -> str:
    """All that a number's meaning depends on."""
    facts = evaluation.facts
    ranking = next((example.metric for example in evaluation.examples if example.metric), None)
    said = {
        "Signals": "Recordings are mixed down to mono and compared at their own rate; a codec of another rate is fed "
        "and heard through a resampler (soxr HQ). A codec's constant delay is found once over up to six recordings, "
        "within 50 ms, by the correlation of log spectra and then of waveforms, and is taken out; signals are compared "
        "over the stretch that both have. 'Other length' counts files that came back with another number of samples.",
        "Bit rates": "Bits of all files over seconds of all files. 'Codes' are packed without any coding; 'coded' is "
        "what entropy coding makes of them, or the packets of Opus and Speex, without file format; 'file' is the "
        "whole file, .codec or Ogg. Codec2 fills every frame up to whole bytes. Opus runs at variable bit rate.",
        "Speed and memory": "One codec at a time, in a process of its own, on one CPU thread, over the first 10 s of "
        "up to six recordings, once, after a warm-up. Models: only encode and decode; memory is the most the process "
        "had, PyTorch included. Programs: from their start to their end; their memory is not measured.",
        "Statistics": f"Means and medians over the files for which a value is defined. Intervals: 95 %, percentile "
        f"bootstrap over files, {NUM_RESAMPLES} resamples of a fixed seed. Differences are taken file by file, each "
        "codec against the first one at the setting of the nearest bit rate.",
    }
    if ranking:
        said["Examples"] = (
            f"Chosen by {described(ranking).label} of {evaluation.examples[0].chosen_for}, evenly from the worst to "
            "the best; their first 8 s, 16-bit FLAC."
        )
    said |= {described(name).label: described(name).about for name in evaluation.metrics}
    if labels := facts["labels"]:
        said["Labels"] = (
            f"{labels['source']}: {labels['num_segments']} segments with {labels['num_labels']} labels in "
            f"{labels['num_files']} recordings; the most frequent label has {labels['most_frequent']:.1%} of the "
            "labelled time. A frame has the label at its centre; silence has none. Intervals of single rows: 95 %, "
            "jackknife over recordings. Probes, and unseen purity by recordings, are tested on "
            f"{'speakers' if labels['is_by_speaker'] else 'recordings'} that they have not learned from, and have "
            "bootstrap intervals; ABX has none."
        )
    said |= {metric.label: metric.about for metric in semantics_metrics(evaluation)}
    said |= {f"Scorer {name}": version for name, version in facts["scorers"].items()}
    versions = {system.coder: system.version for system in evaluation.systems if system.version}
    said["Codecs"] = "; ".join(f"{name}: {version}" for name, version in versions.items())
    said["Versions"] = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    said["Machine"] = (
        f"{facts['machine']}, {facts['num_cores']} cores; files measured by {facts['num_processes']} process(es)"
    )
    return "<dl>" + "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in said.items()) + "</dl>"
