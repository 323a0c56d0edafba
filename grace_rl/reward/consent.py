"""Whose word it takes to run code: a run names rewards, but only the user makes them run.

A run directory is data, and may come from anybody. What its recipe names is therefore neither
imported nor built, with one exception: rewards that are installed under the entry-point group, by
their plain names. Everything else (a file, `package.module:Name`, an address to ask) needs the
user's word: the file that names it, given on the command line, even if it is the run's own recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.plugins import REWARDS, installed
from grace_rl.recipe import RewardSpec, read_rewards

RECIPE = "recipe.yaml"
_CODE_OR_ADDRESS = re.compile(r"\.py\b|[\w)]:[A-Za-z_]|://|^[\w.-]+:\d+")


def run_rewards(run: str | Path) -> list[RewardSpec]:
    """The rewards that a run names, if installed ones alone are meant.

    Raises:
        UserError: There are none, or the user's word is needed.
    """
    path = Path(run) / RECIPE
    specs = read_rewards(path)
    known = installed(REWARDS)
    needed = [
        text
        for spec in specs
        for text in (spec.name, *_strings(spec.keywords))
        if text not in known and (text is spec.name or _CODE_OR_ADDRESS.search(text))
    ]
    if needed:
        raise UserError(
            f"{path}: names {', '.join(map(repr, dict.fromkeys(needed)))}, which a run may not "
            f"start by itself; look at it, and if you trust it: --rewards {path}"
        )
    return specs


def _strings(value: Any) -> Iterator[str]:
    """Every string in a tree."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
