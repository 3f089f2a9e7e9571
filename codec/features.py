"""Frozen speech models: what they make of speech, layer by layer, and what their CTC heads read in it. Extra `ssl`.

Letters: B batch, T samples, F frames of the model, L layers, D dims of a layer, V labels of a CTC head.

    model = load_speech_model("folder/of/wavlm")                # a folder of `transformers`, weights in safetensors
    model = load_speech_model("torchaudio:HUBERT_BASE")         # a bundle of torchaudio, which it downloads
    model = load_speech_model("torchaudio:HUBERT_BASE=FILE")    # the same from a file that is there
    features = model(audio, num_samples, layers=9)              # values [B, F, D], num_frames [B]
    values, mask = at_frames(features, from_hz=50.0, to_hz=12.5, num_frames=25)

Waveform models (wav2vec2 with XLSR, HuBERT, WavLM, data2vec, conformers, UniSpeech) and those that take log-mels
(w2v-BERT) are used alike. Layers are numbered as in papers, whoever made the model: 0 is what enters the first
transformer layer, i what leaves the i-th, and the last one has passed the model's final normalisation, if it has one.

No code of a model is run from disk: safetensors hold tensors only, and torchaudio's files are unpickled with
`weights_only`, which makes nothing but tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from codec.speech_input import Entrance, by_length, geometry

_WAVEFORM_KINDS = (
    "data2vec-audio",
    "hubert",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
)
_MEL_KINDS = ("wav2vec2-bert",)
_BUNDLE = "torchaudio:"
# Only training masks inputs; published folders lack it.
_UNUSED_WEIGHT = "masked_spec_embed"


@dataclass(frozen=True)
class Features:
    """What a model makes of a batch.

    values: float32 [B, F, D], zeros past a row's end.
    num_frames: int64 [B].
    """

    values: Tensor
    num_frames: Tensor


def at_frames(
    features: Features,
    *,
    from_hz: float,
    to_hz: float,
    num_frames: int,
    start_seconds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features at the frames of another rate: values [B, num_frames, D], and a mask [B, num_frames].

    Frame i of either rate lasts from i to i + 1 periods. The new frames begin `start_seconds` [B] into the features, at
    their beginning if not given. A value is the mean of the features over the longer one of both periods, around the
    middle of the new frame: to a lower rate that is the mean over the frame, to a higher rate it interpolates linearly
    between the middles of frames. The mask is true where a frame's middle lies within the row's features; elsewhere
    values are 0.

    Without `start_seconds` features and frames are of the same audio, and may differ by a frame of each in length;
    ValueError where they differ by more, since then a rate is wrong.
    """
    if not (from_hz > 0 and to_hz > 0 and num_frames > 0):
        raise ValueError(f"cannot bring features from {from_hz} Hz to {num_frames} frames of {to_hz} Hz")
    values = features.values
    if start_seconds is None:
        seconds, wanted = int(features.num_frames.max()) / from_hz, num_frames / to_hz
        if abs(seconds - wanted) > (1 / from_hz + 1 / to_hz) * (1 + 1e-6):
            raise ValueError(
                f"teacher rate against codec rate: {seconds:.3f} s of features at {from_hz:g} Hz do not fit "
                f"{wanted:.3f} s of frames at {to_hz:g} Hz"
            )
        start_seconds = torch.zeros(len(values))
    frames = torch.arange(num_frames, device=values.device, dtype=torch.float64)
    start = start_seconds.to(values.device, torch.float64)
    # All in periods of the features.
    middle = (start * from_hz)[:, None] + (frames + 0.5) * (from_hz / to_hz)  # [B, num_frames]
    end = features.num_frames.to(values.device)[:, None]
    mask = (middle >= 0) & (middle < end)
    half = max(1.0, from_hz / to_hz) / 2
    first = torch.arange(values.shape[1], device=values.device, dtype=torch.float64)
    upper = torch.minimum((middle + half)[..., None], torch.minimum(first + 1, end.double())[:, None])
    lower = torch.maximum((middle - half)[..., None], first)
    weights = (upper - lower).clamp(min=0) * mask[..., None]  # what they share, [B, num_frames, F]
    weights /= weights.sum(2, keepdim=True).clamp(min=1e-9)
    with torch.autocast(values.device.type, enabled=False):
        return weights.to(values.dtype) @ values, mask


# Models


