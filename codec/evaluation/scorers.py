"""Scorers: networks that judge decoded speech, such as recognisers and speaker verifiers. Anybody can add one.

Two are here. `wer` counts what a recogniser gets wrong: pocketsphinx (extra `semantics`), or any CTC model of
`transformers` in a local folder (extra `ssl`). `speaker` compares voices: by the encoder of Resemblyzer
(`codec.evaluation.speakers`), or by any x-vector model in such a folder. Nothing but tensors is unpickled, and nothing
is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from codec.audio import resample
from codec.evaluation.coders import UsageError
from codec.evaluation.unit_distance import edit_distance


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


@runtime_checkable
class Recogniser(Protocol):
    """Writes down what is said. Made once per process, from a string or nothing."""

    name: str
    version: str

    def transcribe(self, audio: np.ndarray, rate_hz: int) -> str:
        """What it hears in a signal float32 [T]; "" where that is nothing."""
        ...


@runtime_checkable
class SpeakerEmbedder(Protocol):
    """Tells voices apart. Made once per process, from a string or nothing."""

    name: str
    version: str

    def embed(self, audio: np.ndarray, rate_hz: int) -> np.ndarray:
        """A signal float32 [T] -> float32 [D] of length 1: the more alike two voices are, the larger their product."""
        ...


class CTCRecogniser:
    """A CTC model of `transformers` from a local folder. Greedy search, no language model."""

    name = "ctc"

    def __init__(self, folder: str) -> None:
        self._processor, self._model, self.version = _load("AutoProcessor", "AutoModelForCTC", folder)
        self._rate_hz = int(self._processor.feature_extractor.sampling_rate)

    def transcribe(self, audio: np.ndarray, rate_hz: int) -> str:
        """See `Recogniser`."""
        logits = _infer(self._model, self._processor, audio, rate_hz, self._rate_hz).logits
        text: str = self._processor.batch_decode(logits.argmax(-1))[0]
        return text


class WordErrorScorer:
    """Word error rate of what a recogniser hears in the decoded speech, against the recording's text.

    The means over files are weighted by words, so they are the errors of all files over the words of all files. Case
    and punctuation are ignored, apostrophes count. NaN where there is no text.
    """

    name = "wer"

    def __init__(self, recogniser: str | Recogniser) -> None:
        """`pocketsphinx`, the folder of a CTC model, `module:Class[=ARGUMENT]`, or a recogniser."""
        self._recogniser = load_recogniser(recogniser) if isinstance(recogniser, str) else recogniser
        self.version = self._recogniser.version

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
        """What the recogniser hears."""
        return self._recogniser.transcribe(audio, rate_hz)


class XVectorEmbedder:
    """An x-vector model of `transformers` from a local folder."""

    name = "x-vector"

    def __init__(self, folder: str) -> None:
        self._features, self._model, self.version = _load("AutoFeatureExtractor", "AutoModelForAudioXVector", folder)
        self._rate_hz = int(self._features.sampling_rate)

    def embed(self, audio: np.ndarray, rate_hz: int) -> np.ndarray:
        """See `SpeakerEmbedder`."""
        embedding = _infer(self._model, self._features, audio, rate_hz, self._rate_hz).embeddings[0]
        unit: np.ndarray = (embedding / embedding.norm().clamp_min(1e-12)).numpy()
        return unit


class SpeakerScorer:
    """Cosine similarity between the voices of the original and of the decoded speech; 1 is the same voice."""

    name = "speaker"

    def __init__(self, embedder: str | SpeakerEmbedder) -> None:
        """`resemblyzer`, the folder of an x-vector model, `module:Class[=ARGUMENT]`, or an embedder."""
        self._embedder = load_embedder(embedder) if isinstance(embedder, str) else embedder
        self.version = self._embedder.version
        # The original is the same for all codecs.
        self._original = functools.lru_cache(maxsize=2)(self._embedding_of_bytes)

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        """`speaker_similarity`, -1 to 1."""
        original = self._original(reference.astype(np.float32).tobytes(), rate_hz)
        return {"speaker_similarity": float(original @ self.embed(decoded, rate_hz))}

    def embed(self, audio: np.ndarray, rate_hz: int) -> np.ndarray:
        """The voice of a recording."""
        return self._embedder.embed(audio, rate_hz)

    def _embedding_of_bytes(self, samples: bytes, rate_hz: int) -> np.ndarray:
        return self.embed(np.frombuffer(samples, np.float32), rate_hz)


_BUILT_IN: dict[str, Callable[[str], Scorer]] = {"wer": WordErrorScorer, "speaker": SpeakerScorer}
_SPHINX, _RESEMBLYZER = "pocketsphinx", "resemblyzer"


@functools.cache
def load_scorer(spec: str) -> Scorer:
    """`wer=RECOGNISER`, `speaker=EMBEDDER`, or a class of one's own, `module:Class` or `module:Class=ARGUMENT`.

    A RECOGNISER is what `load_recogniser` takes, an EMBEDDER what `load_embedder` takes; `pocketsphinx` alone is
    `wer=pocketsphinx`, and `resemblyzer` alone `speaker=resemblyzer`. UsageError where there is no such thing,
    ValueError where it cannot be made.
    """
    where, _, argument = spec.partition("=")
    if spec == _SPHINX:
        return WordErrorScorer(_SPHINX)
    if spec == _RESEMBLYZER:
        return SpeakerScorer(_RESEMBLYZER)
    if where in _BUILT_IN:
        if not argument:
            raise UsageError(f"scorer {where!r} needs the folder of a model: {where}=FOLDER")
        return _BUILT_IN[where](argument)
    if ":" not in where:
        known = ", ".join((*(f"{built_in}=FOLDER" for built_in in _BUILT_IN), _SPHINX, _RESEMBLYZER))
        raise UsageError(f"scorer {spec!r} is neither one of {known} nor module:Class")
    scorer = _made(spec, "scorer")
    if not isinstance(scorer, Scorer):
        raise UsageError(f"scorer {spec!r} lacks one of name, version and score")
    return scorer


def load_recogniser(spec: str) -> Recogniser:
    """`pocketsphinx`, the folder of a CTC model, or a class of one's own, `module:Class` or `module:Class=ARGUMENT`.

    UsageError where there is no such class, or an extra is missing; ValueError where the recogniser cannot be made.
    """
    if spec == _SPHINX:
        from codec.evaluation.phones import PocketsphinxRecogniser

        return PocketsphinxRecogniser()
    if os.path.exists(spec) or ":" not in spec:
        return CTCRecogniser(spec)
    recogniser = _made(spec, "recogniser")
    if not isinstance(recogniser, Recogniser):
        raise UsageError(f"recogniser {spec!r} lacks one of name, version and transcribe")
    return recogniser


def load_embedder(spec: str) -> SpeakerEmbedder:
    """`resemblyzer`, the folder of an x-vector model, or a class of one's own, `module:Class[=ARGUMENT]`.

    UsageError where there is no such class, or a package is missing; ValueError where the embedder cannot be made.
    """
    if spec == _RESEMBLYZER:
        from codec.evaluation.speakers import ResemblyzerEmbedder

        return ResemblyzerEmbedder()
    if os.path.exists(spec) or ":" not in spec:
        return XVectorEmbedder(spec)
    embedder = _made(spec, "embedder")
    if not isinstance(embedder, SpeakerEmbedder):
        raise UsageError(f"embedder {spec!r} lacks one of name, version and embed")
    return embedder


def _made(spec: str, what: str) -> Any:
    """An object of the class `module:Class`, made with an argument where `=ARGUMENT` follows."""
    where, has_argument, argument = spec.partition("=")
    module, _, name = where.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} {spec!r} cannot be imported: {error}") from error
    return make(argument) if has_argument else make()


def words(text: str) -> list[str]:
    """In lower case, without punctuation but apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest substitutions, deletions and insertions that make one of the other (Levenshtein)."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*said, *heard]))}
    first, second = (np.array([numbers[word] for word in part], np.int64) for part in (said, heard))
    return edit_distance(first, second)


def _load(inputs: str, task: str, folder: str) -> tuple[Any, Any, str]:
    """What prepares a model's inputs, the model, frozen, and its version, with that of `transformers`."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("this scorer needs the extra 'ssl'")
    from codec.features import one_line, read_folder

    model, version = read_folder(folder, task)
    import transformers

    with one_line(folder):
        prepare = getattr(transformers, inputs).from_pretrained(folder, local_files_only=True)
    return prepare, model, f"{version}, transformers {transformers.__version__}"


def _infer(model: Any, features: Any, audio: np.ndarray, rate_hz: int, model_hz: int) -> Any:
    """The model's output for one recording."""
    import torch

    at_rate = resample(audio[None], rate_hz, model_hz)[0]
    inputs = features(at_rate, sampling_rate=model_hz, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs)
