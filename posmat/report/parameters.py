"""A notebook's parameters, read from its own cell and checked before a kernel starts."""

import difflib
import re
from pathlib import Path

import click

from posmat.measure import run as records
from posmat.measure.files import RecordError
from posmat.measure.run import PARAMETER_TYPES, Parameter

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class UsageError(click.UsageError):
    """What the user asked for cannot be done; the message says what was found and what to do."""


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The declared parameters of a notebook by name.

    Raises:
        UsageError: the notebook cannot be read, or a parameter is no typed literal.
    """
    try:
        return records.read_parameters(notebook)
    except RecordError as error:
        raise UsageError(str(error)) from None


def split_values(name: str, text: str, declared: dict[str, Parameter]) -> list[str]:
    """The values of `-p name=a,b,c`, which is a grid.

    A text whose default holds a comma has its commas to itself, and so has a comma after a
    backslash; a grid of such values is made by giving -p again.
    """
    parameter = declared.get(name)
    if parameter and parameter.type == "str" and "," in parameter.default:
        return [text]
    return [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]


def convert(name: str, value: object, declared: dict[str, Parameter], notebook: str) -> object:
    """What a value means for a notebook: a text as in `-p name=text`, or a plain Python value.

    Raises:
        UsageError: the notebook has no such parameter, or the value is not of its type.
    """
    if name not in declared:
        near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(declared) or 'none'}."
        raise UsageError(f"{notebook} has no parameter {name!r}: {hint}")
    kind = declared[name].type
    if type(value) is PARAMETER_TYPES[kind]:
        return value
    try:
        if not isinstance(value, str):  # of numpy, say: papermill would make a text of it
            raise ValueError
        return _BOOLS[value.lower()] if kind == "bool" else PARAMETER_TYPES[kind](value)
    except (KeyError, ValueError):
        raise UsageError(
            f"{notebook} wants {name}: {kind} (default {declared[name].default!r}), "
            f"and {value!r} is none."
        ) from None


def table_of(notebook: Path) -> str:
    """The parameters of a notebook as a table to read."""
    lines = [("name", "type", "default", "meaning")]
    for parameter in read_parameters(notebook).values():
        default = repr(parameter.default)
        lines.append((parameter.name, parameter.type, default, parameter.meaning))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = ["  ".join([*map(str.ljust, line, widths), line[3]]).rstrip() for line in lines]
    return "\n".join([notebook.stem, *(f"  {row}" for row in rows)])