class FrozenModel(nn.Module):
    """What speech models have in common. `version` is the name and the start of the SHA-256 of the weights."""

    def __init__(self, network: nn.Module, entrance: Entrance, version: str) -> None:
        super().__init__()
        self.name, self.version = version.partition(",")[0], version
        self.sample_rate_hz, self.stride_samples = entrance.sample_rate_hz, entrance.stride_samples
        self.network, self.entrance = network, entrance
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: the model stays in evaluation mode."""
        super().train(False)
        return self

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.sample_rate_hz / self.stride_samples


class SpeechModel(FrozenModel):
    """A frozen speech model and its hidden states; made by `load_speech_model`.

    Always in evaluation mode and in float32, outside autocast and without gradients. Rows of a batch never influence
    one another: rows of unequal length are computed apart, since models with group norm know no masks. Audio is
    normalised over each row's own samples where the model was trained so.

    `padding="centered"` puts zeros around the audio, so that there are ceil(num_samples / stride_samples) frames, and
    what frame i hears is centred on the middle of samples i * stride_samples to (i + 1) * stride_samples: as the frames
    of a codec lie. `padding="none"` is the model as it was published: one second of wav2vec2 has 49 frames, and what
    frame i hears begins at sample i * stride_samples. `padding="end"` has those frames, and by zeros behind the audio
    the last ones, so that there are as many as with "centered".
    """

    def __init__(
        self,
        network: nn.Module,
        entrance: Entrance,
        hidden_states: Callable[[nn.Module, Tensor], Sequence[Tensor]],
        *,
        version: str,
        num_layers: int,
        feature_dim: int,
    ) -> None:
        super().__init__(network, entrance, version)
        self.num_layers, self.feature_dim = num_layers, feature_dim  # hidden states are 0..num_layers
        self._hidden_states = hidden_states

    def hidden(
        self, audio: Tensor, num_samples: Tensor | None = None, *, padding: str = "centered"
    ) -> tuple[Tensor, Tensor]:
        """All hidden states, float32 [L, B, F, D] with L = num_layers + 1, and num_frames, int64 [B].

        `audio` is float [B, T] at `sample_rate_hz`, of which each row has `num_samples` [B], or all. ValueError where a
        row is empty, or without padding has fewer samples than one frame needs.
        """
        return self._compute(audio, num_samples, padding, range(self.num_layers + 1))

    def forward(
        self,
        audio: Tensor,
        num_samples: Tensor | None = None,
        *,
        layers: str | int | Sequence[int],
        padding: str = "centered",
    ) -> Features:
        """The features of one layer, or the mean of several. `layers` is "last", a number, or a list of numbers."""
        values, num_frames = self._compute(audio, num_samples, padding, self.layer_numbers(layers))
        return Features(values.mean(0) if len(values) > 1 else values[0], num_frames)

    def layer_numbers(self, layers: str | int | Sequence[int]) -> tuple[int, ...]:
        """What `layers` names, checked: ValueError for layers that the model does not have."""
        if layers == "last":
            return (self.num_layers,)
        named = (layers,) if isinstance(layers, int) else tuple(layers)
        numbers = tuple(layer for layer in named if type(layer) is int and 0 <= layer <= self.num_layers)
        if not named or len(numbers) < len(named):
            raise ValueError(f'layers={layers!r}: {self.name} has "last" and 0 to {self.num_layers}')
        return numbers

    def _compute(
        self, audio: Tensor, num_samples: Tensor | None, padding: str, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        def chosen(inputs: Tensor) -> Tensor:
            states = self._hidden_states(self.network, inputs)
            return torch.stack([states[layer] for layer in layers])

        return by_length(self.entrance, audio, num_samples, padding, chosen)


class CTCModel(FrozenModel):
    """A frozen speech model with a CTC head; made by `load_ctc_model`. What `SpeechModel` says of inputs holds here.

    `labels[i]` is what column i stands for: the character, or the name of a special token. `blank` is the column of
    CTC's blank, `delimiter` the label between words ("" where the model has none).
    """

    def __init__(
        self,
        network: nn.Module,
        entrance: Entrance,
        logits: Callable[[nn.Module, Tensor], Tensor],
        *,
        version: str,
        labels: tuple[str, ...],
        blank: int,
        delimiter: str,
    ) -> None:
        super().__init__(network, entrance, version)
        self.labels, self.blank, self.delimiter = labels, blank, delimiter
        self._logits = logits

    def log_probs(
        self, audio: Tensor, num_samples: Tensor | None = None, *, padding: str = "centered"
    ) -> tuple[Tensor, Tensor]:
        """Logarithms of the labels' probabilities, float32 [B, F, V], zeros past a row's end; and num_frames [B]."""

        def computed(inputs: Tensor) -> Tensor:
            return self._logits(self.network, inputs).log_softmax(-1)[None]

        values, num_frames = by_length(self.entrance, audio, num_samples, padding, computed)
        return values[0], num_frames


def load_speech_model(source: str) -> SpeechModel:
    """A speech model from a folder of `transformers`, or from torchaudio: "torchaudio:NAME", "torchaudio:NAME=FILE".

    Nothing is downloaded but a bundle "torchaudio:NAME". ValueError where there is no such model, where weights are
    missing, and for kinds of models that are not known here.
    """
    if source.startswith(_BUNDLE):
        bundle, network, version = _open_bundle(source)
        return SpeechModel(
            network,
            _bundle_entrance(bundle, network),
            _bundle_states,
            version=version,
            num_layers=len(network.encoder.transformer.layers),
            feature_dim=network.encoder.transformer.layer_norm.normalized_shape[0],
        )
    network, version = read_folder(source, "AutoModel")
    return SpeechModel(
        network,
        _folder_entrance(source, network.config),
        _folder_states,
        version=version,
        num_layers=network.config.num_hidden_layers,
        feature_dim=network.config.hidden_size,
    )


def load_ctc_model(source: str) -> CTCModel:
    """A recogniser from a folder of `transformers` with its tokenizer, or a bundle of torchaudio for recognition.

    Sources and errors are those of `load_speech_model`.
    """
    if source.startswith(_BUNDLE):
        bundle, network, version = _open_bundle(source)
        if network.aux is None:
            raise ValueError(f"{source} is no recogniser: it has no CTC head")
        labels = bundle.get_labels(star=None) if _is_aligner(bundle) else bundle.get_labels()
        return CTCModel(
            network,
            _bundle_entrance(bundle, network),
            _bundle_logits,
            version=version,
            labels=tuple(labels),
            blank=0,
            delimiter="|" if "|" in labels else "",
        )
    network, version = read_folder(source, "AutoModelForCTC")
    with one_line(source):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    columns = {column: label for label, column in tokenizer.get_vocab().items()}
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no padding token, which is CTC's blank")
    return CTCModel(
        network,
        _folder_entrance(source, network.config),
        _folder_logits,
        version=version,
        labels=tuple(columns.get(column, "") for column in range(network.config.vocab_size)),
        blank=tokenizer.pad_token_id,
        delimiter=getattr(tokenizer, "word_delimiter_token", None) or "",
    )


# Folders of `transformers`


def read_folder(folder: str, task: str, *, unused: str | None = None) -> tuple[Any, str]:
    """A network from a folder, for example as "AutoModelForCTC": in float32, frozen; and its version.

    Weights whose names begin with `unused` may be missing, being of no use to the caller. The version is the folder's
    name and the start of the SHA-256 of its weights. ValueError of one line where the package or weights are missing,
    or the folder holds something else.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("models of `transformers` need the extra 'ssl'")
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors")
    digest = hashlib.sha256()
    for weights in files:
        with weights.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    with one_line(folder), _quiet():
        import transformers

        network, loaded = getattr(transformers, task).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        needed = [key for key in loaded["missing_keys"] if not key.endswith(_UNUSED_WEIGHT)]
        missing = sorted(key for key in needed if unused is None or not key.startswith(unused))
        if missing:
            raise ValueError(f"weights are missing: {missing[:3]}")
    name = os.path.basename(os.path.realpath(folder))
    return network.eval().requires_grad_(False), f"{name}, weights {digest.hexdigest()[:12]}"


