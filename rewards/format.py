"""A rationale must have the wanted form."""

from __future__ import annotations

import math
import re

import torch

from grace_rl.reward import RewardBatch, RewardOutput


class Format:
    r"""A gate: a rollout without the wanted form stays below every one of its group that has it.

    In plain words: a rationale passes if `pattern` is found in it and if each of `tags` is there
    once, in the given order, with something inside. A rollout that does not pass gets at most the
    worst total of the passing ones of its group minus `margin`. If nobody passes, nothing changes.

    Args:
        pattern: a regular expression that must be found anywhere ("." also matches a line break;
            anchor it with \A and \Z for the whole rationale). The default asks for one visible
            character.
        tags: names of required tags: "think" asks for <think>...</think>.
        margin: how far below the worst passing rollout, in units of the weighted total; 0.5 to 2.

    Requirements: none. The weight does not change the gate (except that 0 switches it off).

    Recommendations: the policy should write the form now and then by itself before RL; a group in
    which nobody passes teaches nothing.

    Relations: `length` is the other gate; unlike a format *bonus*, a gate cannot be traded against
    similarity.

    Source: the format rewards of open-r1 and torchtune, as a gate.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"text": [[1, 0], [1, 0]]}],
        ...     trained=["text"],
        ...     rationales=["<facts>cat, asleep</facts>", "cat, asleep"],
        ... )
        >>> Format(tags=["facts"])(batch).gate
        tensor([ True, False])
    """

    gates = True

    def __init__(
        self, pattern: str = r"\S", tags: list[str] | None = None, margin: float = 1.0
    ) -> None:
        self.check(pattern, tags, margin)
        self.pattern = re.compile(pattern, re.DOTALL)
        self.tags = tags or []
        inside = [rf"<{re.escape(tag)}>.*?\S.*?</{re.escape(tag)}>" for tag in self.tags]
        self.tagged = re.compile(".*?".join(inside), re.DOTALL)
        self.margin = margin

    @staticmethod
    def check(pattern: str, tags: list[str] | None, margin: float) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        if not 0 < margin < math.inf:
            raise ValueError(f"margin must be above 0, not {margin}")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        passed = torch.tensor(
            [self.passes(rationale) for rationale in batch.rationales],
            device=batch.embeddings.device,
        )
        return RewardOutput(
            values=torch.zeros_like(batch.embeddings[:, 0]), gate=passed, margin=self.margin
        )

    def passes(self, rationale: str) -> bool:
        """Whether one rationale has the form.

        >>> Format(tags=["think"]).passes("<think> </think>")
        False
        """
        once = all(
            rationale.count(f"<{tag}>") == 1 and rationale.count(f"</{tag}>") == 1
            for tag in self.tags
        )
        return bool(self.pattern.search(rationale) and once and self.tagged.search(rationale))
