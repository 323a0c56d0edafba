"""Which triplets stay: MultiCSR's self-curation (arXiv 2310.10962, stage 2).

With several candidates on a side, the pair with the largest gap is taken: the positive that rates
highest, and the negative that rates lowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from grace_rl.recipe.curation import FilterStep

PUBLISHED_CEILING = 4.0  # the released code takes no text that rates higher for a negative


@dataclass(frozen=True)
class Choice:
    """What becomes of one rated row.

    Attributes:
        positive, negative: The chosen candidates, `{text, score, ...}`; None where there is none.
        swapped: They changed roles.
        reason: Why the row is dropped; None keeps it.
    """

    positive: Mapping[str, Any] | None
    negative: Mapping[str, Any] | None
    swapped: bool = False
    reason: str | None = None


def choose(row: Mapping[str, Any], step: FilterStep) -> Choice:
    """Take the best pair of a rated row, and keep or drop it.

    Args:
        row: `positives` and `negatives`, each a list of `{text, score}`.
        step: Thresholds and rule.

    >>> row = {"positives": [{"text": "p", "score": 2.0}],
    ...        "negatives": [{"text": "n", "score": 4.5}]}
    >>> chosen = choose(row, FilterStep(alpha=3, beta=3, gamma=1))
    >>> chosen.positive["text"], chosen.swapped, chosen.reason
    ('n', True, None)
    """
    positives, negatives = (
        [c for c in row[side] if not math.isnan(c["score"])] for side in ("positives", "negatives")
    )
    if not positives or not negatives:
        side = "negative" if positives else "positive"
        return Choice(None, None, reason=f"no {side}" if not row[f"{side}s"] else "not rated")
    positive = max(positives, key=lambda c: c["score"])
    negative = min(negatives, key=lambda c: c["score"])
    if step.rule == "published-code":
        return _published(positive, negative, step)
    swapped = negative["score"] > positive["score"]
    if swapped:
        if not step.swap:
            return Choice(positive, negative, reason="negative rates higher")
        positive = max(negatives, key=lambda c: c["score"])
        negative = min(positives, key=lambda c: c["score"])
    a, b = positive["score"], negative["score"]
    gap = None if is_gap(a, b, step.gamma) else "gap below gamma"
    return Choice(positive, negative, swapped, _outside(a, b, step) or gap)


def is_gap(a: float, b: float, gamma: float) -> bool:
    """Whether a >= b + gamma for the numbers as they are written, not as their bits add up.

    >>> 1.4 - 0.4 >= 1, is_gap(1.4, 0.4, 1.0)
    (False, True)
    """
    return Decimal(repr(float(a))) >= Decimal(repr(float(b))) + Decimal(repr(float(gamma)))


def _outside(a: float, b: float, step: FilterStep) -> str | None:
    """The line that a pair of ratings is on the wrong side of; None if there is none."""
    if a < step.alpha:
        return "positive below alpha"
    return "negative above beta" if b > step.beta else None


def _published(
    positive: Mapping[str, Any], negative: Mapping[str, Any], step: FilterStep
) -> Choice:
    """The released code: ratings to one decimal, roles by rating, then the two lines and a != b."""
    a, b = round(positive["score"], 1), round(negative["score"], 1)
    swapped = False
    if not (b <= PUBLISHED_CEILING and a >= b):
        if not (a <= PUBLISHED_CEILING and a <= b):
            return Choice(positive, negative, reason="both above 4.0")
        positive, negative, swapped, a, b = negative, positive, True, b, a
    equal = "equal ratings" if a == b else None
    return Choice(positive, negative, swapped, _outside(a, b, step) or equal)
