"""A rationale must end; a longer one may cost something."""

from __future__ import annotations

import math

from grace_rl.reward import RewardBatch, RewardOutput


class Length:
    """A gate: a rollout that never ended stays below every finished one of its group.

    In plain words:

    1. A truncated rollout's total becomes the worst total of the finished rollouts of its group,
       minus `margin` (or its own, if that is lower). So it is never the best, whatever the other
       rewards say. If the whole group is truncated, nothing changes.
    2. Each token beyond `free_tokens` costs `cost_per_token`; with the default it costs nothing.

    Args:
        margin: how far below the worst finished rollout, in units of the weighted total; about the
            spread of a group's totals, 0.5 to 2.
        cost_per_token: 0 (off) to 0.05, times this reward's weight.
        free_tokens: the length that costs nothing, for example the length of a good rationale.

    Requirements: none. The weight does not change the gate (except that 0 switches it off).

    Recommendations: keep it in every recipe. Without it most policies never end and repeat
    themselves up to the cap.

    Relations: `grace_published` gives a truncated rollout a constant instead, which can be the best
    of its group; `format` is the other gate.

    Source: in place of the constant reward of GRACE (arXiv 2510.04506), appendix A.2.5.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"text": [[1, 0], [1, 0]]}],
        ...     trained=["text"],
        ...     rationales=["cat asleep", "cat cat cat"],
        ...     truncated=[False, True],
        ... )
        >>> output = Length(cost_per_token=0.5, free_tokens=2)(batch)
        >>> output.gate, output.values
        (tensor([ True, False]), tensor([-0.0000, -0.5000]))
    """

    gates = True

    def __init__(
        self, margin: float = 1.0, cost_per_token: float = 0.0, free_tokens: int = 0
    ) -> None:
        self.check(margin, cost_per_token, free_tokens)
        self.margin = margin
        self.cost_per_token = cost_per_token
        self.free_tokens = free_tokens

    @staticmethod
    def check(margin: float, cost_per_token: float, free_tokens: int) -> None:
        if not 0 < margin < math.inf:
            raise ValueError(f"margin must be above 0, not {margin}")
        if not (cost_per_token >= 0 and free_tokens >= 0):
            raise ValueError("cost_per_token and free_tokens must not be below 0")
        if free_tokens > 0 and cost_per_token == 0:
            raise ValueError("free_tokens has no effect without cost_per_token")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        tokens = batch.embeddings.new_tensor([len(ids) for ids in batch.token_ids])
        paid = (tokens - self.free_tokens).clamp(min=0)
        return RewardOutput(
            values=-self.cost_per_token * paid,
            components={"tokens": tokens},
            gate=~batch.truncated,
            margin=self.margin,
        )
