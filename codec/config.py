"""Configurations are frozen dataclasses; this file turns them into dicts, back, and into objects.

A class that is built from a configuration is registered under a type name. The name is written into the dict under
`"type"`, so a `config.json` says everything about a model, and loading it runs no code but the registered constructors.

    {"type": "multirate", "sample_rate_hz": 16000, ..., "quantizer": {"type": "residual_vq", ...}}
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

_Built = TypeVar("_Built", bound=type)
_config_classes: dict[str, type] = {}
_built_classes: dict[type, type] = {}
_names: dict[type, str] = {}


def register(name: str, config_class: type) -> Callable[[_Built], _Built]:
    """Class decorator: objects of the class are built from `config_class`, whose dicts carry `"type": name`."""

    def add(built_class: _Built) -> _Built:
        if name in _config_classes:
            raise ValueError(f"the type name {name!r} is registered twice")
        _config_classes[name] = config_class
        _built_classes[config_class] = built_class
        _names[config_class] = name
        return built_class

    return add


def build(config: Any) -> Any:
    """Build the object that a registered configuration describes."""
    if type(config) not in _built_classes:
        raise ValueError(f"{type(config).__name__} is not a registered configuration")
    return _built_classes[type(config)](config)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values; `from_dict` is the inverse."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if type(value) not in _names:
                raise ValueError(f"{type(value).__name__} is not a registered configuration")
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"type": _names[type(value)], **fields}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(config)
    return result


def from_dict(data: Any, path: str = "config") -> Any:
    """Build a configuration from plain values. A ValueError names the path of the value that is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping, got {data!r}")
    values = dict(data)
    name = values.pop("type", None)
    if not isinstance(name, str) or name not in _config_classes:
        raise ValueError(f"{path}.type: {name!r} is unknown (known: {', '.join(sorted(_config_classes))})")
    config_class = _config_classes[name]
    hints = typing.get_type_hints(config_class)
    fields = {f.name for f in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{path}.{key}: {name} has no such setting (it has {', '.join(sorted(fields))})")
    converted = {key: _convert(value, hints[key], f"{path}.{key}") for key, value in values.items()}
    missing = {f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING} - set(converted)
    if missing:
        raise ValueError(f"{path}: {name} needs {', '.join(sorted(missing))}")
    try:
        return config_class(**converted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        config = from_dict(value, path)
        if not isinstance(config, hint):
            fitting = _names.get(hint, hint.__name__)
            raise ValueError(f"{path}.type: {value['type']!r} does not fit here, {fitting!r} does")
        return config
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(v, typing.get_args(hint)[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        if isinstance(value, dict):
            return from_dict(value, path)
        return _convert(value, next(h for h in typing.get_args(hint) if h is not type(None)), path)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
