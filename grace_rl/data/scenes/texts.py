"""Scenes in English: 24 sentence templates, and words chosen for the facts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from grace_rl.data.scenes.world import TRANSFER_WORDS, VALUES, Scene

# {near} is any of NEAR. {at} is the preposition of the time's value, the only word beside a fact's
# own that changes with it. A capital asks for a capital letter; {a_...} for the article that fits
# the word.
TEMPLATES = (
    "{At} {time}, {a_trait} {agent} was {manner} {action} {a_object} {near} the {place}, out in "
    "the {weather}.",
    "{Near} the {place}, {a_trait} {agent} could be seen {manner} {action} {a_object} in the "
    "{weather} {at} {time}.",
    "There was {a_trait} {agent} {near} the {place} {at} {time}, {action} {a_object} {manner} "
    "despite the {weather}.",
    "Despite the {weather}, {a_trait} {agent} stayed {near} the {place} {at} {time}, {manner} "
    "{action} {a_object}.",
    "People {near} the {place} still talk about the {trait} {agent} who was {action} {a_object} "
    "{manner} {at} {time}, in all that {weather}.",
    "In the {weather}, {near} the {place}, somebody noticed {a_trait} {agent} who kept {action} "
    "the same {object} {manner} {at} {time}.",
    "What we saw {at} {time} was {a_trait} {agent}, {manner} {action} {a_object} {near} the "
    "{place} through the {weather}.",
    "The {agent} {near} the {place} looked {trait} {at} {time} and was {manner} {action} "
    "{a_object}, whatever the {weather}.",
    "It was {a_object} that the {trait} {agent} was {manner} {action} {at} {time}, {near} the "
    "{place}, in the {weather}.",
    "The {weather} did not stop {a_agent}, who seemed {trait}, from {manner} {action} "
    "{a_object} {near} the {place} {at} {time}.",
    "{At} {time} the {weather} came, yet {a_trait} {agent} {near} the {place} went on {action} "
    "{a_object} rather {manner}.",
    "My neighbor remembers {a_trait} {agent} {manner} {action} {a_object} {at} {time}, just "
    "{near} the {place}, amid the {weather}.",
    "One of the pictures shows {a_agent}, clearly {trait}, {action} {a_object} {manner} {near} "
    "the {place} {at} {time} in the {weather}.",
    "Someone {trait} was {near} the {place} {at} {time}: {a_agent}, {manner} {action} "
    "{a_object} in spite of the {weather}.",
    "There was {weather} {at} {time} while {a_trait} {agent} was {action} {a_object} {manner} "
    "{near} the {place}.",
    "With {weather} all around, {a_trait} {agent} spent hours {near} the {place} {at} {time}, "
    "{manner} {action} {a_object}.",
    "{A_trait} {agent} is {action} {a_object} {near} the {place}; it is done {manner}, {at} "
    "{time}, in the {weather}.",
    "Nobody asked why the {agent}, looking {trait}, was {action} {a_object} so {manner} {near} "
    "the {place} {at} {time} in the {weather}.",
    "That {object} {near} the {place}? {A_trait} {agent} was {action} it {manner} {at} {time}, "
    "even in the {weather}.",
    "A short report: {a_agent}, {trait}, {manner} {action} {a_object}, {near} the {place}, {at} "
    "{time}, with {weather}, and nothing else to add.",
    "Through the {weather} one could make out {a_trait} {agent} {near} the {place}, {action} "
    "{a_object} {manner} {at} {time}.",
    "The story begins {at} {time} with {a_trait} {agent} who is {action} {a_object} {manner} "
    "{near} the {place} in the {weather}.",
    "{At} {time}, {near} the {place}, in the {weather}: {a_trait} {agent}, who was {manner} "
    "{action} {a_object}, as always.",
    "They say that {a_object} {near} the {place} is what the {trait} {agent} was {manner} "
    "{action} in the {weather} {at} {time}.",
)
NEAR = ("near", "by", "beside", "close to")
_AT = {"dawn": "at", "noon": "at", "dusk": "at", "night": "at"}  # seasons take "in"


@dataclass(frozen=True)
class Rendering:
    """All that makes a text: the facts, the word chosen for each, and the sentence around them.

    Attributes:
        scene: The facts.
        words: Attribute -> word.
        template: Index into `TEMPLATES`.
        near: One of `NEAR`.
    """

    scene: Scene
    words: Mapping[str, str]
    template: int
    near: str

    @property
    def text(self) -> str:
        """The sentence, 15 to 30 words."""
        words, at = dict(self.words), _AT.get(self.scene["time"], "in")
        slots = words | {
            "near": self.near,
            "at": at,
            "Near": self.near.capitalize(),
            "At": at.capitalize(),
        }
        for attribute in ("trait", "agent", "object"):
            article = "an" if words[attribute][0] in "aeiou" else "a"
            slots[f"a_{attribute}"] = f"{article} {words[attribute]}"
            slots[f"A_{attribute}"] = f"{article.capitalize()} {words[attribute]}"
        return TEMPLATES[self.template].format(**slots)


def choose_word(attribute: str, value: str, rng: random.Random, transfer: bool | None) -> str:
    """A word for a fact.

    `transfer`: a reserved word wherever there is one (True), never (False), as likely as any
    (None).
    """
    words = VALUES[attribute][value]
    if transfer is not None:
        words = tuple(word for word in words if (word in TRANSFER_WORDS) == transfer) or words
    return rng.choice(words)


def render(scene: Scene, rng: random.Random, *, transfer: bool | None = False) -> Rendering:
    """Say a scene in a random sentence and random words (see `choose_word` for `transfer`)."""
    words = {
        attribute: choose_word(attribute, value, rng, transfer)
        for attribute, value in scene.items()
    }
    return Rendering(scene, words, rng.randrange(len(TEMPLATES)), rng.choice(NEAR))


def paraphrase(
    rendering: Rendering, rng: random.Random, *, transfer: bool | None = False
) -> Rendering:
    """The same facts in another sentence, with another word for every fact that has one left."""
    words = {}
    for attribute, value in rendering.scene.items():
        for _ in range(20):
            words[attribute] = choose_word(attribute, value, rng, transfer)
            if words[attribute] != rendering.words[attribute]:
                break
    template = (rendering.template + rng.randrange(1, len(TEMPLATES))) % len(TEMPLATES)
    return Rendering(rendering.scene, words, template, rng.choice(NEAR))


def with_facts(
    rendering: Rendering, scene: Scene, rng: random.Random, *, transfer: bool | None = False
) -> Rendering:
    """The same sentence about another scene: only the words of the facts that differ are new."""
    words = {
        attribute: rendering.words[attribute]
        if value == rendering.scene[attribute]
        else choose_word(attribute, value, rng, transfer)
        for attribute, value in scene.items()
    }
    return replace(rendering, scene=scene, words=words)
