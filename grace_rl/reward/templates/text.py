"""A reward that looks at the rationale's words."""

from __future__ import annotations

from grace_rl.reward import RewardBatch


class MyReward:
    """The share of the rationale's words that are not in the text: its own words.

    Args:
        shortest: rationales with fewer words are not scored.
    """

    def __init__(self, shortest: int = 2) -> None:
        self.shortest = shortest

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        return [
            self.score(text, rationale)
            for text, rationale in zip(batch.texts, batch.rationales, strict=True)
        ]

    def score(self, text: str, rationale: str) -> float | None:
        """0 to 1; None where the rationale is too short."""
        known = set(text.lower().split())
        words = rationale.lower().split()
        if len(words) < max(1, self.shortest):
            return None
        return sum(word not in known for word in words) / len(words)
