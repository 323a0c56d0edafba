"""From rows to cleaned candidates of both sides, and from candidates to rated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grace_rl.curate.cleaning import reason_to_drop, stripped
from grace_rl.curate.judges import Judge, checked
from grace_rl.curate.models import Candidate, LanguageModel
from grace_rl.curate.prompts import SIDES, Side, SidePrompts
from grace_rl.recipe.curation import GenerateStep

Row = dict[str, Any]
KEPT_APART = ("id", "text", "query", "positive", "negative", "negative_positive")


def write_candidates(
    rows: Sequence[Row],
    model: LanguageModel,
    prompts: SidePrompts,
    step: GenerateStep,
    seed: int = 0,
) -> list[Row]:
    """Cleaned candidates of both sides for some rows, all prompts in one call.

    Args:
        rows: With `id` and `text` (or `query`).
        model: The language model.
        prompts: What it is asked.
        step: How.
        seed: Of the samples.

    Returns:
        `{id, query, positives, negatives, dropped, columns}`; a candidate is `{text, prompt}` with
        the number of its instruction, and `dropped` counts the reasons of those that are gone.
    """
    texts = [row.get("text") or row["query"] for row in rows]
    numbers = [prompts.number(text) for text in texts]
    described = dict.fromkeys(SIDES, texts)
    if step.opposite_column is not None:
        described["negative"] = [first_text(row[step.opposite_column]) for row in rows]
    positive, negative = (
        [prompts.tokens(t, side, n) for t, n in zip(described[side], numbers, strict=True)]
        for side in SIDES
    )
    written = model.write(positive + negative, step, seed, negative + positive)
    made = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        dropped: dict[str, int] = {}
        kept = {
            side: _cleaned(candidates, text, side, step, dropped)
            for side, candidates in zip(SIDES, (written[i], written[len(rows) + i]), strict=True)
        }
        sides = {
            f"{side}s": [{"text": one, "prompt": numbers[i]} for one in kept[side]]
            for side in SIDES
        }
        made.append(_made(row, text, dropped, **sides))
    return made


def _cleaned(
    candidates: Sequence[Candidate],
    text: str,
    side: Side,
    step: GenerateStep,
    dropped: dict[str, int],
) -> list[str]:
    """The sentences of one side; the reasons of what is gone are counted in `dropped`."""
    kept: list[str] = []
    for candidate in candidates:
        sentence = stripped(candidate.text)
        reason: str | None = "cut off"
        if candidate.ended:
            reason = reason_to_drop(sentence, text, side, kept, step.length_ratio, step.max_overlap)
        if reason is None:
            kept.append(sentence)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    return kept


def rate_candidates(rows: Sequence[Row], judge: Judge, name: str) -> list[Row]:
    """The rows with `score` and `greedy` in every candidate, all pairs in one call.

    Args:
        rows: `{query, positives, negatives, ...}`.
        judge: See `grace_rl.curate.judges`.
        name: Of the judge, for messages.

    Raises:
        UserError: The judge's ratings are not ratings.
    """
    candidates = [
        (row["query"], candidate)
        for row in rows
        for side in ("positives", "negatives")
        for candidate in row[side]
    ]
    pairs = [(query, candidate["text"]) for query, candidate in candidates]
    ratings = iter(checked(judge(pairs) if pairs else [], len(pairs), name))
    rated = []
    for row in rows:
        sides = {
            side: [candidate | next(ratings)._asdict() for candidate in row[side]]
            for side in ("positives", "negatives")
        }
        rated.append(row | sides)
    return rated


def given_candidates(row: Row) -> Row:
    """A triplet as if it had been generated."""
    positives, negatives = [row["positive"]], row["negative"]
    return _made(
        row,
        row["query"],
        {},
        positives=[{"text": text} for text in positives],
        negatives=[{"text": text} for text in negatives],
    )


def _made(row: Row, query: str, dropped: dict[str, int], **sides: list[Row]) -> Row:
    columns = {name: value for name, value in row.items() if name not in KEPT_APART}
    return {"id": row["id"], "query": query, **sides, "dropped": dropped, "columns": columns}


def first_text(value: Any) -> str:
    """A text, or the first of a list of texts; empty where there is none."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""
