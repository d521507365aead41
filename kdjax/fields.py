"""Frozen dataclasses as trees of named fields: saved as JSON and read from it, changed by flags, compared."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from kdjax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
    dict: "an object",
}
"""What a kind of value is called."""

C = TypeVar("C", bound="DataclassInstance")
"""A class of configs."""


def to_json(config: Any) -> str:
    """Return the config as JSON that `from_json` reads back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str, kind: type[C], where: str = "config") -> C:
    """Return the config of a kind saved as `text`; fields that it lacks have their defaults.

    Raises:
        UserError: not JSON, an unknown field (with the nearest name), or a value of the wrong type.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    return _typed(kind, tree, where, "")


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


def _alternative(kinds: Sequence[Any], value: Any) -> Any:
    """Return the kind of several that a value from JSON is, or the first one, whose error then tells what is wanted."""

    def fits(kind: Any) -> bool:
        if get_origin(kind) is Literal:
            return value in get_args(kind)
        return isinstance(value, (int, float) if kind is float else kind if kind in WORDS else dict)

    return next(filter(fits, kinds), kinds[0])


def _typed(kind: Any, value: Any, where: str, name: str) -> Any:
    """Return a value that JSON gave as the `kind` that the field `name` has.

    Raises:
        UserError: it is none.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (UnionType, Union):
        is_none = value is None and NoneType in arguments
        return None if is_none else _typed(_alternative(arguments, value), value, where, name)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {name} is {value!r}; wanted one of {', '.join(arguments)}")
        return value
    wanted = origin or (kind if kind in WORDS else dict)
    came = {list: tuple}.get(type(value), type(value))
    if came is not wanted and (came, wanted) != (int, float):
        raise UserError(f"{where}: {name or 'all of it'} is {value!r}; wanted {WORDS[wanted]}")
    if wanted is tuple:
        return tuple(_typed(arguments[0], inner, where, name) for inner in value)
    if wanted is not dict:
        return wanted(value)
    hints = get_type_hints(kind)
    for unknown in value.keys() - hints.keys():
        raise UserError(f"{where}: unknown field {_join(name, unknown)!r}{did_you_mean(unknown, hints)}")
    return kind(**{key: _typed(hints[key], inner, where, _join(name, key)) for key, inner in value.items()})


def from_flags(config: C, flags: Sequence[str], command: str) -> C:
    """Return the config with dotted flags applied: ``--optim.learning-rate 1e-4``. ``--help`` prints all and exits.

    Raises:
        UserError: an unknown flag, with the nearest name, or a value that does not fit.
    """
    if not flags:
        return config
    _refuse_unknown(config, flags)
    wrong = io.StringIO()
    try:
        with contextlib.redirect_stderr(wrong):
            # Otherwise an optional part (the teacher) would be a subcommand, and --teacher.source unknown.
            return tyro.cli(
                type(config), default=config, args=list(flags), prog=command, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(wrong.getvalue())) from None


def _refuse_unknown(config: Any, flags: Sequence[str]) -> None:
    """Raise for the first flag that no field has, with the nearest that one has."""
    values = _flat(dataclasses.asdict(config))
    switches = [re.sub(r"(\w+)$", r"no_\1", name) for name, value in values.items() if isinstance(value, bool)]
    known = [_flag(name) for name in ("help", *values, *switches)]
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and _flag(name) not in known:
            near = get_close_matches(_flag(name), known, n=1)
            raise UserError(f"unknown flag {name}; " + (f"did you mean {near[0]}?" if near else "--help lists all"))


def _flag(name: str) -> str:
    return "--" + name.removeprefix("--").replace("_", "-")


def _one_line(box: str) -> str:
    """Return the words of tyro's framed message, without the frame, its heading and its closing advice."""
    words = re.sub(r"╭.*╮", "", box).split("For full helptext")[0].split("Argument helptext")[0]
    line = " ".join(re.sub(r"[─-╿]+", " ", words).split())
    return re.sub(r"^Error parsing (?!--)\S+: ", "", line).rstrip(".") + "; --help lists all flags"


def differences(old: Any, new: Any) -> list[str]:
    """Return ``field: old -> new`` for every field in which two configs differ."""
    return differences_of(dataclasses.asdict(old), dataclasses.asdict(new))


def differences_of(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return ``field: old -> new`` for every field in which two trees differ."""
    left, right = _flat(old), _flat(new)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left | right)
        if left.get(key) != right.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, tuple) and any(isinstance(inner, dict) for inner in value):
            value = {str(number): inner for number, inner in enumerate(value)}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
