"""The Mimi of the `moshi` package, as far as it runs without what its language model needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

# It imports these at once, and its codec needs none of them.
_UNUSED = ("sentencepiece", "bitsandbytes", "sphn")


def moshi_loaders() -> Any:
    """Its module `moshi.models.loaders`; ImportError where the package is not installed."""
    if importlib.util.find_spec("moshi") is None:
        raise ImportError("this needs the moshi package: pip install --no-deps moshi")
    stubs = {name: _Anything(name) for name in _UNUSED if importlib.util.find_spec(name) is None}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("moshi.models.loaders")
    finally:
        for name in stubs:
            del sys.modules[name]


class _Anything(ModuleType):
    """A module in which every name is there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
