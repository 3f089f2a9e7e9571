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


def build(config: Any, *context: Any) -> Any:
    """Build the object that a registered configuration describes; `context` is what else its constructor takes."""
    if type(config) not in _built_classes:
        raise ValueError(f"{type(config).__name__} is not a registered configuration")
    return _built_classes[type(config)](config, *context)


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
    return from_values(_config_classes[name], values, path)


def from_values(config_class: type, data: Any, path: str = "") -> Any:
    """Build a configuration of a class that is known beforehand, and so need not be registered; else as `from_dict`."""
    at = f"{path}: " if path else ""
    if not isinstance(data, dict):
        raise ValueError(f"{at}expected a mapping, got {data!r}")
    name = _names.get(config_class, path or "the configuration")
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for key in data:
        if key not in fields:
            raise ValueError(f"{_joined(path, key)}: {name} has no such setting (it has {', '.join(sorted(fields))})")
    converted = {key: _convert(value, hints[key], _joined(path, key)) for key, value in data.items()}
    missing = {key for key, field in fields.items() if _is_required(field)} - set(converted)
    if missing:
        raise ValueError(f"{at}{name} needs {', '.join(sorted(missing))}")
    try:
        return config_class(**converted)
    except ValueError as error:
        raise ValueError(f"{at}{error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fitting = sorted(name for name, known in _config_classes.items() if issubclass(known, hint))
        if not fitting and not (isinstance(value, dict) and "type" in value):
            return from_values(hint, value, path)
        config = from_dict(value, path)
        if not isinstance(config, hint):
            allowed = ", ".join(fitting) or "none"
            raise ValueError(f"{path}.type: {value['type']!r} does not fit here (what does: {allowed})")
        return config
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(v, typing.get_args(hint)[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected a mapping, got {value!r}")
        return {key: _convert(v, typing.get_args(hint)[1], _joined(path, key)) for key, v in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        if isinstance(value, dict) and "type" in value:
            return from_dict(value, path)
        return _convert(value, next(h for h in typing.get_args(hint) if h is not type(None)), path)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
