"""The facts of the `scenes` world: attributes, values, words, splits and the gold similarity.

A scene gives each of eight attributes one value. A value has two to four words that mean the same;
every word names one value of one attribute, so a single word states a fact.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

Scene = dict[str, str]
"""Attribute -> value, all eight attributes, in the order of `VALUES`."""

# The first word of a line names the value and is its canonical word. A star marks a word reserved
# for `transfer`.
_WORDS = {
    "trait": """
        old elderly aged*
        young youthful
        tall lanky towering*
        tired weary sleepy*
        rich wealthy affluent*
        thin slender skinny
        angry furious irate
        brave fearless courageous*
        famous renowned celebrated
        sick ill ailing
    """,
    "agent": """
        woman lady
        man gentleman fellow*
        girl lass
        boy lad
        doctor physician medic*
        soldier trooper
        farmer rancher grower
        teacher tutor instructor*
        thief robber burglar*
        sailor seaman mariner
    """,
    "manner": """
        quickly swiftly rapidly*
        slowly gradually
        carefully cautiously gingerly*
        secretly stealthily covertly
        happily cheerfully merrily*
        clumsily awkwardly
        loudly noisily
        nervously anxiously uneasily
        eagerly keenly
    """,
    "action": """
        carrying hauling lugging*
        painting drawing sketching*
        cleaning washing scrubbing
        repairing fixing mending*
        selling peddling
        hiding concealing
        buying purchasing
        examining inspecting studying*
        breaking smashing wrecking
        photographing filming
    """,
    "object": """
        violin fiddle
        bicycle bike
        car automobile sedan*
        book novel volume*
        lamp lantern
        cup mug goblet
        bag sack pouch*
        coat jacket parka
        sofa couch settee*
        statue sculpture figurine
        rug carpet
    """,
    "place": """
        forest woods woodland*
        shop store boutique
        street road avenue*
        beach shore seaside
        river stream creek*
        hill slope
        harbor port dock
        hotel inn hostel
        castle fortress citadel
        church chapel cathedral
    """,
    "time": """
        dawn sunrise daybreak*
        noon midday lunchtime
        dusk sunset twilight
        night nighttime midnight*
        spring springtime
        summer summertime midsummer*
        autumn fall
        winter wintertime midwinter
    """,
    "weather": """
        rain drizzle downpour*
        snow blizzard sleet
        fog mist haze
        wind breeze gale*
        sunshine sunlight
        storm thunderstorm tempest*
        heat warmth
        frost cold chill
    """,
}


def _read_words() -> tuple[dict[str, dict[str, tuple[str, ...]]], frozenset[str]]:
    values: dict[str, dict[str, tuple[str, ...]]] = {}
    transfer = set()
    for attribute, table in _WORDS.items():
        values[attribute] = {}
        for line in table.split("\n"):
            if words := line.split():
                transfer |= {word.rstrip("*") for word in words if word.endswith("*")}
                values[attribute][words[0]] = tuple(word.rstrip("*") for word in words)
    return values, frozenset(transfer)


VALUES, TRANSFER_WORDS = _read_words()
"""`VALUES[attribute][value]`: the value's words, the canonical one first."""

FACT_OF_WORD: dict[str, tuple[str, str]] = {
    word: (attribute, value)
    for attribute, values in VALUES.items()
    for value, words in values.items()
    for word in words
}
"""Word -> (attribute, value)."""

SPLIT_SHARES = {"train": 14, "validation": 2, "test": 2, "transfer": 2}
"""How many of the 20 hash buckets belong to each split."""


def split_of(scene: Mapping[str, str]) -> str:
    """The split that a scene belongs to, decided by a hash of its facts alone.

    >>> split_of({attribute: next(iter(values)) for attribute, values in VALUES.items()})
    'validation'
    """
    facts = "|".join(scene[attribute] for attribute in VALUES)
    bucket = int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=8).digest(), "big") % 20
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of the splits do not sum to 20")


def random_scene(split: str, rng: random.Random) -> Scene:
    """A scene of this split, all values equally likely."""
    while True:
        scene = {attribute: rng.choice(list(values)) for attribute, values in VALUES.items()}
        if split_of(scene) == split:
            return scene


def change_facts(scene: Scene, count: int, rng: random.Random) -> Scene | None:
    """A scene of the same split that differs in `count` facts; None if 50 tries found none."""
    for _ in range(50):
        changed = dict(scene)
        for attribute in rng.sample(list(VALUES), count):
            changed[attribute] = rng.choice(
                [value for value in VALUES[attribute] if value != scene[attribute]]
            )
        if split_of(changed) == split_of(scene):
            return changed
    return None


def gold_similarity(scene_a: Mapping[str, str], scene_b: Mapping[str, str]) -> float:
    """The share of the eight facts that two scenes have in common, in [0, 1].

    >>> scene = {attribute: next(iter(values)) for attribute, values in VALUES.items()}
    >>> other = scene | {"time": "noon", "place": "hill"}
    >>> gold_similarity(scene, scene), gold_similarity(scene, other)
    (1.0, 0.75)
    """
    return sum(scene_a[attribute] == scene_b[attribute] for attribute in VALUES) / len(VALUES)
