"""The objective of GIRCSE, iterative contrastive refinement (ICR), term by term.

    L_k   = InfoNCE between the queries' and the candidates' embeddings after k steps
    total = mean_k L_k + weight * mean_k max(0, log L_(k+1) - log L_k)

The second term asks that no step is worse than the one before (arXiv 2509.24291). As published it
compares batch means, lets gradients into both sides and has no floor. Then a batch that gets worse
is also repaired by making the earlier step worse, and the pull is 1 / L, so that batches that are
solved already dominate. Here it is per example, the earlier step is held fixed, and losses below a
floor count as equal. `preset: paper` is the published form.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from grace_rl.recipe.schema import Section

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"steps": "sum", "per_example": False, "stop_gradient": False, "floor": 1e-8},
    "released": {"steps": "mean", "per_example": False, "stop_gradient": False, "floor": 1e-8},
}
"""`paper` sums the steps' losses, as the paper writes; `released` averages them, as its code."""


class ICRConfig(Section):
    """What is asked of the steps.

    Args:
        preset: What the other keys are unless they are given; see `PRESETS`.
        temperature: Cosines are divided by it, above 0; published .02.
        steps: `mean` or `sum` of the steps' losses, or only the `last` step's.
        weight: Weight of the regulariser, at least 0; published 1.
        floor: Added to the losses inside the logarithms, above 0.
        stop_gradient: Hold the earlier step fixed.
        per_example: Compare each example's losses, else the batch's means.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "icr"

    preset: Literal["default", "paper", "released"] = "default"
    temperature: float = Field(0.02, gt=0)
    steps: Literal["mean", "sum", "last"] = "mean"
    weight: float = Field(1.0, ge=0)
    floor: float = Field(0.01, gt=0)
    stop_gradient: bool = True
    per_example: bool = True

    @model_validator(mode="after")
    def _preset(self) -> Self:
        for name, value in PRESETS[self.preset].items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        return self


def step_losses(
    queries: Tensor,
    candidates: Tensor,
    positives: Tensor,
    mask: Tensor | None = None,
    temperature: float = 0.02,
) -> Tensor:
    """InfoNCE (arXiv 1807.03748) of every query, with both sides at step k.

    Args:
        queries: (Q, K, H), any length.
        candidates: (C, K, H).
        positives: (Q) the place of each query's positive among the candidates.
        mask: (Q, C) which candidates count: true or false, or shares from 0 to 1. Positives always
            do.
        temperature: Cosines are divided by it.

    Returns:
        (Q, K).

    >>> eye = torch.eye(2).unsqueeze(1)
    >>> step_losses(eye, eye, torch.arange(2), temperature=1.0)
    tensor([[0.3133],
            [0.3133]])
    """
    logits = torch.einsum(
        "qkh,ckh->qkc", normalize(queries.float(), dim=-1), normalize(candidates.float(), dim=-1)
    )
    logits = logits / temperature
    if mask is not None:
        share = mask.float().scatter(1, positives.unsqueeze(1), 1.0)
        logits = logits + share.log().unsqueeze(1)
    targets = positives.unsqueeze(1).expand(-1, logits.size(1))
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def regression_penalty(
    losses: Tensor, *, floor: float = 0.01, stop_gradient: bool = True, per_example: bool = True
) -> Tensor:
    """Mean rise of the log loss from one step to the next; falls count nothing.

    Args:
        losses: (Q, K) from `step_losses`.
        floor, stop_gradient, per_example: See `ICRConfig`.

    Returns:
        A scalar, at least 0; 0 for a single step.

    >>> round(float(regression_penalty(torch.tensor([[1.0, 0.5, 1.0]]), floor=1e-8)), 4)
    0.3466
    """
    if losses.size(1) < 2:
        return losses.new_zeros(())
    if not per_example:
        losses = losses.mean(0, keepdim=True)
    logs = (losses + floor).log()
    earlier = logs[:, :-1].detach() if stop_gradient else logs[:, :-1]
    return (logs[:, 1:] - earlier).relu().mean()


def icr_loss(losses: Tensor, config: ICRConfig) -> tuple[Tensor, Tensor]:
    """The objective of a batch, and its regulariser without the weight.

    Args:
        losses: (Q, K) from `step_losses`.
        config: What is asked.
    """
    means = losses.mean(0)
    main = {"mean": means.mean(), "sum": means.sum(), "last": means[-1]}[config.steps]
    penalty = regression_penalty(
        losses,
        floor=config.floor,
        stop_gradient=config.stop_gradient,
        per_example=config.per_example,
    )
    return main + config.weight * penalty if config.weight else main, penalty
