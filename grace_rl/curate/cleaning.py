"""From what a model wrote to a sentence, or the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence

QUOTES = "\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb"
LABEL = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok)[,!.:]?\s+)?"
    r"(?:(?:here(?:'s| is| are)\b[^:]{0,60}|(?:the |a )?(?:new |rewritten |revised )?"
    r"(?:sentence|answer|output|paraphrase|response|contradiction|entailment)(?: \d)?)\s*:\s*)",
    re.IGNORECASE,
)
BULLET = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,2}[.)])\s+")
NOTE = re.compile(r"\s*[(\[]?\s*(?:note|explanation|reason(?:ing)?)\s*:.*$", re.IGNORECASE)
REFUSAL = re.compile(
    r"^(?:i(?:'m| am) sorry|sorry,|i apologi[sz]e|as an? (?:ai|language model|assistant)|"
    r"i (?:can(?:not|'t)|am unable|am not able|won't)\b.{0,40}"
    r"\b(?:help|assist|provide|create|generate|write|rewrite|comply|fulfill|do that)|"
    r"please provide|it is not possible to)",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W_]+(?:'\w+)?")


def stripped(written: str) -> str:
    """The first line, without bullets, labels, quotes around it, and notes after it.

    >>> stripped('Sure! Here is a paraphrase: "The dog sleeps." (Note: shorter)')
    'The dog sleeps.'
    >>> stripped("1. 'Tis over.")
    "'Tis over."
    """
    lines = [line.strip() for line in written.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    text = lines[0]
    if len(lines) > 1 and LABEL.fullmatch(text + " "):
        text = lines[1]  # the label had a line of its own
    text = LABEL.sub("", BULLET.sub("", text))
    text = NOTE.sub("", text).strip()
    while len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return WORD.findall(text.lower())


def overlap(first: str, second: str) -> float:
    """Jaccard overlap of two texts' words, in [0, 1].

    >>> overlap("A dog sleeps.", "a dog runs")
    0.5
    """
    one, two = set(words(first)), set(words(second))
    return len(one & two) / len(one | two) if one | two else 1.0


def reason_to_drop(
    candidate: str,
    text: str,
    side: str,
    kept: list[str],
    length_ratio: Sequence[float],
    max_overlap: float,
) -> str | None:
    """Why a stripped candidate cannot be used; None if it can.

    `empty`, `refusal`, `copy` (of the text: the same words in the same order, on the positive side
    also nearly the same words), `length` (in words, over the text's), `duplicate` (of a kept
    candidate of its side, nearly).

    Args:
        candidate: A stripped candidate.
        text: What it was written for.
        side: `positive` or `negative`.
        kept: The candidates of the side so far.
        length_ratio, max_overlap: See `grace_rl.recipe.curation.GenerateStep`.
    """
    own, given = words(candidate), words(text)
    if not own:
        return "empty"
    if REFUSAL.match(candidate):
        return "refusal"
    if own == given or (side == "positive" and overlap(candidate, text) > max_overlap):
        return "copy"
    if not length_ratio[0] <= len(own) / max(len(given), 1) <= length_ratio[1]:
        return "length"
    if any(own == words(other) or overlap(candidate, other) > max_overlap for other in kept):
        return "duplicate"
    return None
