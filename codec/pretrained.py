"""Load and save codecs: a folder with `config.json`, `model.safetensors` and `tokens.safetensors`, or a bundled name.

Nothing is unpickled, and loading runs no code but the registered constructors.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from codec import config as codec_config
from codec.models import bicodec as _bicodec  # noqa: F401  (registers its configurations)
from codec.models import dac as _dac  # noqa: F401  (likewise)
from codec.models import hificodec as _hificodec  # noqa: F401  (likewise)
from codec.models import mimi as _mimi  # noqa: F401  (likewise)
from codec.models import multirate as _multirate  # noqa: F401  (likewise)
from codec.models import seanet as _seanet  # noqa: F401  (likewise)
from codec.models import semantic_global as _semantic_global  # noqa: F401  (likewise)
from codec.models.interface import Codec
from codec.models.voice import VoicedCodec
from codec.quantizers import binary as _binary  # noqa: F401  (and of quantizers)
from codec.quantizers import factorized as _factorized  # noqa: F401
from codec.quantizers import product as _product  # noqa: F401
from codec.quantizers import residual as _residual  # noqa: F401
from codec.quantizers import scalar as _scalar  # noqa: F401
from codec.quantizers import simvq as _simvq  # noqa: F401
from codec.quantizers import split as _split  # noqa: F401
from codec.token_format import DEFAULT_MODEL, FEATURE_FOLDER, FILE_NAME, TokenFormat, available

_STORED_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def load(source: str | os.PathLike[str] = DEFAULT_MODEL, *, device: str | torch.device = "cpu") -> Codec:
    """A codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is the name of a bundled model or a folder that `save` wrote. ValueError where it is neither, or where the
    folder's config and weights do not belong together.
    """
    name = os.fspath(source)
    bundled = available()
    folder = bundled.get(name, Path(name))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name!r} is neither a bundled model ({', '.join(bundled) or 'none'}) nor a folder with a config.json"
        )
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    codec: Codec = codec_config.build(codec_config.from_dict(data, str(folder / "config.json")))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    try:
        tensors = load_file(weights)
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors raises its own type, which is no subclass of ValueError
        raise ValueError(f"{weights} cannot be read: {error}") from error
    _check_tensors(tensors, codec.state_dict(), weights)
    codec.load_state_dict({key: value.float() for key, value in tensors.items()})
    codec.codec_id = compute_codec_id(data, tensors)
    codec.name = metadata.get("model", folder.resolve().name)
    codec.feature_folder = folder / FEATURE_FOLDER
    codec.token_format = _token_format(codec, codec.codec_id, codec.name)
    if (folder / FILE_NAME).is_file():
        stored = TokenFormat.load(folder)
        if replace(stored, tables=None) != codec.token_format:
            raise ValueError(f"{folder / FILE_NAME} belongs to another model")
        codec.token_format = stored
    return codec.to(device).eval().requires_grad_(False)


def save(codec: Codec, folder: str | os.PathLike[str], *, name: str, dtype: str = "float16") -> str:
    """Write a codec into a folder and return the codec id.

    `name` is what files made with the model will call it, such as "speech_16k@1"; the part before "@" is the folder
    name or bundled name that finds it again.

    Tensors are stored in `dtype` ("float16" or "float32"); `load` computes in float32 either way. The codec itself is
    not changed: load the folder to get the model that the id names.
    """
    if dtype not in _STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_STORED_DTYPES)}")
    data = codec_config.to_dict(codec.config)
    tensors = {k: v.detach().cpu().to(_STORED_DTYPES[dtype]).contiguous() for k, v in codec.state_dict().items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{key} holds values that {dtype} cannot store")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    partial = path / "model.safetensors.partial"
    partial.write_bytes(serialize(tensors, metadata={"model": name}))
    os.replace(partial, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    codec_id = compute_codec_id(data, tensors)
    _token_format(codec, codec_id, name).save(path)
    return codec_id


def _token_format(codec: Codec, codec_id: str, name: str) -> TokenFormat:
    return TokenFormat(
        codec_id=codec_id,
        model=name,
        sample_rate_hz=codec.sample_rate_hz,
        hop_length=codec.hop_length,
        codebook_sizes=tuple(codec.codebook_sizes),
        valid_num_quantizers=tuple(codec.valid_num_quantizers),
        num_frames_before=codec.decode_frames_before,
        num_frames_after=codec.decode_frames_after,
        num_global_codes=codec.num_global_codes,
        global_codebook_size=codec.global_codebook_size if isinstance(codec, VoicedCodec) else 0,
    )


def compute_codec_id(data: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """16 hex digits: the start of SHA-256 over canonical config and, by name, dtypes, shapes and bytes as stored."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], weights: Path) -> None:
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"{weights} does not fit its config.json: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{weights}: {key} is {tuple(value.shape)}, the config asks for {tuple(expected[key].shape)}"
            )
