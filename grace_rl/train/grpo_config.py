"""Arguments of `GraceGRPOTrainer`: TRL's `GRPOConfig` and a few fields of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from grace_rl.rollout.prompts import DEFAULT_INSTRUCTION


def _default_roles() -> dict[str, dict[str, Any]]:
    return {"query": {}, "positive": {}, "negative": {"train": False}}


@dataclass
class GraceGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`; every TRL field keeps its name and meaning.

    Args:
        roles: Which texts of a row get rationales, `{role: {samples: int, train: bool}}`. Roles are
            `query`, `positive`, `negative`, `negative_positive` (supervised rows) or `text`,
            `anchor` (unsupervised rows). `train: true` (default) rolls the text out
            `num_generations` times and updates the policy on it. `train: false` makes an anchor:
            `samples` rationales (default 1) are written once per row and batch, scored against and
            never updated.
        reader: Keywords of `grace_rl.embed.reader.ReaderConfig`: how a rationale becomes a vector.
        instruction: System instruction of the prompt; `None` leaves it out.
        max_text_tokens: Longer texts are cut here (at least 1); the chat template around them stays
            whole.
        anchor_temperature: Sampling temperature of anchors, above 0; `None` is the rollouts' own.
            GRACE uses 0.5.
        segments: How many segments a rationale is cut into for rewards that return steps
            (`refinement`), at least 1; 3 to 5 is usual. They are near-equal in tokens, and cut at a
            sentence end where one is near.
        segment_min_tokens: Shortest segment in tokens, at least 1; a rationale too short for
            `segments` of them is one segment.
        shaping: Keywords of `grace_rl.reward.shaping.ShapingConfig`: how the scores after each
            segment become advantages.
        print_rollouts_steps: Print one group of rationales every so many steps; 0 never prints.
        stale_engine_threshold: Alarm level of `sampling/sampling_logp_difference/mean`, in nats.
    """

    roles: dict[str, Any] = field(default_factory=_default_roles)
    reader: dict[str, Any] = field(default_factory=dict)
    instruction: str | None = DEFAULT_INSTRUCTION
    max_text_tokens: int = 512
    anchor_temperature: float | None = None
    segments: int = 4
    segment_min_tokens: int = 16
    shaping: dict[str, Any] = field(default_factory=dict)
    print_rollouts_steps: int = 10
    stale_engine_threshold: float = 0.1

    @property
    def steps_between_generations(self) -> int:
        """Optimizer steps that one generation batch serves."""
        assert self.steps_per_generation is not None  # TRL's config fills it in
        batches = self.steps_per_generation * self.num_iterations
        return max(1, batches // self.gradient_accumulation_steps)
