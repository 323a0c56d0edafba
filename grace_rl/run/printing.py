"""The one door to the terminal: whatever comes from a file, a model or a plugin is shown harmless.

Control characters (they can rewrite what is on the screen, or its title) and direction marks are
replaced, secrets masked, and what the terminal's encoding does not have is replaced too.

Cheap to import; `grace_rl.run.screen` is the same door for tables and bars.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from grace_rl.run.secrets import masked_text


def safe(text: str) -> str:
    """A text without control and direction characters; lines and tabs stay.

    >>> safe("red \\x1b[31m, bell \\a, reversed \\u202e")
    'red �[31m, bell �, reversed �'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _stand_in(c) for c in text)


def shown(text: str) -> str:
    """`safe` and without secrets."""
    return safe(masked_text(text))


def say(text: object, *, error: bool = False) -> None:
    """Print a line to stdout, or to stderr, in one write: several processes may speak at once."""
    stream = sys.stderr if error else sys.stdout
    try:
        stream.write(shown(str(text)) + "\n")
        stream.flush()
    except BrokenPipeError:
        nobody_reads(stream)


def nobody_reads(stream: TextIO) -> None:
    """Whoever read this stream has seen enough (`| head`): the work goes on, unread."""
    with contextlib.suppress(OSError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def forgive_encoding() -> None:
    """Have stdout and stderr replace what their encoding does not have, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


def _stand_in(character: str) -> str:
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
