"""From the scores of a rationale's prefixes to an advantage for each of its segments.

With s_0, ..., s_K the scores without a rationale and after each of its K segments, segment k earns
s_k - s_{k-1}. These sum to s_K - s_0: what is paid for is the same, only its place is known better
(potential-based shaping, Ng, Harada and Russell 1999). The advantages of a group are made so:

1. V_k = a_k + b_k s_k predicts the final score from the score so far; V_K is the rollout's total
   reward, so whatever other rewards say counts at the end. `Calibration` keeps a and b.
2. A_k = sum over j >= k of lambda^(j-k) (V_j - V_{j-1}): lambda 1 is unbiased, a smaller lambda
   looks at the next segments only.
3. A_k minus the mean of the group's other rollouts at the same k.
4. Divided by one standard deviation, the same for all k.

Everything here is a function of tensors with one row per rollout of all processes, W in all, in any
order. `ends` are the (W, K+1) numbers of tokens before each cut, from
`grace_rl.rollout.segments.Segmenter`. NaN stands for "not scored".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from grace_rl.errors import UserError
from grace_rl.recipe.schema import Section
from grace_rl.rollout.groups import group_counts, group_means, group_sums

if TYPE_CHECKING:
    from grace_rl.reward.loading import LoadedReward

EPSILON = 1e-4  # added to the standard deviation, as in TRL


class ShapingConfig(Section):
    """How the scores of prefixes become advantages; `shaping` in a recipe.

    Args:
        gae_lambda: 0 to 1. 1 is unbiased; 0 pays every segment for its own step only. Below 0.9
            it was worse than plain GRPO on scenes (docs/results.md).
        calibrate: Predict the final score from each prefix by a running regression, instead of
            taking the prefix's score for it. Does not bias lambda 1, and takes bias from the rest.
        penalty: At least 0. Every fall of the score by more than `margin` costs this share of it
            more. Changes what is optimal, so it fades to zero over the last third of training; 0.1
            to 0.3 where wanted.
        margin: Falls up to this are noise, in units of the score; at least 0. `None` is half the
            batch's median step.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "shaping"

    gae_lambda: float = Field(1.0, ge=0, le=1)
    calibrate: bool = True
    penalty: float = Field(0.0, ge=0)
    margin: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.margin is not None and self.penalty == 0:
            raise UserError("margin: has no effect without shaping.penalty")
        return self


def step_labels(rewards: Sequence[LoadedReward]) -> list[str]:
    """The rewards that give credit to segments. One with weight 0 is only logged."""
    return [reward.label for reward in rewards if reward.steps and reward.weight]


def shaping_problems(config: Any, rewards: Sequence[LoadedReward]) -> list[str]:
    """What keeps shaping, or the rewards that give credit to segments, from having an effect.

    Args:
        config: A `GraceGRPOConfig`.
        rewards: The recipe's. If none of them gives credit to segments, only what is given for
            such ones is checked.

    Returns:
        Each as `key: what to do`.
    """
    problems = []
    weights, with_steps = config.reader.weights, [one.label for one in rewards if one.steps]
    if with_steps and not config.reader.reads_with_language_model:
        problems.append(
            f"reader.weights: {', '.join(with_steps)} needs the embeddings of prefixes, which a "
            f"sentence encoder ({weights}) does not give; use policy or frozen"
        )
    paying = step_labels(rewards)
    if config.shaping.model_fields_set and not paying:
        problems.append("shaping: has no effect without a reward that returns steps: stepwise")
    if paying:
        problems += loss_problems(config, f"{', '.join(paying)} gives credit to segments")
    return problems


