"""The command line: parse, call, print. Torch is imported by what is called, never here.

Each verb is a module of `grace_rl.commands` with

    HELP                one line for `grace-rl --help`
    RECIPE_OVERRIDES    whether it takes the keys of a recipe as options
    add_arguments(parser)
    run(options, overrides) -> exit code

Exit codes: 0 done; 1 a bug of ours, with its traceback in a file; 2 a mistake of the user's,
explained on stderr; 75 the vLLM server was lost, 130 interrupted by Ctrl-C or SIGTERM, both saved
and to be resumed with the same command.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from grace_rl import __version__
from grace_rl.errors import Crash, UserError
from grace_rl.run.printing import forgive_encoding, nobody_reads, say, shown
from grace_rl.run.secrets import masked_text

COMMANDS = (
    "new",
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
    "push",
    "env",
)
DISK = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS)  # not ours to mend
PLACE = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)  # an output where something else lies
BUG = 1
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
    forgive_encoding()
    # vLLM's own log begins when TRL imports it, whether or not it is used; errors still show.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    commands = {name: import_module(f"grace_rl.commands.{name}") for name in COMMANDS}
    parsers = _parsers(commands)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--local_rank="):
        del given[0]  # deepspeed's launcher puts it there; LOCAL_RANK says the same
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        close = difflib.get_close_matches(given[0], COMMANDS, n=1, cutoff=0.6)
        advice = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(COMMANDS)}"
        parsers[""].error(shown(f"no command {given[0]!r}{advice}"))
    options, rest = parsers[""].parse_known_args(given)
    command = commands[options.command]
    if rest and not command.RECIPE_OVERRIDES:
        _refuse(parsers[options.command], rest)
    try:
        with _sigterm_like_ctrl_c():
            return _run(command, options, rest)
    except KeyboardInterrupt:  # while it was told what had happened
        return INTERRUPTED


def _run(command: Any, options: argparse.Namespace, rest: list[str]) -> int:
    """The exit code, whatever happens."""
    try:
        return int(command.run(options, rest))
    except UserError as error:
        say("\n".join(error.problems), error=True)
        return USER_ERROR
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return INTERRUPTED
    except Exception as error:
        cause = error.__cause__ if isinstance(error, Crash) and error.__cause__ else error
        if isinstance(cause, BrokenPipeError):  # of what others print
            nobody_reads(sys.stdout)
            nobody_reads(sys.stderr)
            return INTERRUPTED
        if isinstance(cause, OSError) and cause.errno in DISK + PLACE:
            say(f"{cause.filename or 'writing'}: {cause.strerror}", error=True)
            return USER_ERROR
        say(_report(error, cause), error=True)
        return BUG


def _report(error: Exception, cause: BaseException) -> str:
    """Write the traceback to a file, and say in one line where it is and what was saved."""
    folder = error.folder if isinstance(error, Crash) else Path(tempfile.gettempdir())
    saved = f" {error.saved}." if isinstance(error, Crash) else ""
    told = masked_text("".join(traceback.format_exception(cause)))
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for place in (folder, Path(tempfile.gettempdir())):
        try:
            (place / name).write_text(told, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        what = " ".join(str(cause).split())[:200]
        kind = type(cause).__name__
        return f"This is a bug in grace-rl ({kind}: {what}); please report {place / name}.{saved}"
    return told + saved


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM ends a command as Ctrl-C does, unless the command knows better."""
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parsers(commands: dict[str, Any]) -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its name, and the one over them all as ""."""
    whole = argparse.ArgumentParser(
        prog="grace-rl",
        description="Reinforcement learning for text embeddings "
        "that come with a written rationale.",
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"grace-rl {__version__}")
    whole.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_Completion,
        help="print a script for your shell, so that Tab completes verbs, options and files",
    )
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


class _Completion(argparse.Action):
    """Prints what completes the words of the command line, the keys of recipes among them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        import shtab

        from grace_rl.recipe.reference import SCHEMA_FILE

        keys = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["properties"]
        for one in _all_parsers(parser):
            if one.epilog == OVERRIDES:
                known = {option for action in one._actions for option in action.option_strings}
                for option in (f"--{key}" for key in keys):
                    if option not in known:
                        one.add_argument(option, help="a key of the recipe")
            for action in one._actions:
                if action.choices is None and action.nargs != 0:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        sys.stdout.write(shtab.complete(parser, values))
        parser.exit()


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its verbs, all the way down."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):  # of verbs
            for verb in action.choices.values():
                yield from _all_parsers(verb)


def _refuse(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Name the first argument that nothing takes, and the nearest option."""
    given = rest[0].partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    advice = f"; did you mean {close[0]}?" if close else ""
    parser.error(shown(f"unknown argument {rest[0]}{advice}"))
