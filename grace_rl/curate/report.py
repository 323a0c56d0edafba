"""What the filter did: shares, reasons, a picture of the ratings, samples, and warnings."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from grace_rl.curate.filtering import Choice
from grace_rl.data.scenes import read_facts
from grace_rl.recipe.curation import FilterStep

TEMPLATES = Environment(
    loader=PackageLoader("grace_rl.curate", "."), autoescape=True, undefined=StrictUndefined
)
CELLS, SAMPLES = 20, 20
FEW, MANY = 0.1, 0.9  # a share of kept rows outside these says that the thresholds do not fit


class Report:
    """Collects as rows go by.

    Args:
        step: The filter's lines, for the record and the picture.
    """

    def __init__(self, step: FilterStep) -> None:
        self.step = step
        self.rows = self.kept = self.swapped = 0
        self.reasons: Counter[str] = Counter()
        self.dropped_candidates: Counter[str] = Counter()
        self.histogram = [[0] * CELLS for _ in range(CELLS)]  # [negative's rating][positive's]
        self.samples: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        self._random = random.Random(0)
        self._seen: Counter[bool] = Counter()
        self._truth: dict[str, list[int]] = {}

    def add(self, row: Mapping[str, Any], choice: Choice) -> None:
        """Take note of one rated row and what became of it."""
        self.rows += 1
        kept = choice.reason is None
        self.kept += kept
        self.swapped += kept and choice.swapped
        self.dropped_candidates.update(row.get("dropped") or {})
        if choice.reason is not None:
            self.reasons[choice.reason] += 1
        if choice.positive is not None and choice.negative is not None:
            self.histogram[_cell(choice.negative["score"])][_cell(choice.positive["score"])] += 1
        self._sample(row, choice, kept)
        if "scene" in row["columns"]:
            self._compare_with_truth(row, choice, kept)

    def _sample(self, row: Mapping[str, Any], choice: Choice, kept: bool) -> None:
        """A fair sample of the kept rows and one of the dropped, ten each."""
        self._seen[kept] += 1
        samples, room = self.samples[kept], SAMPLES // 2
        place = len(samples) if len(samples) < room else self._random.randrange(self._seen[kept])
        if place >= room:
            return
        found = {
            "query": row["query"],
            "positive": choice.positive and dict(choice.positive),
            "negative": choice.negative and dict(choice.negative),
            "swapped": choice.swapped,
            "reason": choice.reason,
        }
        samples[place : place + 1] = [found]

    def _compare_with_truth(self, row: Mapping[str, Any], choice: Choice, kept: bool) -> None:
        """On scenes the world knows which texts are entailed, and which contradict."""
        scene = row["columns"]["scene"]

        def count(name: str, true: bool) -> None:
            found = self._truth.setdefault(name, [0, 0])
            found[0] += true
            found[1] += 1

        for candidate in row["positives"]:
            count("positives/before", entails(scene, candidate["text"]))
        for candidate in row["negatives"]:
            count("negatives/before", contradicts(scene, candidate["text"]))
        if kept and choice.positive is not None and choice.negative is not None:
            count("positives/after", entails(scene, choice.positive["text"]))
            count("negatives/after", contradicts(scene, choice.negative["text"]))

    @property
    def kept_share(self) -> float:
        return self.kept / max(self.rows, 1)

    def truth(self) -> dict[str, float]:
        """Precision of positives and negatives before and after filtering; empty off scenes."""
        return {name: true / total for name, (true, total) in self._truth.items()}

    def warnings(self) -> list[str]:
        """What does not look right."""
        if self.kept_share < FEW:
            return [
                f"only {self.kept_share:.1%} of the rows were kept: the thresholds do not fit this "
                "judge (see histogram.svg), or the writer is too weak"
            ]
        if self.kept_share > MANY:
            return [
                f"{self.kept_share:.1%} of the rows were kept: the filter hardly filters; see "
                "histogram.svg"
            ]
        return []

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "kept_share": round(self.kept_share, 4),
            "swapped": self.swapped,
            "filter": self.step.model_dump(),
            "reasons": dict(self.reasons.most_common()),
            "dropped_candidates": dict(self.dropped_candidates.most_common()),
            "truth": {name: round(value, 4) for name, value in self.truth().items()},
            "warnings": self.warnings(),
            "histogram": self.histogram,
            "samples": self.samples[True] + self.samples[False],
        }

    def picture(self) -> str:
        """The joint histogram of both ratings as SVG, with the filter's lines."""
        most = max(max(row) for row in self.histogram) or 1
        alpha, beta = self.step.alpha, self.step.beta
        gap = self.step.gamma if self.step.rule == "paper" else 0
        return TEMPLATES.get_template("histogram.svg.jinja").render(
            title=f"{self.rows} rows, {self.kept_share:.1%} kept",
            cells=CELLS,
            histogram=[
                {"a": a, "b": b, "count": count, "shade": math.log1p(count) / math.log1p(most)}
                for b, row in enumerate(self.histogram)
                for a, count in enumerate(row)
            ],
            lines=[(alpha, 0, alpha, 5), (0, beta, 5, beta), (gap, 0, 5, 5 - gap)],
        )


def entails(scene: Mapping[str, str], text: str) -> bool:
    """Whether a text states something, and nothing but facts of the scene."""
    stated = set(read_facts(text).facts)
    return bool(stated) and stated <= set(scene.items())


def contradicts(scene: Mapping[str, str], text: str) -> bool:
    """Whether a text states a fact that the scene does not have."""
    return bool(set(read_facts(text).facts) - set(scene.items()))


def _cell(rating: float) -> int:
    return min(int(rating / 5 * CELLS), CELLS - 1)
