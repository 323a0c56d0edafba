"""The arithmetic of PPO on tensors: token rewards, GAE, whitening, value loss, KL coefficient.

Masks are true where a token was written by the policy and counts. A token in between that does not
count is stepped over: the next one that counts is its predecessor's successor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def place_rewards(segment_rewards: Tensor, segment_ends: Tensor, mask: Tensor) -> Tensor:
    """Put each segment's reward on the segment's last token.

    Args:
        segment_rewards: (B, K).
        segment_ends: (B, K) exclusive ends as token positions, `1 <= end <= T`; rewards of segments
            that end together add up. An outcome reward is one segment that ends with the text.
        mask: (B, T); a reward whose place does not count is dropped.

    Returns:
        (B, T).

    >>> mask = torch.tensor([[1, 1, 1, 0]])
    >>> place_rewards(torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 3]]), mask)
    tensor([[0.5000, 0.0000, 2.0000, 0.0000]])
    """
    placed = torch.zeros(mask.shape, dtype=segment_rewards.dtype, device=mask.device)
    return placed.scatter_add(1, (segment_ends - 1).clamp(min=0), segment_rewards) * mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over tokens; the text's end is terminal.

    Args:
        rewards: (B, T), paid for the token at t.
        values: (B, T), of the state before the token at t.
        mask: (B, T).
        gamma: Discount per token, in [0, 1].
        lam: In [0, 1]; 1 is the reward-to-go minus the value, 0 the one-step error.

    Returns:
        Advantages (B, T), and returns (B, T) = advantages + values, which the values shall learn;
        both 0 outside the mask.

    >>> mask = torch.tensor([[1, 1, 0]])
    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.5, 9.0]])
    >>> gae(rewards, values, mask, gamma=1.0, lam=1.0)
    (tensor([[0.5000, 0.5000, 0.0000]]), tensor([[1., 1., 0.]]))
    """
    mask = mask.bool()
    next_value = torch.zeros_like(values[:, 0])
    carried = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        error = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(mask[:, t], error + gamma * lam * carried, carried)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = carried
    advantages = advantages * mask
    return advantages, advantages + values * mask


def moments(
    x: Tensor, mask: Tensor, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over the tokens that count, as scalars; 0 and 0 without any.

    Args:
        x: (B, T).
        mask: (B, T).
        add_up: Adds a tensor up over all processes.
    """
    x, mask = x.double(), mask.double()
    total, count = add_up(torch.stack([(x * mask).sum(), mask.sum()]))
    mean = total / count.clamp(min=1.0)
    spread = add_up((((x - mean) ** 2) * mask).sum())
    return mean, spread / count.clamp(min=1.0)


def whiten(
    x: Tensor, mask: Tensor, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """Mean 0 and variance 1 over all tokens that count, on all processes; 0 elsewhere.

    Args:
        x: (B, T).
        mask: (B, T).
        add_up: Adds a tensor up over all processes.

    >>> whiten(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-1.,  1.,  0.]])
    """
    mean, variance = moments(x, mask, add_up)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) * mask).to(x.dtype)


def clipped_value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, and no gain from moving further than `clip` from the old value.

    Args:
        values, old_values, returns: (B, T).
        clip: Above 0, in units of the reward; `None` does not clip.

    Returns:
        (B, T) losses, and (B, T) bool: where the clipped error is the larger one.
    """
    errors = (values - returns) ** 2
    if clip is None:
        return 0.5 * errors, torch.zeros_like(errors, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped_errors = (near - returns) ** 2
    return 0.5 * torch.maximum(errors, clipped_errors), clipped_errors > errors


def explained_variance(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens that count; 0 if returns do not vary.

    1 is a perfect critic, 0 one that knows the mean at most, below 0 one that is worse than that.

    >>> returns = torch.tensor([[1.0, 2.0, 3.0]])
    >>> explained_variance(returns + 5, returns, torch.ones(1, 3))
    1.0
    """
    _, variance = moments(returns, mask, add_up)
    _, left = moments(returns - values, mask, add_up)
    return float(1 - left / variance) if variance > 0 else 0.0


def adapted_kl_coefficient(
    coefficient: float, kl: float, target: float, rollouts: int, horizon: int
) -> float:
    """The next KL coefficient of the proportional controller (arXiv 1909.08593, section 2.2).

    Args:
        coefficient: The present one, above 0.
        kl: Mean KL per rollout to the reference, in nats.
        target: Where it should be, in nats, above 0.
        rollouts: In the batch that `kl` is from.
        horizon: Rollouts in which the coefficient may change by about a fifth.

    >>> adapted_kl_coefficient(0.5, kl=12.0, target=6.0, rollouts=5000, horizon=10000)
    0.55
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * rollouts / horizon)
