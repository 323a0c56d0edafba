"""What would be written? A recipe's policy and prompts on its first rows, before any training."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.data.rows import stream_rows
from grace_rl.errors import UserError
from grace_rl.evaluate.untrained import untrained_encoder
from grace_rl.recipe.roles import unwritten_roles
from grace_rl.run.screen import Screen

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe


@dataclass(frozen=True)
class Sample:
    """One text of a row, and what is written for it.

    Attributes:
        role, text: Whose text it is.
        greedy: The most likely rationale.
        sampled: One at the recipe's temperature.
    """

    role: str
    text: str
    greedy: str
    sampled: str


def sample_rationales(recipe: Recipe, rows: int) -> list[Sample]:
    """Rationales for the texts of the first rows, in the prompts of their roles.

    Args:
        recipe: Of a method with roles (`grpo`, `ppo`).
        rows: How many rows, at least 1.

    Raises:
        UserError: The method writes nothing, or the policy cannot be loaded.
    """
    config = recipe.config
    roles = getattr(config, "roles", None)
    if roles is None:
        raise UserError(f"--sample: method {recipe.method} writes no rationales to look at")
    first: list[dict[str, Any]] = list(islice(stream_rows(recipe.data), rows))
    bundles = Bundles(first, parse_roles(roles, config.num_generations))
    texts = bundles.prompts + [text for own in bundles.anchors for text, _ in own]
    texts = [text for text in texts if text.role not in unwritten_roles(roles)]
    with tempfile.TemporaryDirectory() as scratch:
        encoder = untrained_encoder(recipe, Path(scratch))
    encoder.temperature, encoder.seed = config.temperature, config.seed
    written: dict[int, Sample] = {}
    for role in dict.fromkeys(text.role for text in texts):
        places = [i for i, text in enumerate(texts) if text.role == role]
        own = [texts[i].text for i in places]
        told = roles[role].instruction
        greedy = encoder.rationales(own, rationale="greedy", instruction=told)
        sampled = encoder.rationales(own, rationale="sample", instruction=told)
        for i, *both in zip(places, greedy, sampled, strict=True):
            written[i] = Sample(role, texts[i].text, *both)
    order = sorted(written, key=lambda i: (texts[i].example, i))
    return [written[i] for i in order]


def print_samples(recipe: Recipe, rows: int, console: Console | None = None) -> None:
    """Print `sample_rationales` as a table."""
    table = Table(title="Before training", title_justify="left", show_lines=True)
    for name in ("role", "text", "greedy", "sampled"):
        table.add_column(name, overflow="fold", no_wrap=name == "role")
    for one in sample_rationales(recipe, rows):
        table.add_row(*map(Text, (one.role, one.text, one.greedy, one.sampled)))
    (console or Screen()).print(table)
