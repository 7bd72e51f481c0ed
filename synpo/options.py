"""Options of a command: the fields of dataclasses as flags and as keys of a YAML file, checked alike."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

NOT_OPTIONS = ("config", "command", "debug")  # what the command line holds beside a command's own options


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with the line that --help shows for it."""
    make = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**make, metadata={"help": meaning})


def field_names(kind: type) -> set[str]:
    """Names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(kind)}


def _flags(kinds: tuple[type, ...]) -> HfArgumentParser:
    """A flag for every field; what is not given stays out of the namespace."""
    parser = HfArgumentParser(kinds, allow_abbrev=False, add_help=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def add_options(
    parser: argparse.ArgumentParser, *kinds: type, positional: str = "", group_of: Callable[[str], str] | None = None
) -> None:
    """--config, and a flag for every field of the dataclasses.

    positional names a list field that stands on the command line without a flag; group_of gives the title that a
    field is shown under in --help.
    """
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML, `name: value`; flags win over it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for action in _flags(kinds)._actions:
        if action.dest == positional:
            name = positional.removesuffix("s").upper()
            parser.add_argument(positional, metavar=name, nargs="*", default=argparse.SUPPRESS, help=action.help)
            continue
        title = group_of(action.dest) if group_of else "options"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title]._add_action(action)


def given_options(args: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """The options of --config, if any, and over them those of the command line; defaults stay out."""
    given = {} if args.config is None else read_config(Path(args.config), *kinds)
    return given | {name: value for name, value in vars(args).items() if name not in NOT_OPTIONS}


def read_config(path: Path, *kinds: type) -> dict[str, Any]:
    """The options of a YAML file, checked and converted as flags are.

    Errors: ValueError for a file that is not YAML, an unknown option (the nearest name is suggested) or a wrong value.
    """
    where = f"config {str(path)!r}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}; lines of `name: value` are needed")
    parser = _flags(kinds)
    known = {action.dest for action in parser._actions}
    flags = []
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{where}: there is no option {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    parser.error = lambda message: _raise(f"{where}: {message}")  # argparse would print its usage and exit
    return vars(parser.parse_args(flags))


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