@contextlib.contextmanager
def one_line(source: str) -> Iterator[None]:
    """Whatever goes wrong with a model is a ValueError of one line with its source's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{source} cannot be loaded: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`transformers` says nothing meanwhile: what it would report of weights is told by errors, or does not matter."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _folder_entrance(folder: str, config: Any) -> Entrance:
    known = (*_WAVEFORM_KINDS, *_MEL_KINDS)
    if config.model_type not in known:
        raise ValueError(f"{folder} holds a model of kind {config.model_type!r}, not one of {', '.join(sorted(known))}")
    if getattr(config, "add_adapter", False):
        raise ValueError(f"{folder} holds a model with an adapter, whose frames lie elsewhere: it cannot be used")
    with one_line(folder):
        import transformers

        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    takes_mels = config.model_type in _MEL_KINDS
    if takes_mels != hasattr(extractor, "mel_filters"):
        raise ValueError(f"{folder}: {type(extractor).__name__} does not go with a model {config.model_type!r}")
    rate_hz = int(extractor.sampling_rate)
    if not takes_mels:
        epsilon = 1e-7 if extractor.do_normalize else None
        return Entrance(rate_hz, *geometry(config.conv_kernel, config.conv_stride), epsilon=epsilon)
    mel_filters, num_columns = torch.as_tensor(extractor.mel_filters), int(extractor.stride)
    if mel_filters.shape[1] * num_columns != config.feature_projection_input_dim:
        raise ValueError(
            f"{folder}: {num_columns} columns of {mel_filters.shape[1]} mel bands are not the "
            f"{config.feature_projection_input_dim} inputs of the model"
        )
    window, hop = torch.as_tensor(extractor.window), 160  # 10 ms at 16 kHz: the extractor knows no other
    return Entrance(
        rate_hz,
        hop * num_columns,
        hop * (num_columns - 1) + len(window),
        mel_filters=mel_filters.double(),
        window=window.double(),
        num_columns=num_columns,
    )


def _folder_states(network: Any, inputs: Tensor) -> Sequence[Tensor]:
    output = network(inputs, output_hidden_states=True)
    # Releases differ in whether the last of `hidden_states` has passed the final normalisation.
    return [*output.hidden_states[:-1], output.last_hidden_state]


def _folder_logits(network: Any, inputs: Tensor) -> Tensor:
    logits: Tensor = network(inputs).logits
    return logits


# Bundles of torchaudio


def _open_bundle(source: str) -> tuple[Any, Any, str]:
    """The bundle, its network without wrappings, and its version."""
    name, _, file = source.removeprefix(_BUNDLE).partition("=")
    if importlib.util.find_spec("torchaudio") is None:
        raise ValueError("bundles of torchaudio need the extra 'ssl'")
    import torchaudio

    bundle = getattr(torchaudio.pipelines, name, None)
    if not isinstance(bundle, torchaudio.pipelines.Wav2Vec2Bundle):
        raise ValueError(f"torchaudio has no bundle of a speech model that is called {name!r}")
    options: dict[str, Any] = {"with_star": False} if _is_aligner(bundle) else {}
    loading: dict[str, Any] = {"weights_only": True, "map_location": "cpu"}
    if file:
        if not Path(file).is_file():
            raise ValueError(f"{file} is no file with weights of {name}")
        loading |= {"model_dir": os.path.dirname(file) or ".", "file_name": os.path.basename(file)}
    with one_line(source):
        network = bundle.get_model(dl_kwargs=loading, **options)
    # A wrapper would normalise over the whole batch.
    network = getattr(network, "model", network)
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return bundle, network, f"{name}, weights {digest.hexdigest()[:12]}"


def _is_aligner(bundle: Any) -> bool:
    import torchaudio

    return isinstance(bundle, torchaudio.pipelines.Wav2Vec2FABundle)


def _bundle_entrance(bundle: Any, network: Any) -> Entrance:
    layers = network.feature_extractor.conv_layers
    stride, field = geometry([layer.kernel_size for layer in layers], [layer.stride for layer in layers])
    # No public name tells it. Source: torchaudio normalises by `layer_norm`, whose epsilon this is.
    return Entrance(int(bundle.sample_rate), stride, field, epsilon=1e-5 if bundle._normalize_waveform else None)


def _bundle_states(network: Any, inputs: Tensor) -> Sequence[Tensor]:
    transformer = network.encoder.transformer
    entered: list[Tensor] = []
    hook = transformer.layers[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    try:
        states, _ = network.extract_features(inputs)
    finally:
        hook.remove()
    if not transformer.layer_norm_first:  # the norm at the end, that `extract_features` leaves out
        states = [*states[:-1], transformer.layer_norm(states[-1])]
    return [*entered, *states]


def _bundle_logits(network: Any, inputs: Tensor) -> Tensor:
    logits: Tensor = network(inputs)[0]
    return logits
