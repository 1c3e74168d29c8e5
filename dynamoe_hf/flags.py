# SPDX-License-Identifier: Apache-2.0
"""From a dataclass of `arguments` to the flags of a subcommand, for tyro: names, forms of the values, help, groups."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from .arguments import field_helps


NAMES = {"train_parts": "train"}  # a field whose flag has another name


def count(value: str) -> int:
    """`16` -> 16; nothing less than 1."""
    if not value.strip().isdecimal() or int(value) < 1:
        raise ValueError(f"expected a whole number of at least 1, found {value!r}")
    return int(value)


def numbers(value: str) -> tuple[float, ...]:
    """`0.5,0.75` -> (0.5, 0.75)."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"expected numbers divided by commas, such as 0.5,0.75, found {value!r}") from None


def files(values: list[str]) -> list[str]:
    """One name of a file or more."""
    if not values:
        raise ValueError("expected one file or more, found none")
    return values


def _form(nargs, metavar: str, read: Callable, write: Callable = lambda value: [str(value)]) -> PrimitiveConstructorSpec:
    # `is_instance` tells the members of a union apart, and a form reads all of its field. A default of None is not written.
    return PrimitiveConstructorSpec(
        nargs, metavar, read, lambda value: True, lambda value: [] if value is None else write(value)
    )


# How the command line reads the types that `arguments` marks by these names. tyro reads all others as it always does.
FORMS = {
    "count": _form(1, "N", lambda values: count(values[0])),
    "numbers": _form(1, "A,B,..", lambda values: numbers(values[0]), lambda value: [",".join(f"{each:g}" for each in value)]),
    "range": _form(2, "LOW HIGH", lambda values: tuple(map(float, values))),
    "files": _form("*", "FILE [FILE ...]", files),
}


def command_type(
    arguments: type | None,
    positionals: Mapping[str, str],
    json: bool,
    exclusive: Collection[str],
    optional: Collection[str] = (),
) -> type:
    """
    A dataclass of all inputs of a subcommand, annotated for tyro: its positionals, the fields of `arguments`, and `json`.

    Args:
        arguments: a dataclass whose fields have a default and a docstring below them.
        positionals: {name: help}.
        json: whether there is a switch `--json`.
        exclusive: names of the fields of which one at most may be given.
        optional: names of the positionals that may be left out, the last ones.
    """
    members: list[Any] = []
    for name, text in positionals.items():
        told = tyro.conf.arg(metavar=name.upper(), help=text, help_behavior_hint="" if name in optional else None)
        if name in optional:
            members.append((name, Annotated[str | None, tyro.conf.Positional, told], dataclasses.field(default=None)))
        else:
            members.append((name, Annotated[str, tyro.conf.Positional, told]))
    if arguments is not None:
        hints, helps, defaults = get_type_hints(arguments, include_extras=True), field_helps(arguments), arguments()
        group = tyro.conf.create_mutex_group(required=False, title="one of these at most")
        for field in dataclasses.fields(arguments):
            default = getattr(defaults, field.name)
            # Where the default is nothing, the words of the help say what that means.
            hint = "" if default is None or default is False or default == () else None
            told = tyro.conf.arg(name=NAMES.get(field.name), help=helps[field.name], help_behavior_hint=hint)
            kind = Annotated[_readable(hints[field.name]), told]  # type: ignore[valid-type]  # made while running
            kind = Annotated[kind, group] if field.name in exclusive else kind
            members.append((field.name, kind, dataclasses.field(default=default)))
    if json:
        told = tyro.conf.arg(help="Print everything as JSON.", help_behavior_hint="")
        members.append(("json", Annotated[bool, told], dataclasses.field(default=False)))
    return dataclasses.make_dataclass("Command", members)


def _readable(hint):
    """The type by which tyro reads a field: a form in place of its name, and a string where a path would do as well."""
    kinds = [kind for kind in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if kind is not Path]
    for kind in kinds:
        if get_origin(kind) is Annotated and (form := FORMS.get(get_args(kind)[1])) is not None:
            return Annotated[hint, form]
    return reduce(or_, kinds)
