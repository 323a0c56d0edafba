"""`try_reward` names what a run would suffer from, each in its own sentence."""

from __future__ import annotations

import math

import pytest
import torch

from grace_rl.plugins import REWARDS, installed
from grace_rl.reward import load_rewards
from grace_rl.reward.example import take_rows
from grace_rl.reward.trial import canned_batches, try_reward

BATCHES = canned_batches()


def findings_of(reward):
    [loaded] = load_rewards([reward], ".")
    return {finding.name: finding for finding in try_reward(loaded, BATCHES)}


def length_of_rationale(batch):
    return [float(len(rationale)) for rationale in batch.rationales]


def test_a_sound_reward_has_no_complaint():
    assert {finding.level for finding in findings_of(length_of_rationale).values()} == {"ok"}


@pytest.mark.parametrize("name", sorted(set(installed(REWARDS)) - {"judge", "reconstruction"}))
def test_shipped_rewards_have_no_error_on_rollouts_that_they_take(name):
    if name == "grace_published":
        pytest.skip("takes only the published roles")
    assert "problem" not in {finding.level for finding in findings_of(name).values()}


def test_wrong_shapes_and_exceptions_are_errors_with_the_line():
    def short(batch):
        return [1.0]

    def broken(batch):
        return batch.no_such_field

    assert "1 values, but there are" in findings_of(short)["call"].message
    message = findings_of(broken)["call"].message
    assert "no_such_field" in message and "test_trial.py:" in message


def test_infinite_values_are_counted():
    def infinite(batch):
        return [math.inf if i == 0 else float(len(r)) for i, r in enumerate(batch.rationales)]

    assert "1 on canned triplet" in findings_of(infinite)["finite"].message


def test_what_never_varies_inside_a_group_is_an_error():
    def of_the_text(batch):
        return [float(len(text)) for text in batch.texts]

    finding = findings_of(of_the_text)["within-group variance"]
    assert finding.level == "problem" and "changes no advantage" in finding.message


def test_randomness_is_told_from_dependence_on_order():
    def random(batch):
        return torch.rand(len(batch))

    def by_place(batch):
        return torch.arange(len(batch)).float()

    found = findings_of(random)
    assert found["deterministic"].level == "warning" and "order" not in found
    assert "negatives" not in found  # whatever moves may be chance
    found = findings_of(by_place)
    assert found["deterministic"].level == "ok" and found["order"].level == "problem"


def test_rollouts_that_are_scored_by_their_place_are_found():
    def every_second(batch):
        return [float(len(r)) if i % 2 else None for i, r in enumerate(batch.rationales)]

    found = findings_of(every_second)["order"]
    assert found.level == "problem" and found.message.startswith("other rollouts are scored")


def test_an_odd_number_of_rollouts_can_be_shared():
    odd = {name: take_rows(batch, torch.arange(7)) for name, batch in BATCHES.items()}
    [loaded] = load_rewards([length_of_rationale], ".")
    assert {finding.level for finding in try_reward(loaded, odd)} == {"ok"}


def test_comparing_within_the_batch_is_found_by_splitting_it():
    def within_batch(batch):
        return (batch.embeddings @ batch.embeddings.T).sum(1)

    found = findings_of(within_batch)
    assert found["order"].level == "ok" and found["processes"].level == "problem"
    assert "batch.pool" in found["processes"].message


def test_negatives_that_cancel_are_told_from_negatives_that_work():
    def cancelling(batch):
        texts = batch.pool.by_text
        negatives = batch.hard_negatives()[:, texts.rows].float()
        of_text = (texts.centroids @ texts.centroids.T)[texts.index[: len(batch)]]
        own = torch.tensor([float(len(rationale)) for rationale in batch.rationales])
        return own - (of_text * negatives).sum(1)

    found = findings_of(cancelling)["negatives"]
    assert found.level == "warning" and "cancel" in found.message
    assert findings_of("contrastive")["negatives"].message == "negatives move advantages"
    assert "does not look" in findings_of(length_of_rationale)["negatives"].message
