"""Credit by segment: each part of a rationale gets what it adds to the score.

`grace_rl.credit.segments` has the mathematics, `grace_rl.credit.calibration` how well prefixes
predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_rl.credit.calibration import Calibration, beta_advice
from grace_rl.credit.credit import Credit
from grace_rl.credit.segments import ShapingConfig, faded_penalty, shape_advantages, to_tokens
from grace_rl.rollout.rollouts import Rollouts

ADVICE_BATCHES = 10  # the calibration is judged once it has seen so many


class SegmentCredit(Credit):
    """Step-wise credit, (N, T), of rollouts whose prefixes were scored.

    Args:
        shaping: how scores of prefixes become advantages.
        scale: `group`, `batch` or `none`, as TRL's `scale_rewards`.
    """

    def __init__(self, shaping: ShapingConfig, scale: str = "group") -> None:
        self.shaping = shaping
        self.scale = scale
        self.calibration = Calibration()

    def __call__(self, rollouts: Rollouts, progress: float = 0.0) -> Tensor:
        scores, ends, group = prefix_columns(rollouts)
        fitted = self.calibration if self.shaping.calibrate else Calibration()
        credit = shape_advantages(
            scores,
            ends,
            rollouts.totals.cpu(),
            group,
            gae_lambda=self.shaping.gae_lambda,
            slopes=fitted.slopes,
            intercepts=fitted.intercepts,
            penalty=faded_penalty(self.shaping.penalty, progress),
            margin=self.shaping.margin,
            scale=self.scale,
        )
        return to_tokens(credit, ends, max(len(ids) for ids in rollouts.token_ids))

    def notes(self, progress: float) -> dict[str, Any]:
        return {
            "kind": "segments",
            "scale": self.scale,
            "shaping": self.shaping.model_dump(mode="json"),
            "calibration": self.calibration.state_dict(),
            "progress": progress,
        }

    def learn(self, rollouts: Rollouts) -> str | None:
        """After use: no rollout has a say in its own baseline."""
        self.calibration.update(*prefix_columns(rollouts))
        return self.advice()

    def advice(self) -> str | None:
        """Once, when the calibration has settled: whether prefixes predict too little."""
        slopes = self.calibration.slopes
        if slopes is None or self.calibration.batches != ADVICE_BATCHES:
            return None
        return beta_advice(slopes, self.shaping)

    def state_dict(self) -> dict[str, Any]:
        return self.calibration.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calibration.load_state_dict(state)


def prefix_columns(rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K+1) scores and ends of prefixes, and (N,) groups, on the CPU.

    Raises:
        ValueError: no reward has scored the prefixes.
    """
    if rollouts.step_scores is None or rollouts.prefix_ends is None:
        raise ValueError("no reward has scored the prefixes of these rollouts")
    return rollouts.step_scores.cpu(), rollouts.prefix_ends.cpu(), rollouts.group.cpu()
