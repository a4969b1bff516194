"""YAML files into frozen dataclasses: ``base:`` inheritance, dotted overrides, no unknown keys, no code.

Order of precedence, lowest first: the dataclass's defaults, the file named by ``base:`` (recursively),
the file itself, the overrides. A nested mapping changes only the keys that it names.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlm.assets import asset
from vlm.errors import ConfigError, InvalidInput, UsageError

Config = TypeVar("Config")

_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def load_config(schema: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into ``schema``.

    Args:
        schema: A dataclass type; nested dataclasses, tuples, Literals, unions, paths and primitives are
            understood.
        path: The YAML file, or None to start from the defaults.
        overrides: ``dotted.key=value`` strings; the value is parsed as YAML.

    Raises:
        ConfigError: The file is missing or no mapping, lacks a key, or holds an unknown key or a wrong value.
        UsageError: An override has no ``=``, names an unknown key or carries a wrong value.
    """
    values = read_yaml(path) if path is not None else {}
    where = str(path) if path is not None else "defaults"
    if not overrides:
        return build(schema, values, where)
    changed = values
    for override in overrides:
        changed = _override(changed, override)
    try:
        return build(schema, changed, "--set")
    except ConfigError as error:
        with_overrides = error
    try:
        build(schema, values, where)
    except ConfigError as error:
        if str(error).removeprefix(where) == str(with_overrides).removeprefix("--set"):
            raise error from None  # the file's own fault: the overrides neither cause nor mend it
    raise UsageError(str(with_overrides)) from with_overrides


def build(schema: type[Config], values: Mapping[str, Any], where: str = "config") -> Config:
    """Turn a mapping into ``schema``, checking every key and type.

    Args:
        schema: A dataclass type.
        values: Key → value, nested as the dataclass is.
        where: What the values came from, for messages.

    Raises:
        ConfigError: A key is unknown (the nearest is named) or missing, or a value has the wrong type.
    """
    return _build(schema, values, where, "", None)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, laid over the file that its ``base:`` names.

    Raises:
        ConfigError: A file is missing or no mapping, a key is given twice, or ``base:`` goes in a circle.
    """
    return _read(Path(path), ())


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain mappings and lists, ready for YAML or JSON."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def dump(config: Any) -> str:
    """Return a dataclass as YAML text that ``load_config`` reads back."""
    text: str = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _build(schema: type[Config], values: Any, where: str, path: str, default: Config | None) -> Config:
    """Build ``schema`` from ``values``; keys not named keep their value in ``default``, if there is one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{_place(where, path)}: expected a mapping of {schema.__name__}, got {values!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{_place(where, path)}: unknown key {key!r}; {hint}")
    converted = {}
    for key, value in values.items():
        inner = _default(fields[key]) if default is None else getattr(default, key)
        converted[key] = _convert(hints[key], value, where, f"{path}.{key}".lstrip("."), inner)
    missing = [name for name, field in fields.items() if name not in values and not _has_default(field)]
    if missing and default is None:
        raise ConfigError(f"{_place(where, path)}: {schema.__name__} needs {', '.join(missing)}")
    try:
        if default is None:
            return schema(**converted)
        replaced: Config = dataclasses.replace(default, **converted)  # type: ignore[type-var]
        return replaced
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{_place(where, path)}: {error}") from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _place(where: str, path: str) -> str:
    return f"{where}: {path}" if path else where


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(
            f"{path}: 'base:' goes round in a circle: {' -> '.join(map(str, (*seen, resolved)))}"
        )
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        advice = ""
        with suppress(InvalidInput):
            advice = f"; the one that came with vlm is {asset(path.as_posix())}"
        raise ConfigError(f"{path}: no such config file{advice}") from error
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base:' must be the path of a config file, got {base!r}")
    return _merge(_read(resolved.parent / base, (*seen, resolved)), values)


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return ``values`` with one ``dotted.key=value`` laid over them."""
    key, separator, text = override.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise UsageError(f"expected --set key=value with a dotted key, got {override!r}")
    try:
        value = _parse(text)
    except ConfigError as error:
        raise UsageError(f"--set {key}: the value is not YAML: {error}") from error
    for name in reversed(keys):
        value = {name: value}
    return _merge(values, value)


def _convert(hint: Any, value: Any, where: str, path: str, default: Any = None) -> Any:
    """Check ``value`` against the type ``hint``, turning mappings into dataclasses and lists into tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where, path, default)
    if origin is typing.Literal:
        if not any(type(value) is type(allowed) and value == allowed for allowed in arguments):
            expected = ", ".join(map(repr, arguments))
            raise ConfigError(f"{_place(where, path)}: expected one of {expected}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, where, path, default if isinstance(default, hint) else None)
    if origin in _SEQUENCES:
        return _convert_sequence(list if origin is list else tuple, arguments, value, where, path)
    if origin in _MAPPINGS:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{_place(where, path)}: expected a mapping, got {value!r}")
        names = {name: _convert(arguments[0], name, where, path) for name in value}
        return {
            names[name]: _convert(arguments[1], item, where, f"{path}.{name}") for name, item in value.items()
        }
    return _convert_primitive(hint, value, where, path)


def _convert_union(options: tuple[Any, ...], value: Any, where: str, path: str, default: Any) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    problems = []
    for option in options:
        try:
            return _convert(option, value, where, path, default)
        except ConfigError as error:
            # A mapping is meant for the dataclass: its complaint is the one that helps.
            if isinstance(value, Mapping) and dataclasses.is_dataclass(option):
                raise
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{_place(where, path)}: expected {expected}, got {value!r}")


def _convert_sequence(kind: type, arguments: tuple[Any, ...], value: Any, where: str, path: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{_place(where, path)}: expected a list, got {value!r}")
    repeated = len(arguments) == 1 and kind is list or arguments[1:] == (Ellipsis,) or arguments[1:] == ()
    kinds = [arguments[0]] * len(value) if repeated else list(arguments)
    if len(kinds) != len(value):
        raise ConfigError(f"{_place(where, path)}: expected {len(kinds)} values, got {len(value)}: {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return kind(_convert(item_hint, item, where, f"{path}[{i}]") for i, (item_hint, item) in pairs)


def _convert_primitive(hint: Any, value: Any, where: str, path: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    hint_text = "; write true or false" if hint is bool else ""
    raise ConfigError(f"{_place(where, path)}: expected {hint.__name__}, got {value!r}{hint_text}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number; no, off, 010, 1:30 and 2024-01-01 are not. No key twice."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, refusing what would silently win over an earlier line."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back: the same scalars are quoted."""

    yaml_implicit_resolvers = {}


_MERGE = "tag:yaml.org,2002:merge"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)
for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split()) or type(error).__name__) from error
