"""Can the embedding see a better rationale? Force known ones into the untrained policy and look.

Reinforcement learning can only improve what the reader can tell apart. If the perfect rationale
does not score far above filler here, no reward will find it: choose another reader first
(`grace-rl check RECIPE --oracle`).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from grace_rl.data import scenes
from grace_rl.data.rows import read_rows
from grace_rl.data.scenes.rationales import RationaleForm
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.similarity import retrieval_scores
from grace_rl.errors import UserError
from grace_rl.evaluate.untrained import untrained_encoder
from grace_rl.run.screen import Screen

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

ROWS = 200
READERS = {
    "context": ReaderConfig(span="context", layers=(-1,)),
    "rationale": ReaderConfig(span="rationale", layers=(-1,)),
    "bottleneck": ReaderConfig(span="bottleneck"),
    "joint": ReaderConfig(span="joint"),
}
# Name of the rationale -> one per text: queries, then positives, then negatives.
Forced = dict[str, list[str]]


def print_oracle_table(recipe: Recipe, console: Console | None = None) -> None:
    """Print recall@1 and triplet accuracy of every reader under every forced rationale."""
    scores = oracle_scores(recipe)
    readers = list(next(iter(scores.values())))
    table = Table(title="Forced rationales: recall@1 / triplet accuracy", title_justify="left")
    table.add_column("forced rationale")
    for reader in readers:
        table.add_column(reader, justify="right")
    for name, by_reader in scores.items():
        cells = [
            f"{s['recall_at_1']:.3f} / {s['triplet_accuracy']:.3f}" for s in by_reader.values()
        ]
        table.add_row(name, *cells)
    (console or Screen()).print(table)


def oracle_scores(recipe: Recipe) -> dict[str, dict[str, dict[str, float]]]:
    """`{forced rationale: {reader: {"recall_at_1", "triplet_accuracy"}}}`.

    All readers centre on the corpus.

    Raises:
        UserError: The recipe's data gives no reference rationales.
    """
    if recipe.data.dataset_name == "scenes":
        split: Any = recipe.data.train_split  # for scenes, the recipe was checked to name its split
        if split == "train":
            split = "test"
        rows = scenes.rows(split=split, form="triplet", count=ROWS)
        forced = _scene_rationales(rows)
    else:
        rows, forced = _row_rationales(read_rows(recipe.data))
    readers = dict(READERS)
    own = recipe.training.get("reader", ReaderConfig())
    if own.reads_with_language_model and own not in readers.values():
        readers["recipe's reader"] = own
    with tempfile.TemporaryDirectory() as scratch:
        policy = untrained_encoder(recipe, Path(scratch), READERS["bottleneck"])
    texts = _texts(rows)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, rationales in forced.items():
        written = policy.written(rationales, texts)
        scores[name] = {}
        for reader_name, config in readers.items():
            reader = Reader(config, policy.tokenizer, policy.end_ids, policy.model)
            raw = reader.read(written)
            vectors = reader.finish(raw, reader.mean(raw))
            scores[name][reader_name] = retrieval_scores(*vectors.chunk(3))
    return scores


def _texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        row[role] if role != "negative" else row[role][0]
        for role in ("query", "positive", "negative")
        for row in rows
    ]


def _scene_rationales(rows: Sequence[dict[str, Any]]) -> Forced:
    rng = random.Random(0)
    truth = [row["scene"] for row in rows] * 2 + [row["negative_scene"] for row in rows]
    names: dict[str, RationaleForm] = {
        "all facts, canonical, fixed order": "canonical",
        "all facts, random order": "random_order",
        "half of the facts": "half",
        "filler only": "filler",
    }
    return {
        name: [scenes.reference_rationale(scene, form=form, rng=rng) for scene in truth]
        for name, form in names.items()
    }


def _row_rationales(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Forced]:
    """Rows that have a negative and a rationale for each text.

    The fields are `rationale`, `positive_rationale` and `negative_rationale`.
    """
    fields = ("rationale", "positive_rationale", "negative_rationale")
    usable = [
        row for row in rows if row.get("negative") and all(row.get(field) for field in fields)
    ][:ROWS]
    if len(usable) < 2:
        raise UserError(
            "--oracle needs reference rationales: at least two rows with a negative and the fields "
            f"{', '.join(fields)} (or dataset_name: scenes)"
        )
    rng = random.Random(0)
    reference = [_first(row[field]) for field in fields for row in usable]

    def words(change: Callable[[list[str]], list[str]]) -> list[str]:
        return [" ".join(change(rationale.split())) for rationale in reference]

    return usable, {
        "reference": reference,
        "reference, words shuffled": words(lambda w: rng.sample(w, len(w))),
        "first half of the reference": words(lambda w: w[: max(1, len(w) // 2)]),
        "another row's reference": reference[1:] + reference[:1],
    }


def _first(value: str | list[str]) -> str:
    return value if isinstance(value, str) else value[0]


__all__ = ["oracle_scores", "print_oracle_table"]
