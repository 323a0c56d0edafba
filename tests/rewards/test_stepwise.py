"""Stepwise is its potential, asked after every segment."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from grace_rl_rewards.consistency import Consistency
from grace_rl_rewards.contrastive import Contrastive
from grace_rl_rewards.hard_negative import HardNegative
from grace_rl_rewards.length import Length
from grace_rl_rewards.stepwise import Stepwise

from grace_rl.reward import RewardOutput
from grace_rl.reward.example import batch_of_pool, random_batch, with_prefixes

POTENTIALS = {
    "log_softmax": Contrastive(),
    "clip": Contrastive(clip=-3.0),
    "probability": Contrastive(score="probability"),
    "margin": Contrastive(score="margin"),
    "hard_negative": HardNegative(),
    "consistency": Consistency(),
}


def values(reward, batch):
    output = reward(batch)
    return output.values if isinstance(output, RewardOutput) else output


def batch_with_prefixes(form="triplet", seed=0):
    return with_prefixes(random_batch(form, rows=4, samples=4, seed=seed), segments=2, seed=seed)


@pytest.mark.parametrize("form", ["triplet", "quad", "unsupervised"])
@pytest.mark.parametrize("name", list(POTENTIALS))
def test_the_last_step_is_the_value_and_the_potentials_value(name, form):
    batch = batch_with_prefixes(form)
    output = Stepwise(POTENTIALS[name])(batch)
    assert output.steps.shape == (len(batch), 3)
    assert torch.equal(output.steps[:, -1], output.values)
    torch.testing.assert_close(output.values, values(POTENTIALS[name], batch))


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_every_step_is_scored_against_the_same_texts(name):
    """A step is what the potential says of a rollout that stopped there, all others being whole."""
    batch = batch_with_prefixes("unsupervised")
    steps = Stepwise(POTENTIALS[name])(batch).steps
    for row in (0, 5, len(batch) - 1):
        embeddings = batch.pool.embeddings.clone()
        embeddings[row] = batch.prefix_embeddings[row, 1]
        pool = dataclasses.replace(batch.pool, embeddings=embeddings)
        alone = values(POTENTIALS[name], batch_of_pool(pool, torch.arange(len(batch))))
        torch.testing.assert_close(steps[row, 1], alone[row], atol=1e-5, rtol=1e-5)


def test_an_embedding_that_says_nothing_is_equally_far_from_every_text():
    batch = batch_with_prefixes("triplet")
    prefixes = batch.prefix_embeddings.clone()
    prefixes[:, 0] = 0.0
    batch = dataclasses.replace(batch, prefix_embeddings=prefixes)
    start = Stepwise("contrastive")(batch).steps[:, 0]
    negatives = (batch.hard_negatives() | batch.others())[:, batch.pool.by_text.rows].sum(1)
    torch.testing.assert_close(start, -torch.log(1.0 + negatives))


def test_potential_is_named_with_its_arguments():
    reward = Stepwise({"name": "contrastive", "temperature": 0.5, "score": "probability"})
    assert reward.potential.function.temperature == 0.5
    batch = batch_with_prefixes()
    steps = reward(batch).steps
    assert (steps >= 0).all() and (steps <= 1).all()


@pytest.mark.parametrize(
    ("potential", "says"),
    [
        ({"name": "contrastive", "temprature": 1}, r"potential\.temprature: "),
        ({"temperature": 1}, "potential"),
        ("contrastiv", "did you mean contrastive"),
        (Length(), "no gate"),
        (Stepwise(), "no steps"),
        (lambda completions, **_: [0.0] * len(completions), "no TRL function"),
        ({"name": "contrastive", "clip": -1.0, "score": "margin"}, r"potential\.clip: "),
        ({"name": "contrastive", "score": "rank"}, r"potential\.score: "),
    ],
)
def test_a_potential_is_a_plain_value_of_embeddings(potential, says):
    with pytest.raises(ValueError, match=says):
        Stepwise(potential)


def test_without_prefixes_it_says_why():
    with pytest.raises(ValueError, match="no prefix embeddings"):
        Stepwise()(random_batch())


def test_over_text_pays_what_the_rationale_adds():
    batch = batch_with_prefixes("quad")
    whole, adds = Stepwise()(batch), Stepwise(over_text=True)(batch)
    torch.testing.assert_close(adds.values, whole.values - whole.steps[:, 0])
    assert not adds.steps[:, 0].any()
    torch.testing.assert_close(adds.steps.diff(dim=1), whole.steps.diff(dim=1))
    with pytest.raises(ValueError, match="over_text"):
        Stepwise.check("contrastive", over_text="yes")
