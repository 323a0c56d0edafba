"""Rationales of the `scenes` world: writing references, and reading which facts one states."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from grace_rl.data.scenes.world import FACT_OF_WORD, VALUES, Scene

OPENER = "Facts:"
"""Every reference begins with it, so that each fact's word follows a space: one token anywhere."""

FILLER = ("someone", "something", "somewhere", "somehow", "sometimes", "perhaps")
"""Words that a noisy reference may hold and that state no fact."""

RationaleForm = Literal["canonical", "random_order", "half", "filler", "noisy"]


def reference_rationale(
    scene: Scene,
    *,
    form: RationaleForm = "canonical",
    rng: random.Random | None = None,
    text: str | None = None,
    facts: tuple[int, int] = (3, 6),
    copied: float = 0.3,
    ordered: float = 0.5,
    filler: float = 0.1,
) -> str:
    """A rationale for a scene: a list of words, one for each fact it states.

    Args:
        scene: The facts.
        form: `canonical` all facts, canonical words, fixed order; `random_order` the same shuffled;
            `half` four of the facts, canonical, in order; `filler` no fact; `noisy` as a weak
            writer would who half copies the text: some facts, in the text's words or others, in the
            text's order or ours, filler in between.
        rng: Source of chance; needed for every form except `canonical`.
        text: Noisy: a text about the scene, needed.
        facts: Noisy: fewest and most facts stated, 1 to 8, all numbers between equally likely.
        copied: Noisy: how likely, in [0, 1], a fact keeps the text's word without another draw.
        ordered: Noisy: how likely the facts stand in the fixed order, not the text's, in [0, 1].
        filler: Noisy: how likely a filler word stands before a fact, in [0, 1].

    Raises:
        ValueError: `form` is unknown, or lacks the `rng` or the `text` that it needs.

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
        return _join(value for _, value in _some(truth, len(truth) // 2, rng))
    if form == "filler":
        return _join(rng.choice(FILLER) for _ in range(rng.randint(3, 6)))
    if form != "noisy":
        raise ValueError(
            f"unknown rationale form {form!r}; known: canonical, random_order, half, filler, noisy"
        )
    if text is None:
        raise ValueError("a noisy rationale needs the text that it half copies")
    word_of = {FACT_OF_WORD[word]: word for word in _known_words(text)}  # in the order of the text
    words = []
    for fact in _some(truth if rng.random() < ordered else list(word_of), rng.randint(*facts), rng):
        if rng.random() < filler:
            words.append(rng.choice(FILLER))
        attribute, value = fact
        words.append(
            word_of[fact] if rng.random() < copied else rng.choice(VALUES[attribute][value])
        )
    return _join(words)


def _some(facts: list[tuple[str, str]], count: int, rng: random.Random) -> list[tuple[str, str]]:
    return [facts[index] for index in sorted(rng.sample(range(len(facts)), count))]


def _join(words: Iterable[str]) -> str:
    return " ".join((OPENER, *words))


def _known_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in FACT_OF_WORD]


@dataclass(frozen=True)
class FactReading:
    """The facts that a rationale states, (attribute, value), as mentioned, repetitions kept."""

    facts: tuple[tuple[str, str], ...]

    def coverage(self, scene: Mapping[str, str]) -> float:
        """Share of the scene's facts that are stated, in [0, 1]."""
        return len(set(self.facts) & set(scene.items())) / len(VALUES)

    def precision(self, scene: Mapping[str, str]) -> float:
        """Share of the statements that are true of the scene, in [0, 1]; 0 if nothing is stated."""
        true = set(scene.items())
        return sum(fact in true for fact in self.facts) / max(len(self.facts), 1)


def read_facts(rationale: str) -> FactReading:
    """Read any text for facts: every known word counts, in any order and case, and nothing else.

    >>> reading = read_facts("Perhaps a Physician, irate, in the fog")
    >>> reading.facts
    (('agent', 'doctor'), ('trait', 'angry'), ('weather', 'fog'))
    """
    return FactReading(tuple(FACT_OF_WORD[word] for word in _known_words(rationale)))
