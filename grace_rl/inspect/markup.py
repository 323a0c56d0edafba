"""Rationales and tables as HTML: everything that somebody or some model wrote is shown as text.

Foreign text passes `text`, which escapes it and makes control and direction characters visible, so
that it can neither act nor hide. The page and the file of `--html` are built from these parts.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

LOOK = (Path(__file__).parent / "look.css").read_text(encoding="utf-8")
LONGEST = 4000  # characters of a text in a table
SHORT = 20  # characters that are kept on one line

Cell = Callable[[Any, Mapping[str, Any]], str]
"""Makes a cell's HTML from the value and its row."""


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
    made = "".join(map(_visible, foreign))
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


def plain(foreign: Any) -> str:
    """A foreign name as HTML, also inside attributes."""
    return escape(visible(str(foreign)))


def text(foreign: Any, limit: int | None = LONGEST) -> str:
    """HTML that shows foreign text, in the direction of its own first letter."""
    shown = escape(visible(str(foreign), limit))
    return f'<bdi class="foreign">{shown}</bdi>'


def number(value: Any) -> str:
    """A short number; a dash for nothing.

    >>> number(0.12345), number(None), number(3)
    ('0.123', '–', '3')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        value += 0.0  # no -0.000
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return number(value.item()) if hasattr(value, "item") else text(value)


def table(
    rows: pd.DataFrame | Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    cells: Mapping[str, Cell] | None = None,
    caption: str = "",
) -> str:
    """An HTML table; on narrow screens each row becomes a card.

    Args:
        rows: The rows.
        columns: Name of a column in `rows`, and its heading.
        cells: How to show a column; the default is `number` for numbers and `text` for the rest.
        caption: Read out by screen readers.
    """
    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else list(rows)
    cells = cells or {}
    head = "".join(f'<th scope="col">{plain(name)}</th>' for name in columns.values())
    lines = []
    for record in records:
        made = []
        for name, heading in columns.items():
            value = record.get(name)
            is_text = isinstance(value, str)
            shown = cells[name](value, record) if name in cells else number(value)
            kind = "words" if is_text else "number"
            if is_text and len(value) <= SHORT:
                kind = "short"
            made.append(f'<td class="{kind}" data-label="{plain(heading)}">{shown}</td>')
        lines.append(f"<tr>{''.join(made)}</tr>")
    if not lines:
        return '<p class="quiet">nothing to show</p>'
    return (
        f'<table class="plain"><caption class="unseen">{plain(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def link(address: str, shown: str) -> str:
    """A link; `shown` is HTML already."""
    return f'<a href="{escape(address)}">{shown}</a>'


def tokens(pieces: Sequence[str], advantages: Sequence[float] | float | None) -> str:
    """A rationale with its tokens on a ground of green (advantage above 0) or red (below).

    Args:
        pieces: What each token wrote.
        advantages: One per token, one for all, or None for anchors.
    """
    if advantages is None or isinstance(advantages, (int, float)):
        advantages = [math.nan if advantages is None else float(advantages)] * len(pieces)
    made = []
    for piece, advantage in zip(pieces, advantages, strict=True):
        shown = escape(visible(piece)) or "∅"
        if math.isnan(advantage):
            made.append(f'<span title="no advantage">{shown}</span>')
            continue
        sign = "up" if advantage >= 0 else "down"
        strength = min(5, math.ceil(abs(advantage) * 2.5))
        made.append(
            f'<span class="{sign}{strength}" title="advantage {advantage:+.3f}">{shown}</span>'
        )
    return f'<p class="tokens"><bdi>{"".join(made)}</bdi></p>'


def differences(before: str, after: str) -> str:
    """`after` with the words that are new marked, and those that went.

    >>> differences("red fox runs", "red fox sleeps")
    '<bdi class="foreign">red fox <del>runs</del><ins>sleeps</ins></bdi>'
    """
    old, new = (re.findall(r"\s+|\S+", visible(item, LONGEST)) for item in (before, after))
    made = []
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        gone, come = escape("".join(old[a1:a2])), escape("".join(new[b1:b2]))
        if kind == "equal":
            made.append(come)
            continue
        made.append((f"<del>{gone}</del>" if gone else "") + (f"<ins>{come}</ins>" if come else ""))
    return f'<bdi class="foreign">{"".join(made)}</bdi>'


def mistakes(problems: Sequence[str]) -> str:
    """What is wrong, as HTML that screen readers say at once; nothing for no problems."""
    if not problems:
        return ""
    lines = "".join(f"<li>{plain(problem)}</li>" for problem in problems)
    return f'<ul class="mistake" role="alert">{lines}</ul>'


def facts(values: Mapping[str, str]) -> str:
    """A few names and their values, as HTML; values are HTML already."""
    items = "".join(f"<div><dt>{plain(k)}</dt><dd>{v}</dd></div>" for k, v in values.items())
    return f'<dl class="facts">{items}</dl>'
