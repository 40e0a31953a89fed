"""From fields to flags: the parser of a configuration and its ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from utils.effects import check_given
from utils.errors import UsageError, nearest
from utils.recorded import read_recorded, recorded_fields, recorded_files

if TYPE_CHECKING:
    from utils.args import Config

C = TypeVar("C", bound="Config")

METAVARS = {int: "N", float: "X", str: "NAME"}  # what --help calls a value, where its flag does not say

EPILOG = """A switch is --flag or --flag True; --no-flag or --flag False turns it off.
A flag that does nothing in a configuration is warned about; an unknown one is an error."""


class Help(argparse.RawDescriptionHelpFormatter):
    """The flags in one column and what they do in another."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Boolean):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # nor inside --no-dirichlet


class Parser(argparse.ArgumentParser):
    """One whose errors are a :class:`UsageError`."""

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message} (--help lists all flags)")


def unknown_flag(words: Sequence[str], names: Sequence[str]) -> UsageError:
    """The error for what the parser left over: the first flag among it, with the nearest one that there is."""
    word = next((w for w in words if w.startswith("-")), words[0])
    name = word.lstrip("-").partition("=")[0].removeprefix("no-").replace("-", "_")
    near = nearest(name, names, 0.6) if word.startswith("-") else None
    hint = f" Did you mean --{near}?" if near else ""
    what = f"unknown flag {word}." if word.startswith("-") else f"'{word}' is neither a flag nor the value of one."
    return UsageError(f"{what}{hint} (--help lists all flags)")


def add_flag(group: Any, f: dataclasses.Field, hint: Any) -> None:
    """One flag. Nothing is stored unless the user gives it, so that --config can be overridden."""
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f": {', '.join(f.metadata['choices'])}"
    if f.default is not None and f.default is not False and f.default != ():
        text += f" [{' '.join(f.default) if isinstance(f.default, tuple) else f.default}]"
    kinds = [k for k in typing.get_args(hint) if k is not types.NoneType] or [hint]
    common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        common |= {"nargs": "+", "type": _number(kind), "metavar": METAVARS[kind], "action": _Tuple}
        group.add_argument(f"--{f.name}", **common)
    elif kinds[0] is bool:
        names = [f"--{f.name}", f"--no-{f.name}"]
        group.add_argument(*names, action=_Boolean, nargs="?", **common)
    else:
        metavar = f.metadata["metavar"] or METAVARS[kinds[0]]
        group.add_argument(f"--{f.name}", type=_number(kinds[0]), metavar=metavar, **common)


def _number(kind: type) -> Callable[[str], Any]:
    if kind is str:
        return str

    def convert(text: str) -> Any:
        return kind(text)

    convert.__name__ = {int: "whole number", float: "number"}.get(kind, kind.__name__)
    return convert


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _Boolean(argparse.Action):
    """``--flag``, ``--no-flag`` and ``--flag True|False``."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        negated = option_string.startswith("--no-")
        if values is None:
            value = True
        elif values.lower() in words and not negated:
            value = words[values.lower()]
        else:
            parser.error(f"{option_string}: '{values}' is neither True nor False")
        setattr(namespace, self.dest, value != negated)


def parse(config_class: type[C], argv: Sequence[str] | None, description: str, varied: bool = False) -> C:
    """argv as a ``config_class``. ``varied``: what comes out is changed before it is run, so whether a flag counts is
    not known yet. Raises :class:`UsageError` on unknown flags and bad values, and where flags contradict each other;
    warns of flags that do nothing."""
    name = Path(sys.argv[0])
    parser = Parser(
        prog=f"python -m {name.parent.name}" if name.name == "__main__.py" else None,
        description=description,
        usage="%(prog)s [--flag value ...]",
        epilog=EPILOG,
        formatter_class=Help,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in fields)}
    for f in fields:
        add_flag(groups[f.metadata["group"]], f, hints[f.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise unknown_flag(unknown, [f.name for f in fields])
    given = vars(known)
    if "config" not in given:
        config = config_class(**given)
    else:
        record = read_recorded(given["config"])
        recorded = recorded_fields(f"--config {given['config']}", record, hints)
        if "train_ratio" in given:
            recorded.pop("choose_ratio", None)  # which would choose it
        config = config_class(**{**recorded, **given})
        config = dataclasses.replace(config, **recorded_files(given["config"], record, config, given))
    if not varied:
        check_given(config, given)
    return config
