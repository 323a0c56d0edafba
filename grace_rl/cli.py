"""The command line: parse, call, print. Torch is imported by what is called, never here.

Each verb is a module of `grace_rl.commands` with

    HELP                one line for `grace-rl --help`
    RECIPE_OVERRIDES    whether it takes the keys of a recipe as options
    add_arguments(parser)
    run(options, overrides) -> exit code

Exit codes: 0 done; 2 a mistake of the user's, explained on stderr; 75 the vLLM server was lost, 130
interrupted, both saved and to be resumed with the same command.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from grace_rl import __version__
from grace_rl.errors import UserError

COMMANDS = (
    "train",
    "check",
    "serve",
    "rewards",
    "replay",
    "curate",
    "embed",
    "centre",
    "evaluate",
    "compare",
    "inspect",
)
DISK = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS)  # not ours to mend
USER_ERROR = 2
INTERRUPTED = 130

OVERRIDES = """\
overrides:
  Any key of the recipe can be given as --key value or --key=value, also one that the file does not
  have: --learning_rate 2e-4 --use_vllm true. Dots go deeper: --reader.span context,
  --rewards.contrastive.temperature 0.05, --roles '{query: {}, positive: {}}'.
  The keys are those of docs/recipes.md, every field of the method's config (TRL's GRPOConfig for
  grpo, SFTConfig for sft) and of TRL's ModelConfig. A wrong key is answered with the nearest right
  one.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # vLLM's own log begins when TRL imports it, whether or not it is used; errors still show.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    commands = {name: import_module(f"grace_rl.commands.{name}") for name in COMMANDS}
    parsers = _parsers(commands)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--local_rank="):
        del given[0]  # deepspeed's launcher puts it there; LOCAL_RANK says the same
    options, rest = parsers[""].parse_known_args(given)
    command = commands[options.command]
    if rest and not command.RECIPE_OVERRIDES:
        _refuse(parsers[options.command], rest)
    try:
        return int(command.run(options, rest))
    except UserError as error:
        # One write: several processes may end with the same mistake at the same time.
        sys.stderr.write("".join(f"{problem}\n" for problem in error.problems))
        return USER_ERROR
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"{error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parsers(commands: dict[str, Any]) -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its name, and the one over them all as ""."""
    whole = argparse.ArgumentParser(
        prog="grace-rl",
        description="Reinforcement learning for text embeddings "
        "that come with a written rationale.",
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"grace-rl {__version__}")
    verbs = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {"": whole}
    for name, command in commands.items():
        parsers[name] = verbs.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=OVERRIDES if command.RECIPE_OVERRIDES else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parsers[name])
    return parsers


def _refuse(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Name the first argument that nothing takes, and the nearest option."""
    given = rest[0].partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    advice = f"; did you mean {close[0]}?" if close else ""
    parser.error(f"unknown argument {rest[0]}{advice}")
