"""Any checkpoint that this package reads, told by what is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from codec.importers.checkpoint import read_checkpoint, read_json
from codec.models.interface import Codec

KINDS = ("encodec", "dac", "hificodec", "speechtokenizer", "bicodec", "mimi")
# Names of tensors that tell a kind; SpeechTokenizer has what EnCodec has, and more, so it is looked for first.
_TELLING_NAMES = {
    "speechtokenizer": r"(generator\.)?encoder\.model\.\d+\.lstm\.weight_ih_l0_reverse$",
    "encodec": r"quantizer\.(vq\.)?layers\.\d+\.(_codebook|codebook)\.embed$",
    "dac": r"quantizer\.quantizers\.\d+\.codebook\.weight$",
    "hificodec": r"quantizer\.quantizer_modules\.\d+\.embedding\.weight$",
    "bicodec": r"speaker_encoder\.perceiver_sampler\.latents$",
    "mimi": r"quantizer\.(rvq_first|semantic_residual_vector_quantizer)\.input_proj\.weight$",
}


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    kind: str | None = None,
    sample_rate_hz: int | None = None,
    allow_pickle: bool = False,
) -> Codec:
    """A checkpoint of another project as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is a file or a folder, as the importer of its `kind` takes it (one of `KINDS`); by default the kind is told
    by the folder's config.json or config.yaml, or by the names of tensors. `sample_rate_hz` decides where nothing else
    does (HiFi-Codec for 16 and 24 kHz); elsewhere it must be the model's. Only safetensors are read, unless
    `allow_pickle`.

    ValueError for a source that is no checkpoint of these kinds, and whatever the importer finds wrong with it.
    """
    if kind is None:
        kind = detect_kind(source, allow_pickle=allow_pickle)
    codec: Codec
    if kind == "encodec":
        from codec.importers.encodec import load_encodec

        codec = load_encodec(source, allow_pickle=allow_pickle)
    elif kind == "dac":
        from codec.importers.dac import load_dac

        codec = load_dac(source, allow_pickle=allow_pickle)
    elif kind == "hificodec":
        from codec.importers.hificodec import load_hificodec

        codec = load_hificodec(source, sample_rate_hz=sample_rate_hz, allow_pickle=allow_pickle)
    elif kind == "speechtokenizer":
        from codec.importers.speechtokenizer import load_speechtokenizer

        codec = load_speechtokenizer(source, allow_pickle=allow_pickle)
    elif kind == "bicodec":
        from codec.importers.bicodec import load_bicodec

        codec = load_bicodec(source, allow_pickle=allow_pickle)
    elif kind == "mimi":
        from codec.importers.mimi import load_mimi

        codec = load_mimi(source, allow_pickle=allow_pickle)
    else:
        raise ValueError(f"kind={kind!r} is not one of {KINDS}")
    if sample_rate_hz not in (None, codec.sample_rate_hz):
        raise ValueError(f"{os.fspath(source)} is a model for {codec.sample_rate_hz} Hz, not for {sample_rate_hz} Hz")
    return codec


def detect_kind(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> str:
    """Which of `KINDS` a file or folder holds. ValueError where it is none of them."""
    path = Path(source)
    found = _kind_of_folder(path) if path.is_dir() else _kind_of_names(_names(path, allow_pickle=allow_pickle))
    if found is None:
        raise ValueError(f"{path} is no checkpoint that is known ({', '.join(KINDS)}); if it is one, say which kind")
    return found


def _kind_of_folder(folder: Path) -> str | None:
    path = folder / "config.json"
    if not path.is_file() and any((folder / place / "config.yaml").is_file() for place in ("BiCodec", ".")):
        return "bicodec"
    data = read_json(path)
    if data.get("model_type") in ("encodec", "dac", "mimi"):
        return str(data["model_type"])
    if {"n_filters", "n_q", "strides"} <= data.keys():
        return "speechtokenizer"
    return "hificodec" if "upsample_rates" in data else None


def _names(path: Path, *, allow_pickle: bool) -> list[str]:
    """The names of a file's tensors; of dicts of tensors in it, too, after the dict's own."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except Exception as error:  # safetensors raises its own type
            raise ValueError(f"{path} cannot be read: {error}") from error
    content = read_checkpoint(path, allow_pickle=allow_pickle)
    if not isinstance(content, dict):
        return []
    parts = [(f"{part}.", value) for part, value in content.items() if isinstance(value, dict)]
    return [f"{prefix}{key}" for prefix, tensors in [("", content), *parts] for key in tensors]


def _kind_of_names(names: Sequence[str]) -> str | None:
    for kind, pattern in _TELLING_NAMES.items():
        if any(re.search(rf"^(state_dict\.|model\.)?{pattern}", name) for name in names):
            return kind
    return None
