"""PPO's arithmetic against plain loops, on random numbers with masks."""

from __future__ import annotations

import math

import pytest
import torch

from grace_rl.credit.critic import (
    adapted_kl_coefficient,
    clipped_value_losses,
    explained_variance,
    gae,
    moments,
    place_rewards,
    whiten,
)

ROWS, TOKENS = 7, 13


def random_numbers(seed: int) -> tuple[torch.Tensor, ...]:
    """Rewards, values, old values (B, T), and a mask with ends, holes and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3, ROWS, TOKENS, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=generator)
    lengths[0] = 0
    mask = torch.arange(TOKENS) < lengths[:, None]
    mask &= torch.rand(ROWS, TOKENS, generator=generator) > 0.2
    return *numbers, mask


def textbook_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """The sum of the definition, term by term, on a list without holes."""
    errors = []
    for t, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        errors.append(reward + gamma * following - value)
    return [
        sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors)))
        for t in range(len(errors))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_is_the_textbook_sum(seed: int, gamma: float, lam: float) -> None:
    rewards, values, _, mask = random_numbers(seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(ROWS):
        kept = mask[row].nonzero()[:, 0].tolist()
        expected = textbook_gae(rewards[row, kept].tolist(), values[row, kept].tolist(), gamma, lam)
        for t, value in zip(kept, expected, strict=True):
            assert float(advantages[row, t]) == pytest.approx(value, abs=1e-6)
            assert float(returns[row, t]) == pytest.approx(value + float(values[row, t]), abs=1e-6)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_lambda_one_is_reward_to_go_minus_value() -> None:
    rewards, values, _, mask = random_numbers(0)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go * mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_value_loss_is_the_larger_error(clip: float | None) -> None:
    values, old, returns, _ = random_numbers(1)
    losses, clipped = clipped_value_losses(values, old, returns, clip)
    for row in range(ROWS):
        for t in range(TOKENS):
            v, o, r = (float(x[row, t]) for x in (values, old, returns))
            near = v if clip is None else o + min(max(v - o, -clip), clip)
            expected = 0.5 * max((v - r) ** 2, (near - r) ** 2)
            assert float(losses[row, t]) == pytest.approx(expected, abs=1e-6)
            if abs((near - r) ** 2 - (v - r) ** 2) > 1e-5:
                assert bool(clipped[row, t]) == ((near - r) ** 2 > (v - r) ** 2)


def test_whitening_and_explained_variance_see_marked_tokens_only() -> None:
    x, y, _, mask = random_numbers(2)
    kept = [float(v) for v in x[mask]]
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in kept) / len(kept))
    white = whiten(x, mask)
    assert white[mask].tolist() == pytest.approx([(v - mean) / deviation for v in kept], abs=1e-6)
    assert not white[~mask].any()

    left = [float(a - b) for a, b in zip(x[mask], y[mask], strict=True)]
    mean_left = sum(left) / len(left)
    variance_left = sum((v - mean_left) ** 2 for v in left) / len(left)
    expected = 1 - variance_left / deviation**2
    assert explained_variance(y, x, mask) == pytest.approx(expected, abs=1e-6)
    assert explained_variance(x, x, mask) == 1.0
    assert explained_variance(y, torch.ones_like(y), mask) == 0.0


def test_two_processes_whiten_as_one() -> None:
    """Each process adds the other's sums; the second pass needs the common mean."""
    x, _, _, mask = random_numbers(3)
    halves = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    sums: list[torch.Tensor] = []
    for part, part_mask in halves:
        p, m = part.double(), part_mask.double()
        sums.append(torch.stack([(p * m).sum(), m.sum()]))
    mean = (sums[0] + sums[1])[0] / (sums[0] + sums[1])[1]
    spreads = [(((p.double() - mean) ** 2) * m).sum() for p, m in halves]
    parts = []
    for number, (part, part_mask) in enumerate(halves):
        others = iter([sums[1 - number], spreads[1 - number]])
        parts.append(whiten(part, part_mask, lambda own, others=others: own + next(others)))
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask), atol=1e-6, rtol=0)
    assert float(moments(x, mask)[0]) == pytest.approx(float(mean), abs=1e-9)


def test_rewards_land_on_the_last_token_of_their_segment() -> None:
    generator = torch.Generator().manual_seed(4)
    rewards = torch.randn(3, 4, generator=generator)
    ends = torch.tensor([[2, 5, 8, 10], [1, 2, 3, 4], [6, 6, 6, 6]])
    mask = torch.arange(10) < ends[:, -1:]
    placed = place_rewards(rewards, ends, mask)
    expected = torch.zeros(3, 10)
    for row in range(3):
        for k in range(4):
            expected[row, ends[row, k] - 1] += rewards[row, k]
    torch.testing.assert_close(placed, expected)
    torch.testing.assert_close(placed.sum(1), rewards.sum(1))


def test_empty_rows_get_no_reward() -> None:
    placed = place_rewards(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 3))
    assert not placed.any()


def test_kl_coefficient_moves_towards_the_target_and_not_too_fast() -> None:
    assert adapted_kl_coefficient(0.1, 6.0, 6.0, 64, 1000) == 0.1
    assert adapted_kl_coefficient(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coefficient(0.1, 600.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted_kl_coefficient(0.1, 0.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)
