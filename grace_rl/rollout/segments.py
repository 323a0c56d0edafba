"""Segments of a rationale: runs of about as many tokens, cut at a sentence end where one is near.

Which segment a token belongs to is settled by what stands before it. Cuts at shares of the
rationale's own length would not do: a policy that ends early would move all of them, so the score
at a cut would depend on what is written after it and be no baseline for that. (On scenes with cuts
at quarters of the own length rationales shrank from 7 to 5 tokens in 20 steps; docs/methods.md.) So
cuts are shares of the typical length, and a shorter rationale has fewer segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

MOMENTUM = 0.9  # of the typical length: about ten batches
SNAP = 0.1  # how much earlier a cut may come for a sentence end, as a share of the typical length


class Segmenter:
    """Cuts rationales into at most K segments that are near-equal for one of typical length.

    Args:
        segments: K, at least 1.
        min_tokens: Shortest segment, at least 1; only a rationale's last one may be shorter.
        ends_sentence: Whether a sentence ends with this token.
    """

    def __init__(
        self,
        segments: int,
        min_tokens: int,
        ends_sentence: Callable[[int], bool] = lambda token: False,
    ) -> None:
        self.segments = segments
        self.min_tokens = min_tokens
        self.ends_sentence = ends_sentence
        self.typical_length: float | None = None

    def follow(self, mean_length: float) -> None:
        """Move the typical length, in tokens, towards that of a batch; the first batch sets it."""
        momentum = 0.0 if self.typical_length is None else MOMENTUM
        self.typical_length = momentum * (self.typical_length or 0) + (1 - momentum) * mean_length

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """How many tokens lie before each cut: `[0, e_1, ..., e_K]`, the last is all of them.

        A rationale that ends before a cut repeats its length: `[0, n, ..., n]` is one segment.

        >>> segmenter = Segmenter(segments=4, min_tokens=2, ends_sentence=lambda token: token == 9)
        >>> segmenter.follow(20)
        >>> segmenter.ends([7] * 22), segmenter.ends([7] * 12), segmenter.ends([7] * 4)
        ([0, 5, 10, 15, 22], [0, 5, 10, 12, 12], [0, 4, 4, 4, 4])
        >>> segmenter.ends([7, 7, 7, 9, *[7] * 16])
        [0, 4, 10, 15, 20]
        """
        length = len(token_ids)
        typical = max(self.typical_length or 0, self.segments * self.min_tokens)
        ends = [0]
        for number in range(1, self.segments):
            cut = round(typical * number / self.segments)
            earliest = max(ends[-1] + self.min_tokens, cut - int(SNAP * typical))
            sentences = (
                place
                for place in range(earliest, min(cut, length))
                if self.ends_sentence(token_ids[place - 1])
            )
            ends.append(min(next(sentences, cut), length))
        return [*ends, length]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"typical_length": self.typical_length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.typical_length = state["typical_length"]


def sentence_end_test(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    """Whether a sentence ends with a token: its text ends with a full stop, a line break, or the
    like, perhaps with a closing quote."""

    @cache
    def ends_sentence(token: int) -> bool:
        text = str(tokenizer.decode([token])).rstrip(" \"')]”’»")
        return text.endswith((".", "!", "?", "…", "。", "！", "？", "\n"))

    return ends_sentence
