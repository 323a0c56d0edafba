"""What a reward sees: shapes are checked, masks say who may be a negative of whom."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from grace_rl.reward import RewardOutput, group_means, group_stds
from grace_rl.reward.example import example_batch, random_batch, split_batch, with_prefixes


def test_importing_the_contract_is_light():
    heavy = "{'trl', 'transformers', 'datasets', 'pandas'}"
    code = f"import sys, grace_rl.reward; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rationales", ["one"]),
        ("example", torch.zeros(3)),
        ("group", torch.zeros(4, dtype=torch.long)),
        ("embeddings", torch.zeros(8)),
        ("truncated", torch.zeros(8, dtype=torch.long)),
        ("prompts", ["x"]),
        ("columns", {"solution": ["x"]}),
        ("prefix_ends", torch.zeros(8, 2, dtype=torch.long)),
    ],
)
def test_a_wrong_field_is_named(field, value):
    batch = random_batch(rows=1, samples=4)
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(batch, **{field: value})


def test_the_pool_must_have_the_same_width():
    batch = random_batch(dim=8)
    with pytest.raises(ValueError, match="pool.embeddings has 4 dimensions"):
        dataclasses.replace(batch, pool=random_batch(dim=4).pool)


def test_a_prefix_differs_in_its_own_embeddings_only():
    batch = with_prefixes(random_batch("unsupervised", rows=3, samples=3), segments=2)
    whole = batch.prefix(2)
    torch.testing.assert_close(whole.embeddings, batch.embeddings)
    cut = batch.prefix(1)
    assert not torch.allclose(cut.embeddings, batch.embeddings)
    assert cut.pool is batch.pool and cut.prefix_embeddings is None
    for of_cut, of_whole in zip(cut.siblings_mean(), batch.siblings_mean(), strict=True):
        assert torch.equal(of_cut, of_whole)  # without the rollout itself, cut or whole
    assert torch.equal(cut.others(), batch.others())
    with pytest.raises(ValueError, match="steps = True"):
        cut.prefix(0)


def test_a_margin_is_positive():
    with pytest.raises(ValueError, match="margin is 0"):
        RewardOutput(values=[1.0], margin=0.0)


def test_masks_of_a_quad():
    batch = random_batch("quad", rows=2, samples=2)
    pool = batch.pool
    roles = list(zip(pool.roles, pool.example.tolist(), strict=True))
    row = batch.roles.index("query")  # of example 0

    def chosen(mask):
        return {roles[i] for i in mask[row].nonzero()[:, 0].tolist()}

    assert chosen(batch.positives()) == {("positive", 0)}
    assert chosen(batch.hard_negatives()) == {("negative", 0), ("negative_positive", 0)}
    assert chosen(batch.others()) == {(role, 1) for role in pool.roles}
    row = batch.roles.index("negative")
    assert chosen(batch.positives()) == {("negative_positive", 0)}
    assert chosen(batch.hard_negatives()) == {("query", 0), ("positive", 0)}


def test_the_anchor_of_a_text_is_its_positive():
    batch = random_batch("unsupervised", rows=2, samples=2)
    assert batch.positives().sum(1).tolist() == [1] * 4
    assert not batch.hard_negatives().any()


def test_a_text_of_the_own_side_is_never_a_negative():
    row = {"query": [[1, 0]], "positive": [[0, 1]], "negative": [[1, 1]]}
    texts = {
        (1, "query"): "positive 0",  # another row asks what this row's positive says
        (2, "negative"): "query 0",
        (0, "negative"): "query 0",  # a mistake in the data: the negative is the query itself
    }
    batch = example_batch([row] * 3, ["query", "positive"], texts=texts)
    allowed = batch.hard_negatives() | batch.others()
    assert batch.texts[:2] == ["query 0", "positive 0"]
    for own in (0, 1):
        against = {batch.pool.texts[i] for i in allowed[own].nonzero()[:, 0].tolist()}
        assert against == {"positive 1", "negative 1", "query 2", "positive 2"}
    assert bool(batch.positives()[0].any())  # the own side stays the positive


def test_one_centroid_per_text():
    batch = random_batch("triplet", rows=3, samples=4)
    pool, texts = batch.pool, batch.pool.by_text
    assert len(texts.texts) == 9
    for g, group in enumerate(texts.group.tolist()):
        mine = pool.group == group
        expected = torch.nn.functional.normalize(pool.embeddings[mine].mean(0), dim=0)
        torch.testing.assert_close(texts.centroids[g], expected)
        assert {pool.texts[i] for i in mine.nonzero()[:, 0].tolist()} == {texts.texts[g]}
        assert bool((texts.index[mine] == g).all())
    assert pool.group[texts.rows].tolist() == texts.group.tolist()


def test_siblings_mean_leaves_the_rollout_out():
    batch = random_batch("unsupervised", rows=2, samples=3)
    mean, count = batch.siblings_mean()
    expected = (batch.embeddings[1] + batch.embeddings[2]) / 2
    torch.testing.assert_close(mean[0], expected)
    assert count.tolist() == [2] * 6
    alone, count = random_batch(rows=2, samples=1).siblings_mean()
    assert count.tolist() == [0] * 4
    assert not alone.any()


def test_splitting_keeps_every_mask():
    batch = random_batch("quad", rows=3, samples=2)
    parts = split_batch(batch, 2)
    for method in ("positives", "hard_negatives", "others"):
        whole = getattr(batch, method)()
        assert torch.equal(whole, torch.cat([getattr(part, method)() for part in parts]))
    with pytest.raises(ValueError, match="do not divide over 5"):
        split_batch(batch, 5)


def test_group_statistics_leave_unscored_rows_out():
    nan = torch.nan
    values = torch.tensor([[1.0, nan], [3.0, nan], [nan, 2.0], [5.0, 4.0]])
    group = torch.tensor([4, 4, 4, 9])
    means = group_means(values, group)
    torch.testing.assert_close(means[:, 0], torch.tensor([2.0, 2.0, 2.0, 5.0]))
    torch.testing.assert_close(means[:, 1], torch.tensor([2.0, 2.0, 2.0, 4.0]))
    stds = group_stds(values, group)
    torch.testing.assert_close(
        stds[:, 0], torch.tensor([2**0.5, 2**0.5, 2**0.5, nan]), equal_nan=True
    )
    assert stds[:, 1].isnan().all()
