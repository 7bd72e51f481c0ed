"""The command `synpo`: one subcommand per job, each loaded when it is called."""

import argparse
import difflib
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "pairs": ("synpo.pairs.command", "make judged preference pairs from videos, or check files of pairs"),
    "train": ("synpo.train.command", "train a model on preference pairs"),
    "caption": ("synpo.caption.command", "write captions of videos, by contrastive decoding"),
    "env": ("synpo.environment", "print versions, devices and which kernels run"),
    "evaluate": ("synpo.evaluate.command", "captions against references, alone or two sets compared"),
    "report": ("synpo.report", "show runs: a page, and their curves"),
    "demo": ("synpo.miniature.demo", "the whole method in minutes, on a small world whose truth is known"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.

    An error is one line on stderr; --debug, before the subcommand or after it, adds the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _run(words)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("synpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            logging.getLogger(__name__).exception("synpo failed")
        text = " ".join(str(error).split()) or type(error).__name__
        command = f" {words[0]}" if words and words[0] in COMMANDS else ""
        print(f"synpo{command}: {text}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | TypeError | FileNotFoundError) else 1


def _run(words: Sequence[str]) -> int:
    parser = _Parser(prog="synpo", description="SynPO preference training.")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    rooms = {}
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name in words[:1]:
            rooms[name] = importlib.import_module(module)
            rooms[name].add_arguments(command)
            flags = command._option_string_actions
    args, unknown = parser.parse_known_args(words)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise ValueError(f"there is no option {unknown[0]!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    return int(rooms[args.command].main(args))


if __name__ == "__main__":
    sys.exit(main())
