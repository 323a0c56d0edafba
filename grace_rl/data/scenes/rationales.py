"""Rationales of the `scenes` world: writing references, and reading which facts any rationale states."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from grace_rl.data.scenes.world import FACT_OF_WORD, VALUES, Scene

OPENER = "Facts:"
"""Every reference begins with it, so that every fact's word follows a space and has one token, wherever it stands."""

FILLER = ("someone", "something", "somewhere", "somehow", "sometimes", "perhaps")
"""Words that a noisy reference may hold and that state no fact."""

RationaleForm = Literal["canonical", "random_order", "half", "filler", "noisy"]


def reference_rationale(
    scene: Scene,
    *,
    form: RationaleForm = "canonical",
    rng: random.Random | None = None,
    facts: tuple[int, int] = (4, 6),
    canonical: float = 0.0,
    ordered: float = 0.0,
    filler: float = 0.1,
) -> str:
    """A rationale for a scene: a list of words, one for each fact it states.

    Args:
        scene: The facts.
        form: `canonical` all facts, canonical words, fixed order; `random_order` the same shuffled; `half` four of
            the facts, canonical, in order; `filler` no fact; `noisy` as a weak writer would: some facts, any of their
            words, any order, filler in between (the other arguments say how much).
        rng: Source of chance; needed for every form except `canonical`.
        facts: Noisy: fewest and most facts stated, 1 to 8, all numbers between equally likely.
        canonical: Noisy: how likely a fact's canonical word is taken without a draw among all its words, in [0, 1].
        ordered: Noisy: how likely the facts stay in order, in [0, 1].
        filler: Noisy: how likely a filler word stands before a fact, in [0, 1].

    Raises:
        ValueError: `form` is unknown, or needs an `rng` and got none.

    >>> scene = {attribute: next(iter(values)) for attribute, values in VALUES.items()}
    >>> reference_rationale(scene)
    'Facts: old woman quickly carrying violin forest dawn rain'
    """
    truth = list(scene.items())
    if form == "canonical":
        return _join(value for _, value in truth)
    if rng is None:
        raise ValueError(f"the rationale form {form!r} needs an rng")
    if form == "random_order":
        return _join(value for _, value in rng.sample(truth, len(truth)))
    if form == "half":
        kept = sorted(rng.sample(range(len(truth)), len(truth) // 2))
        return _join(truth[index][1] for index in kept)
    if form == "filler":
        return _join(rng.choice(FILLER) for _ in range(rng.randint(3, 6)))
    if form != "noisy":
        raise ValueError(
            f"unknown rationale form {form!r}; known: canonical, random_order, half, filler, noisy"
        )
    stated = rng.sample(truth, rng.randint(*facts))
    if rng.random() < ordered:
        stated.sort(key=truth.index)
    words = []
    for attribute, value in stated:
        if rng.random() < filler:
            words.append(rng.choice(FILLER))
        words.append(value if rng.random() < canonical else rng.choice(VALUES[attribute][value]))
    return _join(words)


def _join(words: Iterable[str]) -> str:
    return " ".join((OPENER, *words))


@dataclass(frozen=True)
class FactReading:
    """The facts that a rationale states, (attribute, value), in the order of mention, repetitions kept."""

    facts: tuple[tuple[str, str], ...]

    def coverage(self, scene: Mapping[str, str]) -> float:
        """Share of the scene's facts that are stated, in [0, 1]."""
        return len(set(self.facts) & set(scene.items())) / len(VALUES)

    def precision(self, scene: Mapping[str, str]) -> float:
        """Share of the statements that are true of the scene, in [0, 1]; 0 where nothing is stated."""
        true = set(scene.items())
        return sum(fact in true for fact in self.facts) / max(len(self.facts), 1)


def read_facts(rationale: str) -> FactReading:
    """Read any text for facts: every known word counts, in any order and case; all else is passed over.

    >>> reading = read_facts("Perhaps a Physician, irate, in the fog")
    >>> reading.facts
    (('agent', 'doctor'), ('trait', 'angry'), ('weather', 'fog'))
    """
    words = re.findall(r"[a-z]+", rationale.lower())
    return FactReading(tuple(FACT_OF_WORD[word] for word in words if word in FACT_OF_WORD))
