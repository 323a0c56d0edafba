"""Shaping moves credit and changes nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grace_rl.credit.calibration import Calibration, beta_advice, shaping_metrics
from grace_rl.credit.segments import (
    ShapingConfig,
    discounted_sums,
    has_tokens,
    prefix_values,
    regressions,
    segment_rewards,
    shape_advantages,
    shaping_problems,
    to_tokens,
)
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.errors import UserError
from grace_rl.recipe.fields import draft
from grace_rl.reward import group_means, group_stds, load_rewards
from grace_rl.train.grpo_config import GraceGRPOConfig

STEPWISE = load_rewards(["grace_rl_rewards.stepwise:Stepwise"], ".")
LAMBDAS = [1.0, 0.9, 0.5, 0.0]
nan = math.nan


def random_case(rows=24, segments=4, groups=4, seed=0):
    """Scores, ends, totals and groups; some rationales end before the last cut."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, segments + 1, generator=generator)
    group = torch.arange(groups).repeat_interleave(rows // groups)
    scores[:, 0] = group.float()  # nothing written yet: the same for a group
    lengths = torch.randint(1, 5 * segments + 3, (rows, 1), generator=generator)
    ends = torch.minimum(torch.arange(segments + 1) * 5, lengths)
    ends[:, -1:] = lengths
    scores = scores.where(ends < lengths, scores[:, -1:])
    totals = scores[:, -1] + torch.randn(rows, generator=generator)
    return scores, ends, totals, group


def plain_grpo(totals, group, scale):
    advantages = totals - group_means(totals, group)
    if scale == "none":
        return advantages
    return advantages / (group_stds(totals, group) + 1e-4)


@pytest.mark.parametrize("calibrated", [False, True])
def test_segments_are_paid_what_the_whole_is_paid(calibrated):
    scores, ends, totals, group = random_case()
    torch.testing.assert_close(segment_rewards(scores).sum(1), scores[:, -1] - scores[:, 0])
    fitted = {"slopes": torch.tensor([0.3, 0.7, 1.1]), "intercepts": torch.tensor([1.0, 0.0, -2])}
    values = prefix_values(scores, ends, totals, group, **(fitted if calibrated else {}))
    paid = segment_rewards(values)
    torch.testing.assert_close(paid.sum(1), totals - scores[:, 0], atol=1e-5, rtol=1e-5)
    assert (paid[~has_tokens(ends)] == 0).all()


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("gae_lambda", LAMBDAS)
@pytest.mark.parametrize("case", ["K is 1", "too short", "steps not scored"])
def test_one_segment_is_plain_grpo(gae_lambda, scale, case):
    scores, ends, totals, group = random_case(segments=1 if case == "K is 1" else 4)
    if case == "too short":
        ends = torch.cat([ends[:, :1], ends[:, -1:].expand(-1, 4)], dim=1)
        scores = torch.cat([scores[:, :1], scores[:, -1:].expand(-1, 4)], dim=1)
    if case == "steps not scored":
        scores = torch.full_like(scores, nan)
    totals[5] = nan
    expected = plain_grpo(totals, group, scale).nan_to_num()[:, None]
    written = torch.arange(30) < ends[:, -1:]
    credit = shape_advantages(scores, ends, totals, group, gae_lambda=gae_lambda, scale=scale)
    tokens = to_tokens(credit, ends, 30)
    torch.testing.assert_close(tokens, expected * written, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gae_lambda", LAMBDAS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_order_of_rows_and_of_groups_does_not_matter(gae_lambda, scale):
    scores, ends, totals, group = random_case()
    totals[3] = nan
    scores[7] = nan
    given = {"gae_lambda": gae_lambda, "scale": scale, "penalty": 0.2}
    credit = shape_advantages(scores, ends, totals, group, **given)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    renamed = torch.tensor([40, 3, 11, 7])[group]
    shuffled = shape_advantages(scores[order], ends[order], totals[order], renamed[order], **given)
    torch.testing.assert_close(shuffled, credit[order], atol=1e-5, rtol=1e-5)


def test_groups_of_any_size_and_a_lone_rollout():
    scores, ends, totals, _ = random_case(rows=6, groups=1)
    group = torch.tensor([0, 0, 0, 0, 1, 2])
    credit = shape_advantages(scores, ends, totals, group, gae_lambda=0.9)
    assert credit.isfinite().all() and (credit[4:] == 0).all()


def test_a_segment_that_nobody_else_has_is_compared_with_nothing():
    scores = torch.tensor([[0.0, 0.1, 0.9], [0.0, 0.4, 0.4], [0.0, 0.2, 0.2]])
    ends = torch.tensor([[0, 5, 9], [0, 4, 4], [0, 5, 5]])
    credit = shape_advantages(scores, ends, scores[:, -1], torch.zeros(3).long(), gae_lambda=1.0)
    assert credit[0, 1] == 0 and (credit[:, 0] != 0).all()


def enumerate_gradient(segments, gae_lambda, slopes, intercepts, lengths):
    """The exact expected gradient of a tabular policy over groups of two, and that of plain GRPO.

    A state is a prefix of actions; action 0 ends the text where `lengths` vary.
    """
    generator = torch.Generator().manual_seed(2)
    logits: dict = {}
    score: dict = {}

    def of(prefix):
        if prefix not in score:
            logits[prefix] = torch.randn(2, generator=generator)
            score[prefix] = float(torch.randn(1, generator=generator))
        return score[prefix]

    whole = []
    for actions in itertools.product(range(2), repeat=segments):
        stop = actions.index(0) + 1 if lengths == "vary" and 0 in actions else segments
        if actions[:stop] not in [a for a, _ in whole]:
            whole.append((actions[:stop], stop))
    rows = []
    for actions, length in whole:
        prefixes = [actions[: min(k, length)] for k in range(segments + 1)]
        scores = [of(p) for p in prefixes]
        chance = math.prod(float(logits[actions[:t]].softmax(0)[actions[t]]) for t in range(length))
        rows.append((actions, scores, [min(k, length) for k in range(segments + 1)], chance))

    shaped: dict = {p: torch.zeros(2, dtype=torch.float64) for p in logits}
    plain: dict = {p: torch.zeros(2, dtype=torch.float64) for p in logits}
    for pair in itertools.product(rows, repeat=2):
        scores = torch.tensor([row[1] for row in pair])
        ends = torch.tensor([row[2] for row in pair])
        totals = scores[:, -1]
        group = torch.zeros(2, dtype=torch.long)
        credit = shape_advantages(
            scores, ends, totals, group, gae_lambda=gae_lambda, scale="none",
            slopes=slopes, intercepts=intercepts,
        )  # fmt: skip
        chance = pair[0][3] * pair[1][3]
        for i, (actions, *_) in enumerate(pair):
            for t, action in enumerate(actions):
                prefix = actions[:t]
                direction = -logits[prefix].softmax(0).double()
                direction[action] += 1
                shaped[prefix] += chance * float(credit[i, t]) * direction
                plain[prefix] += chance * float(totals[i] - totals.mean()) * direction
    flat = [torch.cat([table[p] for p in logits]) for table in (shaped, plain)]
    return flat[0], flat[1]


@pytest.mark.parametrize("fitted", [None, ([0.4, 1.3], [0.2, -1.0])])
def test_at_lambda_1_the_expected_gradient_is_plain_grpos(fitted):
    slopes, intercepts = map(torch.tensor, fitted) if fitted else (None, None)
    shaped, plain = enumerate_gradient(3, 1.0, slopes, intercepts, "equal")
    assert plain.norm() > 0.1
    torch.testing.assert_close(shaped, plain, atol=1e-6, rtol=1e-5)
    biased, _ = enumerate_gradient(3, 0.0, slopes, intercepts, "equal")
    assert (biased - plain).norm() > 0.05


def test_with_texts_of_any_length_it_has_the_direction_of_the_exact_gradient():
    # Groups of two leave late segments without a partner, which scales what is left of them.
    shaped, plain = enumerate_gradient(3, 1.0, None, None, "vary")
    assert torch.nn.functional.cosine_similarity(shaped, plain, dim=0) > 0.9


def test_discounted_sums_are_the_recursion():
    deltas = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for decay in LAMBDAS:
        expected = torch.stack(
            [sum(decay ** (j - k) * deltas[:, j] for j in range(k, 4)) for k in range(4)], dim=1
        )
        torch.testing.assert_close(discounted_sums(deltas, decay), expected)


def test_only_falls_beyond_the_margin_cost():
    scores = torch.tensor([[0.0, 1.0, 0.95, 0.2], [0.0, 0.5, 0.5, 0.5]])
    expected = torch.tensor([[0.0, 0.0, 0.65], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(regressions(scores, margin=0.1), expected)
    assert regressions(scores)[0, 2] == pytest.approx(0.75 - 0.25)  # steps .05 .5 .75 1: .5 / 2
    ends, group = torch.tensor([[0, 3, 6, 9]] * 2), torch.zeros(2).long()
    given = {"gae_lambda": 1.0, "scale": "none"}
    without = shape_advantages(scores, ends, scores[:, -1], group, **given)
    with_ = shape_advantages(scores, ends, scores[:, -1], group, penalty=1.0, margin=0.1, **given)
    torch.testing.assert_close((with_ - without)[0], torch.tensor([-0.325] * 3))


def test_rest_of_the_reward_counts_at_the_end():
    scores, ends, totals, group = random_case()
    given = {"gae_lambda": 0.0, "scale": "none"}
    ends = torch.tensor([[0, 5, 10, 15, 20]]).expand_as(ends)
    alone = shape_advantages(scores, ends, scores[:, -1], group, **given)
    more = shape_advantages(scores, ends, totals, group, **given)
    torch.testing.assert_close(more[:, :-1], alone[:, :-1])
    rest = totals - scores[:, -1]
    torch.testing.assert_close((more - alone)[:, -1], rest - group_means(rest, group))


def test_calibration_finds_the_slope_inside_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(500).repeat_interleave(8)
    level = torch.randn(500, generator=generator)[group] * 10  # texts differ more than rollouts
    early = torch.randn(4000, generator=generator)
    late = 0.3 * early + level + 0.1 * torch.randn(4000, generator=generator)
    scores = torch.stack([level, early, late], dim=1)
    ends = torch.tensor([[0, 2, 4]]).expand(4000, -1)
    calibration = Calibration()
    assert calibration.slopes is None
    calibration.update(scores, ends, group)
    assert calibration.slopes.tolist() == pytest.approx([0.3], abs=0.02)
    metrics = shaping_metrics(scores, ends, group)
    assert metrics["shaping/beta_2"] == pytest.approx(0.3, abs=0.02)
    assert "0.3" in beta_advice(calibration.slopes, ShapingConfig())
    assert "calibrate: true" in beta_advice(calibration.slopes, ShapingConfig(calibrate=False))
    assert beta_advice(torch.tensor([0.8]), ShapingConfig()) is None


def test_calibration_ignores_whole_rationales_and_survives_empty_batches():
    scores, ends, _, group = random_case()
    whole = torch.cat([ends[:, :1], ends[:, -1:].expand(-1, 4)], dim=1)
    calibration = Calibration()
    calibration.update(scores, whole, group)
    assert calibration.slopes.tolist() == [1.0] * 3  # nothing seen
    calibration.update(scores, ends, group)
    before = calibration.slopes
    calibration.update(torch.full_like(scores, nan), ends, group)
    assert torch.equal(calibration.slopes, before)
    again = Calibration()
    again.load_state_dict(calibration.state_dict())
    assert torch.equal(again.slopes, before)
    assert torch.equal(again.intercepts, calibration.intercepts)


def test_metrics_count_segments_that_exist():
    scores = torch.tensor([[0.0, 0.5, 0.4], [0.0, 0.7, 0.7]])
    ends = torch.tensor([[0, 3, 6], [0, 3, 3]])
    metrics = shaping_metrics(scores, ends, torch.zeros(2).long())
    assert metrics["shaping/share_not_worse"] == pytest.approx(2 / 3)
    assert metrics["shaping/gain"] == pytest.approx(0.55)
    assert metrics["shaping/one_segment"] == 0.5
    assert all(math.isfinite(value) for value in metrics.values())


def settings(**changes):
    return draft(GraceGRPOConfig, changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"loss_type": "luspo"}, "loss_type"),
        ({"loss_type": "vespo"}, "loss_type"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"reader": ReaderConfig(weights="some/encoder")}, "reader.weights"),
    ],
)
def test_what_would_average_the_credit_away_is_refused(changes, key):
    (problem,) = shaping_problems(settings(**changes), STEPWISE)
    assert problem.startswith(f"{key}: ")
    # Without step rewards it is none of our business.
    assert not shaping_problems(settings(**changes), [])


def test_every_mistake_is_reported_together():
    bad = {"gae_lambda": 1.5, "calibrate": "yes", "penalty": -1, "margin": -1, "lam": 0}
    with pytest.raises(UserError) as caught:
        ShapingConfig(**bad)
    keys = {problem.partition(":")[0] for problem in caught.value.problems}
    assert keys == {f"shaping.{key}" for key in bad}
    (problem,) = shaping_problems(settings(shaping=ShapingConfig(gae_lambda=0.5)), [])
    assert problem.startswith("shaping: ")
    with pytest.raises(UserError, match="^shaping.margin: "):
        ShapingConfig(margin=0.1)
