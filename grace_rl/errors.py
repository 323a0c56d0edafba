"""The one exception a user's mistake becomes, a mistake of ours, and how others are told."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class UserError(ValueError):
    """One or more mistakes in what the user gave, each a sentence that says what to do.

    The command line prints the problems to stderr and exits with code 2.

    >>> from grace_rl.errors import UserError
    >>> str(UserError(["a.yaml: 'lerning_rate' is unknown; did you mean 'learning_rate'?"]))
    "a.yaml: 'lerning_rate' is unknown; did you mean 'learning_rate'?"
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def missing(what: object) -> str:
    """What to say where a path of the user's leads to nothing, such as `missing("file a.csv")`."""
    return f"there is no {what}; paths start at the working directory {Path.cwd()}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind, where it says nothing.

    >>> first_line(OSError("no room\\nat all")), first_line(EOFError())
    ('no room', 'EOFError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at before a run, or of a reward.

    Attributes:
        name: What was looked at; a recipe's key where that is what to change.
        message: What was found.
        level: `ok`; `warning`, a run would go on but something is odd; `problem`, it would end.
        advice: What to do, the most useful first.
        estimate: Whether it is reckoned or of this moment, so that a run may try nevertheless.
    """

    name: str
    message: str
    level: Literal["ok", "warning", "problem"] = "ok"
    advice: list[str] = field(default_factory=list)
    estimate: bool = False


@contextmanager
def reading(path: str | Path, part: str) -> Iterator[None]:
    """Inside, whatever is raised says that this part of a model cannot be read.

    Raises:
        UserError: In place of any other exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the parsers of damaged files raise anything
        raise UserError(f"{path}: cannot read {part}: {first_line(error)}") from error


class Crash(Exception):
    """A bug of ours while a run was open; raised `from` what happened.

    Args:
        folder: The run directory, where the traceback goes.
        saved: What the run has saved and how to go on, a sentence without its full stop.
    """

    def __init__(self, folder: Path, saved: str) -> None:
        self.folder = folder
        self.saved = saved
        super().__init__(f"{folder}: {saved}")


def describe_error(error: BaseException, source: str | None = None) -> str:
    """`ValueError: why (file.py:12)`, with the deepest line inside `source` where there is one.

    For exceptions of other people's code, which may be unable to say anything.
    """
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{kind}: {error.msg} ({error.filename}:{error.lineno})"
    try:
        text = f"{kind}: {error}"
    except BaseException as second:
        text = f"{kind} (its message fails with {type(second).__name__})"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if source is not None and frame.filename == source]
    if inside or (frames and source is None):
        frame = (inside or frames)[-1]
        return f"{text} ({frame.filename}:{frame.lineno})"
    return f"{text} ({source})" if source else text
