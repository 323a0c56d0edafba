"""Segments of a rationale: near-equal runs of tokens, cut at a sentence end where one is near.

Their number is fixed and their length follows the rationale's, so that a policy cannot earn
anything by writing more or fewer steps (papers/gircse.md 9.7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from transformers import PreTrainedTokenizerBase

SNAP = 0.1  # how far a cut may move to a sentence end, as a share of the rationale


def segment_ends(
    token_ids: Sequence[int],
    segments: int,
    min_tokens: int,
    ends_sentence: Callable[[int], bool] = lambda token: False,
) -> list[int]:
    """How many tokens lie before each cut: `[0, e_1, ..., e_segments]`, the last is all of them.

    A rationale shorter than `segments * min_tokens` is one segment: `[0, n, ..., n]`.

    Args:
        token_ids: The rationale with its end token.
        segments: How many, at least 1.
        min_tokens: Shortest segment, at least 1 token.
        ends_sentence: Whether a sentence ends with this token; a cut moves to the nearest such
            place within 10% of the rationale's tokens.

    >>> segment_ends([7] * 10, segments=4, min_tokens=2)
    [0, 2, 5, 8, 10]
    >>> segment_ends([7, 7, 7, 7, 7, 9, 7, 7, 7, 7, 7, 7], 3, 2, lambda token: token == 9)
    [0, 4, 8, 12]
    >>> segment_ends([7, 7, 7, 7, 9, 7, 7, 7, 7, 7, 7, 7], 3, 2, lambda token: token == 9)
    [0, 5, 8, 12]
    >>> segment_ends([7] * 10, segments=4, min_tokens=3)
    [0, 10, 10, 10, 10]
    """
    length = len(token_ids)
    if length < segments * min_tokens:
        return [0] + [length] * segments
    ends = [0]
    for number in range(1, segments):
        even = round(length * number / segments)
        lowest = max(ends[-1] + min_tokens, even - int(SNAP * length))
        highest = min(length - (segments - number) * min_tokens, even + int(SNAP * length))
        sentences = [p for p in range(lowest, highest + 1) if ends_sentence(token_ids[p - 1])]
        even = min(max(even, lowest), highest)
        ends.append(min(sentences, key=partial(_distance, even), default=even))
    return [*ends, length]


def _distance(place: int, other: int) -> int:
    return abs(place - other)


def sentence_end_test(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    """Whether a sentence ends with a token.

    Its text then ends with a full stop, a line break, or the like, perhaps with a closing quote.
    """

    @cache
    def ends_sentence(token: int) -> bool:
        text = str(tokenizer.decode([token])).rstrip(" \"')]”’»")
        return text.endswith((".", "!", "?", "…", "。", "！", "？", "\n"))

    return ends_sentence
