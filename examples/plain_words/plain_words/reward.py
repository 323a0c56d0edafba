"""Short words are easier to read."""

from __future__ import annotations

from grace_rl.reward import RewardBatch


class PlainWords:
    """The share of the rationale's words that are short.

    Args:
        longest: letters of the longest word that counts as short.

    Requirements: none; an empty rationale is not scored.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"text": [[1, 0]]}], trained=["text"], rationales=["a comprehensive cat"]
        ... )
        >>> [round(value, 2) for value in PlainWords(longest=5)(batch)]
        [0.67]
    """

    def __init__(self, longest: int = 7) -> None:
        self.check(longest)
        self.longest = longest

    @staticmethod
    def check(longest: int) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, not {longest}")

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        return [self.share(rationale.split()) for rationale in batch.rationales]

    def share(self, words: list[str]) -> float | None:
        if not words:
            return None
        return sum(len(word.strip(".,;:!?")) <= self.longest for word in words) / len(words)
