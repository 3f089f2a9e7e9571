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
    from codec.bitstream import BitstreamError, Header, Reader, TruncatedError, Writer
    from codec.kernels.numba_search import compile_search
    from codec.models.interface import AudioCodec, Codec, StreamableCodec
    from codec.pretrained import load, save
    from codec.streaming import PoolFull, StreamClosed, StreamingDecoder, StreamingEncoder, StreamPool
    from codec.token_format import TokenFormat, available, cut, join, open, write
    from codec.token_vocabulary import Vocabulary, VocabularyDecoder
    from codec.tokens import Tokens

__all__ = [
    "AudioCodec",
    "BitstreamError",
    "Codec",
    "Header",
    "PoolFull",
    "Reader",
    "StreamClosed",
    "StreamPool",
    "StreamableCodec",
    "StreamingDecoder",
    "StreamingEncoder",
    "TokenFormat",
    "Tokens",
    "TruncatedError",
    "Vocabulary",
    "VocabularyDecoder",
    "Writer",
    "available",
    "compile_search",
    "cut",
    "join",
    "load",
    "open",
    "save",
    "write",
]

__version__ = "0.1.0"

_HOMES = {
    "AudioCodec": "codec.models.interface",
    "BitstreamError": "codec.bitstream",
    "Codec": "codec.models.interface",
    "Header": "codec.bitstream",
    "Reader": "codec.bitstream",
    "StreamableCodec": "codec.models.interface",
    "PoolFull": "codec.streaming",
    "StreamClosed": "codec.streaming",
    "StreamPool": "codec.streaming",
    "StreamingDecoder": "codec.streaming",
    "StreamingEncoder": "codec.streaming",
    "TokenFormat": "codec.token_format",
    "Tokens": "codec.tokens",
    "TruncatedError": "codec.bitstream",
    "Vocabulary": "codec.token_vocabulary",
    "VocabularyDecoder": "codec.token_vocabulary",
    "Writer": "codec.bitstream",
    "compile_search": "codec.kernels.numba_search",
    "available": "codec.token_format",
    "cut": "codec.token_format",
    "join": "codec.token_format",
    "load": "codec.pretrained",
    "open": "codec.token_format",
    "save": "codec.pretrained",
    "write": "codec.token_format",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
