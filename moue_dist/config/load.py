"""Reads a `Config` from strict YAML and from command-line overrides, and writes it back.

Strict: an unknown key, a wrong type, a duplicate key or an unreadable file is a ConfigError that names the file, the
key and the way out. A file may extend another one with `base: other.yaml` (relative to itself), or a shipped
configuration with `base: tiny`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from moue_dist.config import Config, ConfigError
from moue_dist.config.shipped import find_config, is_name, shipped_names

Nested = dict[str, Any]

FORMER: dict[str, dict[bool, str]] = {"model.qk_norm": {True: "head", False: "none"}}  # what was a switch once


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (None: all defaults) with overrides such as `--train.steps 10`.

    `path` may be the name of a shipped configuration, such as `tiny`; a file or folder of that name wins. Reads and
    checks types only; `validate.validate` checks the numbers. Raises ConfigError.
    """
    values = _read(find_config(path), ()) if path is not None else {}
    return _override(_build(Config, values), list(overrides))


def dump_config(config: Config) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal one."""
    plain = dataclasses.asdict(config)
    for section in plain.values():
        if isinstance(section, dict):
            section |= {key: list(value) for key, value in section.items() if isinstance(value, tuple)}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=False)


def all_keys() -> dict[str, Any]:
    """Every option as `section.key` (or `key` at the top), with its type."""
    return dict(_keys(Config, ""))


# YAML


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 'on', 'off' and 'no' are words, 1e-3 is a number, a repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if not tag.endswith((":bool", ":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|false|False)$", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Nested:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"a key must be a word (line {line})")
        key = key_node.value
        if key in seen:
            raise ConfigError(f"{key!r} stands twice in one section (line {line}); keep one")
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _read(path: Path, chain: tuple[Path, ...]) -> Nested:
    """The checked values of a file over those of its base, as nested dictionaries."""
    where = path.resolve()
    if where in chain:
        raise ConfigError(f"{path}: base goes round in a circle: {' -> '.join(p.name for p in (*chain, where))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}{_alternatives(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    try:
        raw = yaml.load(text, Loader=_Loader)  # _Loader extends SafeLoader
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise ConfigError(f"expected sections such as 'model:', not {_show(raw)}")
        base = raw.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"base: expected the path of another YAML file, not {_show(base)}")
        values = _check(Config, raw, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return values if base is None else _merge(_read(find_config(base, path.parent), (*chain, where)), values)


def _alternatives(path: Path) -> str:
    """What to name in place of a missing file: a shipped configuration, or a neighbour of a similar name."""
    if path.parent.is_dir():
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        if close:
            return f"; perhaps you meant {path.parent / close[0]}"
    if is_name(path.name):
        return f"; by name there are {', '.join(shipped_names())}"
    return f"; the shipped one goes by its name: {path.stem}" if path.stem in shipped_names() else ""


def _merge(below: Nested, above: Nested) -> Nested:
    both = {k: _merge(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


_LISTS: dict[Any, str] = {  # an example of every kind of list
    tuple[int, ...]: "[2, 2]",
    tuple[float, ...]: "[95, 5]",
    tuple[str, ...]: "[0.7, data/web, 0.3, data/code]",
}

_PARTS = {int: "whole numbers", float: "numbers", str: "words"}


def _check(kind: Any, raw: Mapping[Any, Any], prefix: str) -> Nested:
    """The section's values with checked types; raises ConfigError for an unknown key or a wrong type."""
    hints = typing.get_type_hints(kind)
    checked: Nested = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in hints:
            known = [f"{prefix}{k}" for k in hints] + list(all_keys())
            raise ConfigError(f"unknown key {name}{_perhaps(name, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is a section: expected its options below it, not {_show(value)}")
            checked[key] = _check(hints[key], value, f"{name}.")
        else:
            former = FORMER.get(name, {}).get(value) if isinstance(value, bool) else None
            checked[key] = former or _convert(hints[key], value, name)
    return checked


