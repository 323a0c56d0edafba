"""What the page and the file of `--html` share: templates, and foreign text made visible.

Everything that somebody or some model wrote is shown as text. Templates escape by themselves, and
each value passes `visible` on its way, so that it can neither act nor hide.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LOOK = (Path(__file__).parent / "look.css").read_text(encoding="utf-8")
LONGEST = 4000  # characters of a text

Pieces = list[tuple[str, str, str]]
"""Parts of a text in their order: a class of look.css (or ""), a title (or ""), the part."""


def visible(foreign: str, limit: int | None = None) -> str:
    """Foreign text with every character visible: controls as pictures, direction marks as codes.

    >>> visible("a\\x1b[0m\\u202eb\\tc")
    'a␛[0m‹U+202E›b c'

    Args:
        foreign: Any text.
        limit: Longest answer, about; the rest is said to be left out.
    """
    left_out = 0
    if limit is not None and len(foreign) > limit:
        left_out, foreign = len(foreign) - limit, foreign[:limit]
    made = foreign if foreign.isprintable() else "".join(map(_visible, foreign))
    return made + (f" … ({left_out} characters more)" if left_out else "")


def _visible(c: str) -> str:
    if c in " \n" or c.isprintable():
        return c
    number = ord(c)
    if c.isspace():
        return " "
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    if unicodedata.category(c) == "Cf" and number in (0x200C, 0x200D, 0x00AD):
        return c  # joiners and soft hyphens are part of words
    return f"‹U+{number:04X}›"


def number(value: Any) -> str:
    """A short number; a dash for nothing.

    >>> number(0.12345), number(None), number(3)
    ('0.123', '–', '3')
    """
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value += 0.0  # no -0.000
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return number(value.item()) if hasattr(value, "item") else str(value)


def _shown(value: Any) -> Any:
    """What a template prints of a value, before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(value if isinstance(value, str) else number(value), LONGEST)


TEMPLATES = Environment(
    loader=PackageLoader("grace_rl.inspect"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["cut"] = visible
TEMPLATES.tests["words"] = lambda value: isinstance(value, str)
TEMPLATES.tests["pieces"] = lambda value: isinstance(value, list)


def address(path: str, /, **query: Any) -> str:
    """A link within the page; empty parameters are left out.

    >>> address("/try", text="a fox", a=None)
    '/try?text=a+fox'
    """
    made = urlencode({name: value for name, value in query.items() if value not in (None, "")})
    return f"{path}?{made}" if made else path


def _lead(link: Any, row: Mapping[str, Any]) -> str:
    """Where a cell leads: what a function says, or a path and the values of the row that it takes,
    as in `{"path": "/group", "run": "first", "of": {"step": "step"}}` (the name there, the name in
    the row); "" where one is None."""
    if callable(link):
        return str(link(row))
    values = {name: row[column] for name, column in link["of"].items()}
    if None in values.values():
        return ""
    return address(link["path"], run=link["run"], **values)


TEMPLATES.globals |= {"address": address, "lead": _lead}


def render(template: str, **context: Any) -> str:
    """HTML of a template in `templates/`."""
    return TEMPLATES.get_template(f"{template}.html.jinja").render(context)


def shaded(pieces: Sequence[str], advantages: Sequence[float] | float | None) -> Pieces:
    """The tokens of a rationale on a ground of green (advantage above 0) or red (below).

    Args:
        pieces: What each token wrote.
        advantages: One per token, one for all, or None for anchors.
    """
    if advantages is None or isinstance(advantages, (int, float)):
        advantages = [math.nan if advantages is None else float(advantages)] * len(pieces)
    made = []
    for piece, advantage in zip(pieces, advantages, strict=True):
        if math.isnan(advantage):
            made.append(("", "no advantage", piece))
            continue
        sign = "up" if advantage >= 0 else "down"
        strength = min(5, math.ceil(abs(advantage) * 2.5))
        made.append((f"{sign}{strength}", f"advantage {advantage:+.3f}", piece))
    return made


def earned(rationale: str, words: Sequence[Mapping[str, Any]], largest: float) -> Pieces:
    """The words of a rationale on a ground of green (earned something) or red (cost something).

    Args:
        rationale: The whole.
        words: One for each of its words, in their order: `word`, `credit`, what else is told on
            hover, and maybe `only`, whether no sibling has it.
        largest: The credit of the deepest colour.
    """
    made: Pieces = []
    for piece, about in zip(re.findall(r"\s*\S+", rationale), words, strict=False):
        word = piece.lstrip()
        facts = {name: value for name, value in about.items() if isinstance(value, float)}
        told = ", ".join(f"{name} {value:+.3f}" for name, value in facts.items() if value == value)
        credit = about["credit"] if about["credit"] == about["credit"] else 0.0
        strength = min(5, math.ceil(5 * abs(credit) / max(largest, 1e-9)))
        looks = [f"{'up' if credit > 0 else 'down'}{strength}"] if strength else []
        if about.get("only"):
            looks.append("only")
            told += "; no sibling has it"
        made += [("", "", piece[: len(piece) - len(word)]), (" ".join(looks), told, word)]
    return made


def differences(before: str | None, after: str) -> Pieces:
    """`after` with the words that are new marked, and those that went; all alike without `before`.

    >>> differences("red fox runs", "red fox sleeps")
    [('', '', 'red fox '), ('gone', '', 'runs'), ('new', '', 'sleeps')]
    """
    if before is None:
        return [("", "", after)]
    old, new = (re.findall(r"\s+|\S+", item[:LONGEST]) for item in (before, after))
    made = []
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        gone, come = "".join(old[a1:a2]), "".join(new[b1:b2])
        parts = [("", come)] if kind == "equal" else [("gone", gone), ("new", come)]
        made += [(name, "", part) for name, part in parts if part]
    return made
