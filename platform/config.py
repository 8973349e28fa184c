"""Configs: frozen keyword-only dataclasses, to and from plain mappings, with overrides by dotted keys.

A config validates itself in `__post_init__` and raises `ConfigError`. Fields may be bool, int, float, str, None,
`Literal`, `tuple`, other configs, and unions of these. What a person writes (`--set a.b=c`, a TOML file) goes through
the same checks as what a program writes: an unknown key names the nearest valid one, a wrong type the type wanted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .errors import ConfigError, did_you_mean

C = TypeVar("C")
ABSENT = "(absent)"
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-able values: nested dictionaries, lists and scalars."""
    return {field.name: _plain(getattr(config, field.name)) for field in _fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _fields(config: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if field.init]


def from_dict(cls: type[C], mapping: Mapping[str, Any]) -> C:
    """A config of class `cls` from what `to_dict` gave; missing keys take their defaults.

    Raises:
        ConfigError: unknown key, missing key without a default, wrong type, or what `cls` itself refuses.
    """
    return _build(cls, mapping, "")


def _build(cls: type[C], mapping: Mapping[str, Any], path: str) -> C:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in _fields(cls)}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"Unknown key '{_join(path, key)}'. {did_you_mean(key, fields)}")
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in mapping.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"Missing key '{_join(path, name)}' ({_type_name(hints[name])}).")
    return _made(lambda: cls(**values), path)