def _convert(kind: Any, value: Any, name: str) -> Any:
    """A YAML value as the option's type; raises ConfigError naming key, expected type and value."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        options = typing.get_args(kind)
        if value in options:
            return value
        perhaps = _perhaps(value, options) if isinstance(value, str) else ""
        raise ConfigError(f"{name}: expected one of {', '.join(options)}, not {_show(value)}{perhaps}")
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name}: expected a list such as {_LISTS[kind]}, not {_show(value)}")
        part = typing.get_args(kind)[0]
        if part is str:  # a blend's weights may be written as numbers
            value = [str(item) if type(item) in (int, float) else item for item in value]
        return tuple(_convert(part, item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    if kind is str and isinstance(value, str):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{name}: expected {expected}, not {_show(value)}")


def _show(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _build(kind: Any, values: Nested) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


# overrides


def _override(config: Config, args: list[str]) -> Config:
    """`--section.key value` over `config`, typed by tyro; raises ConfigError of one line."""
    if not args:
        return config
    groups = _groups(args)
    try:
        return _tyro(config, [word for group in groups for word in group])
    except _TyroError:
        for group in groups:  # find the one to blame
            try:
                _tyro(config, group)
            except _TyroError as error:
                key = group[0].lstrip("-").replace("-", "_").replace(".no_", ".")
                kind = all_keys()[key]
                origin = typing.get_origin(kind)
                if origin is Literal:
                    expected = f"one of {', '.join(typing.get_args(kind))}"
                elif origin is tuple:
                    expected = f"{_PARTS[typing.get_args(kind)[0]]}, such as {_LISTS[kind][1:-1].replace(',', '')}"
                else:
                    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
                given = " ".join(group[1:]) or "nothing"
                raise ConfigError(f"{group[0]}: expected {expected}, not {given}") from error
        raise ConfigError(f"cannot read the overrides {' '.join(args)}") from None


class _TyroError(Exception):
    pass


def _tyro(config: Config, args: list[str]) -> Config:
    import tyro  # late: `moue --help` does not need it

    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            return tyro.cli(Config, default=config, args=args, prog="moue")
    except SystemExit:
        raise _TyroError(quiet.getvalue()) from None


def _groups(args: Sequence[str]) -> list[list[str]]:
    """The words split by option, spelt as tyro has them; raises ConfigError for an unknown option."""
    keys = all_keys()
    groups: list[list[str]] = []
    for arg in args:
        if not arg.startswith("--"):
            if not groups:
                raise ConfigError(f"unexpected {arg!r}; options look like --train.steps 100")
            groups[-1].append(arg)
            continue
        flag, equals, value = arg[2:].partition("=")
        groups.append([flag.replace("-", "_"), *([value] if equals else [])])
    for group in groups:
        key, words = group[0], group[1:]
        positive = re.sub(r"(^|\.)no_", r"\1", key)
        if key not in keys and (keys.get(positive) is bool or positive in FORMER) and not words:
            key, words = positive, ["false"]
        if key in FORMER and (not words or words[0].lower() in ("true", "false")):
            words = [FORMER[key][not words or words[0].lower() == "true"]]
        if key not in keys:
            raise ConfigError(f"unknown option {_flag(key)}{_perhaps(_flag(key), map(_flag, keys))}")
        if keys[key] is bool and len(words) == 1 and words[0].lower() in ("true", "false"):
            section, _, leaf = key.rpartition(".")  # tyro spells a switch --x.leaf or --x.no-leaf
            key, words = (key if words[0].lower() == "true" else f"{section}.no_{leaf}"), []
        group[:] = [_flag(key), *words]
    return groups


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _keys(kind: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _perhaps(word: str, known: Iterable[str]) -> str:
    """'; perhaps you meant ...' for a close spelling or the same last name in another section."""
    options = sorted(set(known))
    leaf = re.split(r"[.]|^--", word)[-1]
    same = [o for o in options if re.split(r"[.]|^--", o)[-1] == leaf and o != word]
    close = difflib.get_close_matches(word, options, 1, 0.6)
    close = close or [o for o in options for hit in difflib.get_close_matches(leaf, [o.rsplit(".")[-1]], 1, 0.8) if hit]
    best = (same or close)[:1]
    return f"; perhaps you meant {best[0]}" if best else ""
