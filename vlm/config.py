"""YAML files into frozen dataclasses: ``base:`` inheritance, dotted overrides, no unknown keys, no code.

Order of precedence, lowest first: the dataclass's defaults, the file named by ``base:`` (recursively),
the file itself, the overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlm.errors import ConfigError, UsageError

Config = TypeVar("Config")


def load_config(schema: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into ``schema``.

    Args:
        schema: A dataclass type; nested dataclasses, tuples, Literals, unions and primitives are understood.
        path: The YAML file, or None to start from the defaults.
        overrides: ``dotted.key=value`` strings; the value is parsed as YAML.

    Raises:
        ConfigError: The file is missing, is not a mapping, or holds an unknown key or a wrong value.
        UsageError: An override has no ``=``, names an unknown key or carries a wrong value.
    """
    values = _read(Path(path), ()) if path is not None else {}
    config = build(schema, values, where=str(path or "defaults"))
    if not overrides:
        return config
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UsageError(f"expected --set key=value, got {override!r}")
        _set(values, key.split("."), yaml.safe_load(text))
    try:
        return build(schema, values, where="--set")
    except ConfigError as error:
        raise UsageError(str(error)) from error


def build(schema: type[Config], values: Mapping[str, Any], where: str = "config") -> Config:
    """Turn a mapping into ``schema``, checking every key and type.

    Raises:
        ConfigError: A key is unknown (the nearest is named) or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping for {schema.__name__}, got {values!r}")
    hints = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    converted = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return schema(**converted)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain mappings and lists, ready for YAML or JSON."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def dump(config: Any) -> str:
    """Return a dataclass as YAML text that ``load_config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: 'base:' goes round in a circle: {' -> '.join(map(str, (*seen, path)))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / str(base), (*seen, path)), values)


def _merge(lower: dict[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = {}
            values[key] = inner
        values = inner
    values[keys[-1]] = value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against the type ``hint``, turning mappings into dataclasses and lists into tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return build(hint, value, where)
    if origin in (tuple, list):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return _convert_primitive(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(problems[-1])


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    repeated = origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
    kinds = [arguments[0]] * len(value) if repeated else list(arguments)
    if len(kinds) != len(value):
        raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}")
    items = (
        _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )
    return origin(items)


def _convert_primitive(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string, because it wants a dot before the exponent.
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
