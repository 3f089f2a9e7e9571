"""Write a codec that streams as ONNX graphs: `python -m tools.export_onnx MODEL FOLDER`.

MODEL is a bundled model or a folder. FOLDER receives what a program without PyTorch needs:

- `encoder_step.onnx`: audio and a state -> codes and the next state; `decoder_step.onnx`: codes and a state -> audio
  and the next state. Codes are -1 where a row is absent. Quantizers are inside, batches of any size go through, and
  steps of any number of frames, or of `--frames`;
- `encoder_state.npz`, `decoder_state.npz`: the states before the first step, of one stream;
- of codecs with global codes `speaker.onnx`, a reference -> global codes, and `voice.onnx`, global codes -> what of the
  decoder's first state depends on them;
- `streams.json`: names, shapes and dtypes of all that, and rate, hop, delay, codebooks and id of the codec.

The first `decode_delay_samples` that a decoder gives are to be dropped; after the last frame, frames of -1 bring out
what is late. `tools/examples/onnx_stream.py` is a whole stream in 40 lines.

What was written is then compared with PyTorch in onnxruntime (`tools.onnx_export.check` has the bounds): exit status 1
where it is not the same, and nothing stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from codec.files import check_new_folder, new_folder
from codec.models.interface import StreamableCodec, streamable
from codec.models.voice import VoicedCodec
from codec.pretrained import load

if TYPE_CHECKING:
    from tools.onnx_export.graphs import Graph

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILES = (
    *("encoder_step.onnx", "decoder_step.onnx", "voice.onnx", "speaker.onnx"),
    *("encoder_state.npz", "decoder_state.npz", "streams.json"),
)
DEFAULT_OPSET, LEAST_OPSET = 20, 20  # the first one that has GELU


def write_graphs(
    codec: StreamableCodec,
    folder: Path,
    *,
    num_quantizers: int | None = None,
    num_frames: int | None = None,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Write the graphs of the first `num_quantizers` rows of codes, and what belongs to them, into a folder.

    A step takes `num_frames` frames; any number if that is None. ValueError where the codec's state has no fixed shape.
    """
    from tools.onnx_export.graphs import Shape, decoder_graph, encoder_graph, speaker_graph, voice_graph

    rows = codec.quantizer.check_num_quantizers(num_quantizers)
    shape = Shape(rows, num_frames, opset)
    encoder, decoder = encoder_graph(codec, shape), decoder_graph(codec, shape)
    samples = num_frames * codec.hop_length if num_frames else f"{codec.hop_length} * frames"
    audio = {"dtype": "float32", "shape": ["batch", codec.num_channels, samples]}
    codes = {"dtype": "int64", "shape": ["batch", rows, num_frames or "frames"]}
    told: dict[str, Any] = {
        "model": codec.name,
        "codec_id": codec.codec_id,
        "sample_rate_hz": codec.sample_rate_hz,
        "num_channels": codec.num_channels,
        "hop_length": codec.hop_length,
        "frames_per_step": num_frames,
        "num_quantizers": rows,
        "valid_num_quantizers": [number for number in codec.valid_num_quantizers if number <= rows],
        "codebook_sizes": list(codec.codebook_sizes[:rows]),
        "decode_delay_samples": codec.decode_delay_samples,
        "encoder": _part("encoder", encoder, audio, codes),
        "decoder": _part("decoder", decoder, codes, audio),
    }
    given: list[str] = []
    if isinstance(codec, VoicedCodec):
        voice, given = voice_graph(codec, decoder, opset=opset)
        speaker = speaker_graph(codec, opset=opset)
        global_codes = {"name": "global_codes", "dtype": "int64", "shape": [1, codec.num_global_codes]}
        reference = {"name": "audio", "dtype": "float32", "shape": [1, codec.num_channels, "samples"]}
        told["voice"] = {"graph": "voice.onnx", "input": global_codes, "outputs": given}
        told["speaker"] = {
            "graph": "speaker.onnx",
            "input": reference,
            "output": global_codes,
            "voice_samples": codec.voice_samples,
            "global_codebook_size": codec.global_codebook_size,
        }
        voice.save(folder / "voice.onnx")
        speaker.save(folder / "speaker.onnx")
    for side, graph in (("encoder", encoder), ("decoder", decoder)):
        graph.program.save(folder / f"{side}_step.onnx")
        first = {leaf.name: leaf.initial.numpy() for leaf in graph.leaves if leaf.name not in given}
        np.savez_compressed(folder / f"{side}_state.npz", allow_pickle=False, **first)
    (folder / "streams.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _part(side: str, graph: Graph, input_of: dict[str, Any], output_of: dict[str, Any]) -> dict[str, Any]:
    return {
        "graph": f"{side}_step.onnx",
        "initial_state": f"{side}_state.npz",
        "input": {"name": graph.input_name, **input_of},
        "output": {"name": graph.output_name, **output_of},
        "state": [
            {
                "name": leaf.name,
                "next_name": f"{leaf.name}.next",
                "dtype": str(leaf.initial.dtype).removeprefix("torch."),
                "shape": ["batch", *leaf.initial.shape[1:]],
            }
            for leaf in graph.leaves
        ],
    }


def main() -> None:
    """Parse arguments, write and compare; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, empty, or written by this tool before")
    parser.add_argument("-k", "--num-quantizers", type=int, metavar="K", help="rows of codes (default: all)")
    parser.add_argument("--frames", default="dynamic", help="of a step: a number, or dynamic (default) for any")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help=f"of ONNX (default: {DEFAULT_OPSET})")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the signals compared (default: 60)")
    args = parser.parse_args()
    try:
        _export(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _export(args: argparse.Namespace) -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'exact-codec[export]'")
    if args.frames != "dynamic" and not (args.frames.isdecimal() and int(args.frames) > 0):
        raise ValueError(f"--frames={args.frames} is neither a positive number nor dynamic")
    if args.opset < LEAST_OPSET:
        raise ValueError(f"--opset={args.opset} is below {LEAST_OPSET}")
    if not 0.0 < args.seconds < 1e5:
        raise ValueError(f"--seconds={args.seconds} must be positive")
    check_new_folder(args.folder, replaceable=FILES)
    codec = streamable(load(args.model))
    torch.set_num_threads(1)
    num_frames = None if args.frames == "dynamic" else int(args.frames)
    with new_folder(args.folder, replaceable=FILES) as folder:
        write_graphs(codec, folder, num_quantizers=args.num_quantizers, num_frames=num_frames, opset=args.opset)
        from tools.onnx_export.check import compare, speeds

        found = compare(codec, folder, seconds=args.seconds)
        print(f"{found.num_equal_codes} of {found.num_codes} codes are equal", end="")
        print("" if found.largest_margin is None else f", margins of the others up to {found.largest_margin:.2g}")
        print(f"audio of the same codes: largest difference {found.difference:.2g} of the peak, {found.snr_db:.0f} dB")
        if found.num_global_codes:
            print(f"{found.num_equal_global_codes} of {found.num_global_codes} global codes are equal")
        if failures := found.failures():
            raise ValueError("; ".join(failures))
        print(f"{'a step, one thread, median':28}{'onnxruntime':>12}{'PyTorch':>12}")
        for name, (ours, theirs) in speeds(codec, folder).items():
            print(f"{name:28}{ours:9.2f} ms{theirs:9.2f} ms")
        for file in sorted(folder.iterdir()):
            print(f"{args.folder / file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