def loss_problems(config: Any, why: str) -> list[str]:
    """TRL's settings that would silently average the credit of segments away."""
    problems = []
    if config.importance_sampling_level != "token":
        problems.append(
            f"importance_sampling_level: {why}, and a ratio per sequence averages it; use token"
        )
    if config.use_liger_kernel:
        problems.append(f"use_liger_kernel: {why}, and its loss takes one advantage a rationale")
    if config.loss_type in ("luspo", "vespo"):
        problems.append(
            f"loss_type: {why}, and {config.loss_type} weighs whole sequences; use dapo, "
            "grpo, dr_grpo, bnpo, cispo or sapo"
        )
    if config.off_policy_mask_threshold is not None:
        problems.append(
            f"off_policy_mask_threshold: {why}, and the mask keeps or drops whole rationales by "
            "the sign of one advantage"
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        problems.append(
            f"multi_objective_aggregation: {why} of the total, which normalize_then_sum does not "
            "form; use sum_then_normalize"
        )
    return problems


# -- from scores to advantages ---------------------------------


def segment_rewards(scores: Tensor) -> Tensor:
    """What each segment adds to the score: (W, K+1) -> (W, K). They sum to s_K - s_0.

    >>> segment_rewards(torch.tensor([[0.0, 0.25, 0.25, 1.0]]))
    tensor([[0.2500, 0.0000, 0.7500]])
    """
    return scores[:, 1:] - scores[:, :-1]


def has_tokens(ends: Tensor) -> Tensor:
    """(W, K) whether a segment has any tokens: of a rationale too short for K, only the first."""
    return ends[:, 1:] > ends[:, :-1]


def shape_advantages(
    scores: Tensor,
    ends: Tensor,
    totals: Tensor,
    group: Tensor,
    *,
    gae_lambda: float,
    slopes: Tensor | None = None,
    intercepts: Tensor | None = None,
    penalty: float = 0.0,
    margin: float | None = None,
    scale: str = "group",
) -> Tensor:
    """An advantage for each segment.

    With one segment it is TRL's advantage, whatever lambda is (with `scale: batch` up to its scale,
    which here counts differences inside groups only).

    Args:
        scores: (W, K+1) s_0 ... s_K, weighted as in the total. A row with a NaN is taken as one
            segment.
        ends: (W, K+1).
        totals: (W,) the whole reward, gates included; NaN gets no advantage.
        group: (W,).
        gae_lambda: 0 to 1.
        slopes, intercepts: (K-1,) b_k and a_k of V_k for k = 1 ... K-1; 1 and 0 if not given.
        penalty, margin: as in `ShapingConfig`, the penalty as it is at this step.
        scale: `group`, `batch` or `none`, as TRL's `scale_rewards`.

    Returns:
        (W, K). Segments without tokens repeat the first one's.

    >>> scores = torch.tensor([[0.0, 0.8, 1.0], [0.0, 0.2, 1.0]])  # the same end, another way
    >>> ends, group = torch.tensor([[0, 5, 10]] * 2), torch.zeros(2, dtype=torch.long)
    >>> shape_advantages(scores, ends, scores[:, -1], group, gae_lambda=0.0, scale="none")
    tensor([[ 0.3000, -0.3000],
            [-0.3000,  0.3000]])
    """
    ends = torch.where(scores.isnan().any(1, keepdim=True), one_segment(ends), ends)
    present = has_tokens(ends)  # (W, K)
    values = prefix_values(scores, ends, totals, group, slopes, intercepts)
    deltas = segment_rewards(values)
    if penalty > 0:
        deltas = deltas - penalty * regressions(scores, margin).nan_to_num()
    credit = discounted_sums(deltas, gae_lambda).where(present, torch.nan)
    credit = centre(credit, group)
    if scale != "none":
        together = group if scale == "group" else torch.zeros_like(group)
        credit = credit / (pooled_std(credit, group, together)[:, None] + EPSILON)
    return credit.where(present, credit[:, :1]).nan_to_num()


def prefix_values(
    scores: Tensor,
    ends: Tensor,
    totals: Tensor,
    group: Tensor,
    slopes: Tensor | None = None,
    intercepts: Tensor | None = None,
) -> Tensor:
    """V_0 ... V_K, (W, K+1): the total as predicted after each segment, and at the end itself.

    V_0 is the group's mean of s_0, as one thing for a whole group drops out of its advantages. A
    row whose steps are not scored is one segment: all is paid on the first, and at the end.
    """
    first = group_means(scores[:, 0], group).nan_to_num()[:, None]
    inner = scores[:, 1:-1]
    if slopes is not None and intercepts is not None:
        inner = intercepts + slopes * inner
    values = torch.cat([first, inner, scores[:, -1:]], dim=1)
    whole = (ends == ends[:, -1:]) | scores.isnan().any(1, keepdim=True)
    whole = whole.index_fill(1, torch.tensor([0], device=ends.device), False)
    return torch.where(whole, totals[:, None], values)


def discounted_sums(deltas: Tensor, decay: float) -> Tensor:
    """sum over j >= k of decay^(j-k) deltas_j: (W, K) -> (W, K).

    >>> discounted_sums(torch.tensor([[1.0, 1.0, 1.0]]), 0.5)
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    sums = [deltas[:, -1]]
    for delta in reversed(deltas[:, :-1].unbind(1)):
        sums.insert(0, delta + decay * sums[0])
    return torch.stack(sums, dim=1)


def regressions(scores: Tensor, margin: float | None = None) -> Tensor:
    """(W, K) by how much each segment lowers the score beyond the margin, at least 0.

    `margin=None` is half the median step of the batch, steps of zero left out.
    """
    steps = segment_rewards(scores)
    if margin is None:
        sizes = steps.abs()[steps.nan_to_num() != 0]
        margin = float(sizes.median()) / 2 if len(sizes) else 0.0
    return (-steps - margin).clamp(min=0)


def faded_penalty(penalty: float, progress: float) -> float:
    """The penalty at a share of training, 0 to 1: whole for two thirds, then down to zero.

    >>> [round(faded_penalty(0.3, p), 2) for p in (0.0, 0.5, 0.75, 1.0)]
    [0.3, 0.3, 0.22, 0.0]
    """
    return penalty * min(1.0, max(0.0, 3 * (1 - progress)))


def centre(credit: Tensor, group: Tensor) -> Tensor:
    """Minus the mean of the group's other rollouts at the same k: (W, K), NaN = no such segment.

    Multiplied by (n-1)/n for a group of n rollouts, which makes it TRL's "minus the group's mean"
    where all of them have the segment. A segment that nobody else in the group has gets 0: there is
    nothing to compare it with.
    """
    counts = group_counts(credit, group)
    others = (counts - 1).clamp(min=1)
    whole = counts[:, :1].clamp(min=1)  # every scored rollout has a first segment
    factor = counts / others * (whole - 1) / whole
    centred = (credit - group_means(credit, group)) * factor
    return torch.where(counts > 1, centred, centred * 0)


def pooled_std(credit: Tensor, group: Tensor, together: Tensor) -> Tensor:
    """(W,) the standard deviation over all rollouts and segments of each row's `together`.

    Of centred credit, (W, K) with NaN. Every mean that was subtracted costs a degree of freedom,
    one for each segment number of each group. With one segment it is the sample standard deviation.
    """
    counts = group_counts(credit, group)
    freedom = ((counts - 1).clamp(min=0) / counts.clamp(min=1)).where(~credit.isnan(), torch.nan)
    squares = group_sums((credit**2).nansum(1), together)
    return (squares / group_sums(freedom.nansum(1), together).clamp(min=1e-9)).sqrt()


def one_segment(ends: Tensor) -> Tensor:
    """The same rationales uncut: 0, n, ..., n."""
    return torch.cat([ends[:, :1], ends[:, -1:].expand(-1, ends.shape[1] - 1)], dim=1)


def to_tokens(credit: Tensor, ends: Tensor, length: int) -> Tensor:
    """Segment credit on every token of its segment: (W, K) -> (W, length), 0 after the rationale.

    >>> to_tokens(torch.tensor([[1.0, -2.0]]), torch.tensor([[0, 2, 3]]), length=5)
    tensor([[ 1.,  1., -2.,  0.,  0.]])
    """
    position = torch.arange(length, device=ends.device).expand(len(ends), -1).contiguous()
    number = torch.searchsorted(ends[:, 1:].contiguous(), position, right=True)  # (W, length)
    padded = torch.cat([credit, torch.zeros_like(credit[:, :1])], dim=1)
    return padded.gather(1, number)
