"""What the language model is asked: to write an entailment or a contradiction, and to rate.

Instructions follow the four kinds that MultiCSR (arXiv 2310.10962) asks for on either side, in
words of our own. A row always gets the same instruction, and its opposite is the other side's of
the same number.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

from grace_rl.errors import UserError
from grace_rl.rollout.prompts import PromptTemplate

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")
ONLY = "Answer with the new sentence alone."
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "positive": (
        f"Say the sentence again in other words, with the same meaning. {ONLY}",
        f"Rewrite the sentence: other words, another structure, nothing else changed. {ONLY}",
        f"Write a sentence that must also be true if the given one is true. {ONLY}",
        f"Say the sentence shorter; leave out what is not essential. {ONLY}",
    ),
    "negative": (
        f"Keep topic and structure of the sentence, but change details so that it says something "
        f"else that cannot be true at the same time. {ONLY}",
        f"Turn one or two parts of the sentence into their opposite. {ONLY}",
        f"Alter the sentence so that it contradicts the given one and still makes sense. {ONLY}",
        f"Write a realistic sentence on the same topic that contrasts with the given one. {ONLY}",
    ),
}
CUES = {"positive": "The same in other words:", "negative": "This is not true if:"}
EXAMPLES: tuple[tuple[str, str, str], ...] = (
    (
        "A man is selling fruit from a cart near the station.",
        "Close to the station, somebody sells fruit from a cart.",
        "A man is buying shoes in a shop far from the station.",
    ),
    (
        "The river was named after the explorer who first crossed it in 1821.",
        "The explorer who in 1821 was the first to cross the river gave it its name.",
        "The river got its name from a village, long before anybody had crossed it.",
    ),
    (
        "Most of the workers went home early because of the storm.",
        "Due to the storm, the majority of the workers left early.",
        "In spite of the storm, all workers stayed until late.",
    ),
)
RATING = (
    "How alike are the meanings of the two sentences? Answer with one digit from 0 to 5: "
    "0 nothing in common, 1 the same topic, 2 some details in common, 3 roughly the same but "
    "something important differs, 4 the same but for unimportant details, 5 the same."
)
RATING_CUE = "Alike from 0 to 5:"
RATED: tuple[tuple[str, str, int], ...] = (
    (EXAMPLES[0][0], EXAMPLES[0][1], 5),
    (EXAMPLES[1][0], EXAMPLES[2][0], 0),
    ("A dog runs over the grass.", "A brown dog is running outside.", 4),
    (EXAMPLES[2][0], EXAMPLES[2][2], 1),
    ("A woman cuts onions.", "A woman is cooking with a friend.", 2),
)


class SidePrompts:
    """Prompts for both sides of a text.

    Args:
        tokenizer: Of the generator.
        kind: `instructions`, `completion` or `describe`; see `GenerateStep`.
        max_text_tokens: Longer texts are cut here.
        chat_template_kwargs: Keywords for the chat template.
    """

    def __init__(
        self, tokenizer: Any, kind: str, max_text_tokens: int, chat_template_kwargs: dict[str, Any]
    ) -> None:
        self.tokenizer, self.kind, self.max_text_tokens = tokenizer, kind, max_text_tokens
        pools = INSTRUCTIONS if kind == "instructions" else dict.fromkeys(SIDES, (None,))
        self._templates: dict[str, list[PromptTemplate]] = {}
        if kind != "completion":
            self._templates = {
                side: [
                    PromptTemplate(tokenizer, words, max_text_tokens, chat_template_kwargs)
                    for words in pool
                ]
                for side, pool in pools.items()
            }

    def number(self, text: str) -> int:
        """Which of the instructions a text gets."""
        return (
            0
            if not self._templates
            else zlib.crc32(text.encode()) % len(self._templates["positive"])
        )

    def tokens(self, text: str, side: Side, number: int) -> list[int]:
        """The prompt of one side, as tokens."""
        if self.kind != "completion":
            return self._templates[side][number].render(text).token_ids
        place = 1 + SIDES.index(side)
        shown = "".join(
            f"Sentence: {example[0]}\n{CUES[side]} {example[place]}\n\n" for example in EXAMPLES
        )
        text = cut(self.tokenizer, text, self.max_text_tokens)
        return _plain(self.tokenizer, f"{shown}Sentence: {text}\n{CUES[side]}")


class RatingPrompts:
    """Prompts whose next token is a digit from 0 to 5.

    Args:
        tokenizer: Of the judge.
        kind: `instructions` or `completion`.
        max_text_tokens: Each of the two texts is cut here.
        chat_template_kwargs: Keywords for the chat template.

    Attributes:
        digits: The six tokens.

    Raises:
        UserError: The tokenizer has no token for each digit.
    """

    def __init__(
        self, tokenizer: Any, kind: str, max_text_tokens: int, chat_template_kwargs: dict[str, Any]
    ) -> None:
        self.tokenizer, self.max_text_tokens = tokenizer, max_text_tokens
        self._template = None
        if kind == "instructions":
            self._template = PromptTemplate(
                tokenizer, RATING, 4 * max_text_tokens + 64, chat_template_kwargs
            )
        self._lead, self.digits = _digit_tokens(tokenizer, " " if kind == "completion" else "")

    def tokens(self, first: str, second: str) -> list[int]:
        """The prompt for a pair."""
        first, second = (cut(self.tokenizer, t, self.max_text_tokens) for t in (first, second))
        pair = f"Sentence 1: {first}\nSentence 2: {second}"
        if self._template is not None:
            return self._template.render(pair).token_ids + self._lead
        shown = "".join(
            f"Sentence 1: {a}\nSentence 2: {b}\n{RATING_CUE} {digit}\n\n" for a, b, digit in RATED
        )
        return _plain(self.tokenizer, f"{shown}{pair}\n{RATING_CUE}") + self._lead


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    if len(text) <= tokens:  # a token is a character at least
        return text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens])).strip()


def _plain(tokenizer: Any, string: str) -> list[int]:
    """Tokens as the tokenizer gives them, with its own begin token, without an end token."""
    ids: list[int] = tokenizer(string)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _digit_tokens(tokenizer: Any, space: str) -> tuple[list[int], list[int]]:
    """The tokens before a digit, the same for all six, and the digits' own."""
    encoded: Sequence[list[int]] = [
        tokenizer(f"{space}{digit}", add_special_tokens=False)["input_ids"] for digit in range(6)
    ]
    leads = {tuple(ids[:-1]) for ids in encoded}
    digits = [ids[-1] for ids in encoded]
    if len(leads) != 1 or len(set(digits)) != 6:
        raise UserError(
            f"{tokenizer.name_or_path}: has no single tokens for the digits 0 to 5; use another "
            "judge (rate.judge: likelihood or encoder)"
        )
    return list(leads.pop()), digits
