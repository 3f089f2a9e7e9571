"""A recording through an exported codec and back, frame by frame: python onnx_stream.py FOLDER in.wav out.wav"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile


class Stream:
    """A graph that tools.export_onnx wrote, and the state of its stream, of which some may be given."""

    def __init__(self, folder: str | Path, part: dict[str, Any], given: Any = (), options: Any = None) -> None:
        self.input, self.session = part["input"], onnxruntime.InferenceSession(Path(folder, part["graph"]), options)
        self.state = dict(np.load(Path(folder, part["initial_state"]))) | dict(given) if "state" in part else {}

    def __call__(self, x: Any) -> dict[str, Any]:
        values = self.session.run(None, {self.input["name"]: x, **self.state})
        told = {o.name.removesuffix(".next"): v for o, v in zip(self.session.get_outputs(), values, strict=True)}
        self.state = {name: told[name] for name in self.state}
        return told


if __name__ == "__main__":
    (folder, source, target), voice, heard = sys.argv[1:], {}, []
    about = json.loads(Path(folder, "streams.json").read_text(encoding="utf-8"))
    audio, rate_hz = soundfile.read(source, dtype="float32", always_2d=True)  # rate and channels must be the codec's
    hop, late, frames = about["hop_length"], about["decode_delay_samples"], about["frames_per_step"] or 1
    if "speaker" in about:
        reference = audio[: about["speaker"]["voice_samples"]].T[None]
        voice = Stream(folder, about["voice"])(Stream(folder, about["speaker"])(reference)["global_codes"])
    encoder, decoder = Stream(folder, about["encoder"]), Stream(folder, about["decoder"], voice)
    for piece in (audio[first : first + hop * frames].T[None] for first in range(0, len(audio) + late, hop * frames)):
        codes = encoder(np.pad(piece, ((0, 0), (0, 0), (0, hop * frames - piece.shape[2]))))["codes"]
        codes[:, :, -(-piece.shape[2] // hop) :] = -1  # after the end: what is late still comes out
        heard.append(decoder(codes)["audio"][0].T)
    soundfile.write(target, np.concatenate(heard)[late : late + len(audio)], rate_hz)
