"""Whose voice it is, by the voice encoder that the package `resemblyzer` carries; nothing else of it is used.

So `pip install --no-deps resemblyzer` is enough. The encoder was trained to tell speakers apart (GE2E), and shares
nothing with any codec: an independent judge.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from codec.audio import resample
from codec.evaluation.coders import UsageError
from codec.models.bicodec_speaker import MelMagnitudes

# Source: hparams.py and voice_encoder.py of https://github.com/resemble-ai/Resemblyzer, version 0.1.4.
_RATE_HZ, _WINDOW_SAMPLES, _HOP_SAMPLES, _NUM_MELS = 16000, 400, 160, 40
_HIDDEN_DIM, _NUM_LAYERS, _EMBEDDING_DIM = 256, 3, 256
_PART_FRAMES = 160  # that it hears at once
_STEP_FRAMES = 77  # between their beginnings: 1.3 of them a second
_LEAST_SHARE = 0.75  # of the last part that has to be there
_LOUDNESS = 10 ** (-30 / 20)  # root of the mean square that softer recordings are raised to


class ResemblyzerEmbedder:
    """Embeddings of voices, 256 dims: of parts of 1.6 s, averaged, as Resemblyzer makes them, but with all pauses.

    Source: Wan et al., "Generalized end-to-end loss for speaker verification" (2018), section 3.
    """

    name = "resemblyzer"

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        """`weights`: a checkpoint of that encoder; by default the installed package's.

        UsageError where that is not installed, ValueError where the checkpoint is another one. Nothing is unpickled but
        tensors.
        """
        self.version = f"weights {os.fspath(weights)}" if weights is not None else ""
        if weights is None:
            try:
                package = importlib.metadata.distribution("resemblyzer")
            except importlib.metadata.PackageNotFoundError as error:
                raise UsageError("resemblyzer is not installed: pip install --no-deps resemblyzer") from error
            weights = Path(str(package.locate_file("resemblyzer/pretrained.pt")))
            self.version = f"resemblyzer {package.version}, its GE2E encoder, pauses kept"
        self._filters = MelMagnitudes(
            sample_rate_hz=_RATE_HZ,
            fft_samples=_WINDOW_SAMPLES,
            window_samples=_WINDOW_SAMPLES,
            hop_samples=_HOP_SAMPLES,
            num_mels=_NUM_MELS,
            min_hz=0.0,
            max_hz=_RATE_HZ / 2,
        ).filters
        self._lstm = nn.LSTM(_NUM_MELS, _HIDDEN_DIM, _NUM_LAYERS, batch_first=True)
        self._linear = nn.Linear(_HIDDEN_DIM, _EMBEDDING_DIM)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
            for name, module in (("lstm.", self._lstm), ("linear.", self._linear)):
                module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        except OSError:
            raise
        except Exception as error:  # PyTorch's own, of several types
            raise ValueError(f"{weights} is no checkpoint of Resemblyzer's voice encoder") from error

    @torch.inference_mode()
    def embed(self, audio: np.ndarray, rate_hz: int) -> np.ndarray:
        """A signal float32 [T], at least one sample -> float32 [256] of length 1."""
        samples = torch.from_numpy(np.array(resample(audio[None], rate_hz, _RATE_HZ)[0], np.float32))
        starts = part_starts(len(samples))
        parts = _mels(self._raised(samples), starts[-1] + _PART_FRAMES, self._filters)
        _, (hidden, _) = self._lstm(torch.stack([parts[start : start + _PART_FRAMES] for start in starts]))
        embeddings = nn.functional.normalize(torch.relu(self._linear(hidden[-1])), dim=1)
        mean: np.ndarray = nn.functional.normalize(embeddings.mean(0), dim=0).numpy()
        return mean

    @staticmethod
    def _raised(samples: torch.Tensor) -> torch.Tensor:
        loudness = float(samples.square().mean().sqrt())
        return samples * (_LOUDNESS / loudness) if 0 < loudness < _LOUDNESS else samples


def part_starts(num_samples: int) -> list[int]:
    """The frames that the parts of so many samples begin at. The last part may reach beyond the end."""
    num_frames = -(-(num_samples + 1) // _HOP_SAMPLES)
    starts = list(range(0, max(1, num_frames - _PART_FRAMES + _STEP_FRAMES + 1), _STEP_FRAMES))
    share = (num_samples - starts[-1] * _HOP_SAMPLES) / (_PART_FRAMES * _HOP_SAMPLES)
    return starts[:-1] if len(starts) > 1 and share < _LEAST_SHARE else starts


def _mels(samples: torch.Tensor, num_frames: int, filters: torch.Tensor) -> torch.Tensor:
    """Mel powers [F, 40] of centred windows, at least so many; zeros stand around the samples."""
    missing = max(0, num_frames * _HOP_SAMPLES - len(samples))
    spectrum = torch.stft(
        nn.functional.pad(samples, (0, missing)),
        _WINDOW_SAMPLES,
        _HOP_SAMPLES,
        window=torch.hann_window(_WINDOW_SAMPLES),
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum.abs().square().T @ filters
