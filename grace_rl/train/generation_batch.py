"""One generation batch on its way through TRL's methods: what is collected, and its columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_rl.data.bundles import RoleText
from grace_rl.embed.reader import Written
from grace_rl.reward import Pool
from grace_rl.reward.loading import LoadedReward
from grace_rl.reward.runtime import Scored
from grace_rl.rollout.prompts import Prompt


class StepTable(NamedTuple):
    """Step-wise scores of the W rollouts of all processes, on the CPU.

    Attributes:
        scores: (W, K+1) of each prefix; NaN where a rollout is not scored.
        ends: (W, K+1) tokens of each prefix.
        totals: (W,) total rewards.
        group: (W,).
    """

    scores: Tensor
    ends: Tensor
    totals: Tensor
    group: Tensor


@dataclasses.dataclass
class GenerationBatch:
    """What one generation batch collects on its way through TRL's methods, on this process.

    Attributes:
        texts: The text behind each rollout.
        anchors: This process's share of the anchors; shares are equally long, the last may repeat
            an anchor.
        anchor_count: Anchors of all processes without the repeats.
        prompts, token_ids: One per rollout; `anchor_token_ids` one per anchor of the share.
        ends: (B, K+1) where segments end, in tokens, where a reward asks for prefixes.
        steps: What every process's rollouts score step by step, where a reward does.
        raw: (B, H) raw vectors, or with `ends` (B, K+1, H), once a forward of TRL's has given them.
    """

    texts: list[RoleText]
    anchors: list[RoleText]
    anchor_count: int
    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    anchor_token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    ends: Tensor | None = None
    raw: Tensor | None = None
    steps: StepTable | None = None
    scored: Scored | None = None
    pool: Pool | None = None


def rollout_fields(
    texts: Sequence[RoleText], written: Sequence[Written], end_ids: Collection[int]
) -> list[dict[str, Any]]:
    """What a `Pool` or `RewardBatch` holds of each rollout, but for its embedding."""
    return [
        {
            "texts": text.text,
            "rationales": item.rationale,
            "roles": text.role,
            "token_ids": item.token_ids,
            "example": text.example,
            "group": text.group,
            "side": text.side,
            "truncated": item.token_ids[-1] not in end_ids,
        }
        for text, item in zip(texts, written, strict=True)
    ]


def rollout_columns(fields: list[dict[str, Any]], embeddings: Tensor) -> dict[str, Any]:
    """Rollout fields as the columns of a `Pool` or `RewardBatch`, on the embeddings' device."""
    columns: dict[str, Any] = {name: [item[name] for item in fields] for name in fields[0]}
    for name in ("example", "group", "side"):
        columns[name] = torch.tensor(columns[name], dtype=torch.long, device=embeddings.device)
    columns["truncated"] = torch.tensor(columns["truncated"], device=embeddings.device)
    return columns | {"embeddings": embeddings}


def row_means(output: dict[str, Any]) -> Tensor:
    """(B,) advantages; those that differ by token as their mean over the rationale."""
    advantages, mask = output["advantages"], output["completion_mask"]
    if advantages.dim() == 1:
        return advantages
    return (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)


def token_advantages(batch: GenerationBatch, advantages: Tensor) -> list[list[float] | None]:
    """Per rollout of this process, its tokens' advantages; None where all have the same.

    Args:
        batch: With its token ids.
        advantages: (B,), or (B, T) where tokens differ.
    """
    if advantages.dim() == 1:
        return [None] * len(batch.token_ids)
    rows = advantages.tolist()
    return [row[: len(ids)] for row, ids in zip(rows, batch.token_ids, strict=True)]


def step_scores(rewards: Sequence[LoadedReward], scored: Scored) -> Tensor:
    """(B, K+1) the weighted sum of what rewards say of each prefix, on this process; where all have
    the weight 0, the plain sum, to look at."""
    weights = {reward.label: reward.weight for reward in rewards if reward.steps and reward.weight}
    named = scored.steps.items()
    return torch.stack([weights.get(name, float(not weights)) * s for name, s in named]).sum(0)


def stored_columns(
    batch: GenerationBatch,
    rewards: Sequence[LoadedReward],
    advantages: Tensor,
    by_token: Sequence[list[float] | None],
) -> dict[str, Any]:
    """The columns of the rollout store, for the rollouts and then the anchors of all processes.

    Args:
        batch: With its pool and its scores.
        rewards: Names of the scores.
        advantages: (W,), one number per rollout.
        by_token: Of each rollout, its tokens' advantages where they differ.
    """
    assert batch.pool is not None and batch.scored is not None
    pool, anchors = batch.pool, [None] * batch.anchor_count
    unscored: list[list[float] | None] = [None] * len(advantages)
    steps = unscored if batch.steps is None else batch.steps.scores.tolist()
    ends = unscored if batch.steps is None else batch.steps.ends.tolist()
    columns = {
        "example": pool.example.tolist(),
        "group": pool.group.tolist(),
        "role": pool.roles,
        "text": pool.texts,
        "rationale": pool.rationales,
        "token_ids": pool.token_ids,
        "truncated": pool.truncated.tolist(),
        "advantage": advantages.tolist() + anchors,
        "step_scores": [*steps, *anchors],
        "step_ends": [*ends, *anchors],
        "token_advantages": [*by_token, *anchors],
        "embedding": pool.embeddings.tolist(),
    }
    for i, reward in enumerate(rewards):
        columns[f"reward/{reward.label}"] = batch.scored.values[:, i].tolist() + anchors
    return columns
