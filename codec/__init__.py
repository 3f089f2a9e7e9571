"""Neural speech codec and speech tokens.

>>> import codec
>>> model = codec.load()  # doctest: +SKIP
>>> tokens = model.encode(audio)  # doctest: +SKIP
>>> audio = model.decode(tokens)  # doctest: +SKIP

Names are loaded when they are first used: importing this package imports neither torch nor anything heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codec.bitstream import BitstreamError
    from codec.models.interface import AudioCodec, StreamableCodec
    from codec.pretrained import available, load, save
    from codec.streaming import StreamingDecoder, StreamingEncoder
    from codec.tokens import Tokens

__all__ = [
    "AudioCodec",
    "BitstreamError",
    "StreamableCodec",
    "StreamingDecoder",
    "StreamingEncoder",
    "Tokens",
    "available",
    "load",
    "save",
]

__version__ = "0.1.0"

_HOMES = {
    "AudioCodec": "codec.models.interface",
    "BitstreamError": "codec.bitstream",
    "StreamableCodec": "codec.models.interface",
    "StreamingDecoder": "codec.streaming",
    "StreamingEncoder": "codec.streaming",
    "Tokens": "codec.tokens",
    "available": "codec.pretrained",
    "load": "codec.pretrained",
    "save": "codec.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