def _made(make: typing.Callable[[], C], path: str) -> C:
    try:
        return make()
    except ConfigError as error:
        # A nested config does not know where it stands in the whole: say it once, at the innermost place.
        if not path or str(error).startswith("In '"):
            raise
        raise ConfigError(f"In '{path}': {error}") from error


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _wrong(hint: Any, value: Any, path: str) -> ConfigError:
    return ConfigError(f"'{path}' must be {_type_name(hint)}, but is {value!r} ({type(value).__name__}).")


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type that `hint` asks for; texts are read only by `_from_text`."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        raise ConfigError(f"'{path}' is {value!r}. {did_you_mean(str(value), map(str, choices))}")
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _build(hint, value, path)
        raise _wrong(hint, value, path)
    if hint is tuple or origin is tuple:
        return _convert_tuple(hint, value, path)
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ConfigError(f"'{path}' must be a finite number, but is {value}.")
        return float(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    raise _wrong(hint, value, path)


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is type(None):
            continue
        try:
            return _convert(member, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else _wrong(hint, value, path)


def _convert_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(hint, value, path)
    kinds = typing.get_args(hint)
    if not kinds:
        return tuple(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ConfigError(f"'{path}' must have {len(kinds)} values, but has {len(value)}: {value!r}.")
    return tuple(_convert(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _from_text(hint: Any, text: str, path: str) -> Any:
    """What a person typed after `--set key=`, read as the type that the key has."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union_from_text(hint, text, path)
    if origin is Literal:
        matches = [choice for choice in typing.get_args(hint) if str(choice).lower() == text.strip().lower()]
        return matches[0] if matches else _convert(hint, text, path)
    if hint is bool:
        if text.strip().lower() in WORDS:
            return WORDS[text.strip().lower()]
        raise ConfigError(f"'{path}' must be true or false, but is {text!r}.")
    if hint in (int, float):
        return _number_from_text(hint, text, path)
    if hint is tuple or origin is tuple:
        return _tuple_from_text(hint, text, path)
    if dataclasses.is_dataclass(hint):
        raise ConfigError(f"'{path}' is a group of settings. Set one of: {', '.join(f.name for f in _fields(hint))}.")
    return text


def _union_from_text(hint: Any, text: str, path: str) -> Any:
    members = typing.get_args(hint)
    if type(None) in members and text.strip().lower() in ("none", "null"):
        return None
    # str accepts everything, so it comes last.
    for member in sorted((m for m in members if m is not type(None)), key=lambda member: member is str):
        try:
            return _convert(member, _from_text(member, text, path), path)
        except ConfigError:
            continue
    raise _wrong(hint, text, path)


def _number_from_text(hint: Any, text: str, path: str) -> int | float:
    try:
        if hint is float:
            return float(text)
        try:
            return int(text)
        except ValueError:
            number = float(text)  # 1e6 is a natural way to write a count
            if number.is_integer():
                return int(number)
            raise
    except (ValueError, OverflowError):
        raise _wrong(hint, text, path) from None


def _tuple_from_text(hint: Any, text: str, path: str) -> Any:
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            return json.loads(stripped)
        except json.JSONDecodeError as error:
            raise ConfigError(f"'{path}' is not a list: {text!r} ({error}).") from None
    parts = [part.strip() for part in stripped.strip("()").split(",") if part.strip()]
    kinds = typing.get_args(hint) or (str, ...)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(kinds) != len(parts):
        raise ConfigError(f"'{path}' must have {len(kinds)} values, but has {len(parts)}: {text!r}.")
    return [_from_text(kind, part, f"{path}.{i}") for i, (kind, part) in enumerate(zip(kinds, parts, strict=True))]


def override(config: C, changes: Mapping[str, Any]) -> C:
    """A copy of `config` with `changes` made, given as {"group.key": text or value}.

    All changes of one group are made together, so that the group is validated once, as a whole.
    """
    return _override(config, changes, "")


def _override(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(type(config))
    groups: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    names = [field.name for field in _fields(config)]
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in names:
            raise ConfigError(f"Unknown key '{_join(path, name)}'. {did_you_mean(name, names)}")
        current = getattr(config, name)
        if rest and isinstance(current, tuple) and current and all(map(dataclasses.is_dataclass, current)):
            groups.setdefault(name, {})[rest] = value
            continue
        if rest and not dataclasses.is_dataclass(current):
            raise ConfigError(
                f"'{_join(path, name)}' is not a group of settings, so '{_join(path, key)}' does not exist."
            )
        if rest:
            groups.setdefault(name, {})[rest] = value
        elif isinstance(value, Mapping) and dataclasses.is_dataclass(current):
            groups.setdefault(name, {}).update(value)
        else:
            where = _join(path, name)
            read = _from_text(hints[name], value, where) if isinstance(value, str) else value
            values[name] = _convert(hints[name], read, where)
    for name, inner in groups.items():
        current, where = values.get(name, getattr(config, name)), _join(path, name)
        change = _override_members if isinstance(current, tuple) else _override
        values[name] = change(current, inner, where)
    return _made(lambda: dataclasses.replace(config, **values), path)


def _override_members(members: tuple[Any, ...], changes: Mapping[str, Any], path: str) -> tuple[Any, ...]:
    """Changes of a tuple of groups, by their place: {"0.key": value}."""
    groups: dict[str, dict[str, Any]] = {}
    places = [str(i) for i in range(len(members))]
    for key, value in changes.items():
        place, _, rest = key.partition(".")
        if place not in places or not rest:
            raise ConfigError(
                f"'{_join(path, key)}' does not exist: '{path}' holds {len(members)} groups, 0 to {places[-1]}."
            )
        groups.setdefault(place, {})[rest] = value
    return tuple(
        _override(member, groups[place], _join(path, place)) if place in groups else member
        for place, member in zip(places, members, strict=True)
    )


def flatten(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, _join(path, key)))
        else:
            flat[_join(path, key)] = value
    return flat


def difference(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} for every key in which the two configs differ."""
    flat_a, flat_b = flatten(to_dict(a)), flatten(to_dict(b))
    if type(a) is not type(b):
        flat_a["(type)"], flat_b["(type)"] = type(a).__name__, type(b).__name__
    keys = list(flat_a) + [key for key in flat_b if key not in flat_a]
    pairs = {key: (flat_a.get(key, ABSENT), flat_b.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def read_toml(path: str | Path) -> tuple[str, Any]:
    """(preset's name, config) from a TOML file: `preset = "name"` and tables of overrides."""
    import tomllib

    from .presets import load_preset

    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file '{path}'.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as TOML: {error}") from error
    name = document.pop("preset", None)
    if not isinstance(name, str):
        raise ConfigError(f"'{path}' must name its preset at the top: preset = \"carracing-quick\".")
    try:
        return name, override(load_preset(name), document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
