"""Scorers: networks that judge decoded speech, such as recognisers and speaker verifiers. Anybody can add one.

Two are here, `wer` and `speaker`, for models of `transformers` in local folders (extra `ssl`). Weights are read from
safetensors only, so nothing is unpickled, and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from codec.audio import resample
from codec.evaluation.coders import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Scorer(Protocol):
    """Judges a recording. Made once per process, from a string or nothing.

    `name` and `version` go into every report: a score means nothing without them.
    """

    name: str
    version: str

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        """Named values for two signals float32 [T] of one length and rate; `text` is what is said, "" if unknown.

        NaN where a value is not defined. `NAME_weight` beside `NAME` is its weight in means over files.
        """
        ...


class WordErrorScorer:
    """Word error rate of what a CTC recogniser hears in the decoded speech, against the recording's text.

    The means over files are weighted by words, so they are the errors of all files over the words of all files. Case
    and punctuation are ignored, apostrophes count. NaN where there is no text. Greedy search, no language model.
    """

    name = "wer"

    def __init__(self, folder: str) -> None:
        transformers, self.version = _load_transformers(folder)
        with _one_line(folder):
            self._processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
            self._model = _ready(transformers.AutoModelForCTC, folder)
        self._rate_hz = int(self._processor.feature_extractor.sampling_rate)

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        """`wer`, which exceeds 1 where more words are heard than were said, and `wer_weight`, the words of the text."""
        said = words(text)
        if not said:
            return {"wer": float("nan"), "wer_weight": 0.0}
        return {
            "wer": edits(said, words(self.transcribe(decoded, rate_hz))) / len(said),
            "wer_weight": float(len(said)),
        }

    def transcribe(self, audio: np.ndarray, rate_hz: int) -> str:
        """What it hears."""
        logits = _infer(self._model, self._processor, audio, rate_hz, self._rate_hz).logits
        text: str = self._processor.batch_decode(logits.argmax(-1))[0]
        return text


class SpeakerScorer:
    """Cosine similarity between the x-vectors of the original and of the decoded speech; 1 is the same voice."""

    name = "speaker"

    def __init__(self, folder: str) -> None:
        transformers, self.version = _load_transformers(folder)
        with _one_line(folder):
            self._features = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            self._model = _ready(transformers.AutoModelForAudioXVector, folder)
        self._rate_hz = int(self._features.sampling_rate)
        # The original is the same for all codecs.
        self._original = functools.lru_cache(maxsize=2)(self._embedding_of_bytes)

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        """`speaker_similarity`, -1 to 1."""
        first = self._original(reference.astype(np.float32).tobytes(), rate_hz)
        second = self._embedding(decoded, rate_hz)
        return {"speaker_similarity": float(first @ second / max(float(first.norm() * second.norm()), 1e-12))}

    def _embedding_of_bytes(self, samples: bytes, rate_hz: int) -> Tensor:
        return self._embedding(np.frombuffer(samples, np.float32), rate_hz)

    def _embedding(self, audio: np.ndarray, rate_hz: int) -> Tensor:
        embedding: Tensor = _infer(self._model, self._features, audio, rate_hz, self._rate_hz).embeddings[0]
        return embedding


_BUILT_IN = {"wer": WordErrorScorer, "speaker": SpeakerScorer}


@functools.cache
def load_scorer(spec: str) -> Scorer:
    """`wer=FOLDER`, `speaker=FOLDER`, or a class of one's own, `module:Class` or `module:Class=ARGUMENT`.

    UsageError where there is no such thing, ValueError where it cannot be made.
    """
    where, has_argument, argument = spec.partition("=")
    module, _, name = where.partition(":")
    make: Any
    if where in _BUILT_IN:
        if not argument:
            raise UsageError(f"scorer {where!r} needs the folder of a model: {where}=FOLDER")
        make = _BUILT_IN[where]
    else:
        if not name:
            known = ", ".join(f"{built_in}=FOLDER" for built_in in _BUILT_IN)
            raise UsageError(f"scorer {spec!r} is neither one of {known} nor module:Class")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"scorer {spec!r} cannot be imported: {error}") from error
    scorer = make(argument) if has_argument else make()
    if not isinstance(scorer, Scorer):
        raise UsageError(f"scorer {spec!r} lacks one of name, version and score")
    return scorer


def words(text: str) -> list[str]:
    """In lower case, without punctuation but apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest substitutions, deletions and insertions that make one of the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def _load_transformers(folder: str) -> tuple[Any, str]:
    """The package, and the version of a scorer: that of the package, the folder's name and its weights' SHA-256."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("this scorer needs the extra 'ssl'")
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    import transformers

    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    name = os.path.basename(os.path.realpath(folder))
    return transformers, f"{name}, weights {digest.hexdigest()[:12]}, transformers {transformers.__version__}"


@contextlib.contextmanager
def _one_line(folder: str) -> Iterator[None]:
    """Whatever `transformers` has against a folder is a ValueError with the folder's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error


def _ready(kind: Any, folder: str) -> Any:
    """The model, as this library computes: float32, on the CPU, without gradients."""
    import torch

    model, loaded = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise ValueError(f"weights are missing: {sorted(loaded['missing_keys'])[:3]}")
    return model.eval().requires_grad_(False)


def _infer(model: Any, features: Any, audio: np.ndarray, rate_hz: int, model_hz: int) -> Any:
    """The model's output for one recording."""
    import torch

    at_rate = resample(audio[None], rate_hz, model_hz)[0]
    inputs = features(at_rate, sampling_rate=model_hz, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs)
