"""Properties that every shipped reward has, and by name those that one of them lacks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from grace_rl_rewards.consistency import Consistency
from grace_rl_rewards.contrastive import Contrastive
from grace_rl_rewards.format import Format
from grace_rl_rewards.grace_published import GracePublished
from grace_rl_rewards.hard_negative import HardNegative
from grace_rl_rewards.length import Length

from grace_rl.reward import RewardOutput, RewardRuntime, group_means, load_rewards
from grace_rl.reward.batch import Rollouts
from grace_rl.reward.example import batch_of_pool, example_batch, random_batch, split_batch
from grace_rl.reward.runtime import weighted_totals

SHIPPED = {
    "contrastive": Contrastive(),
    "grace_published": GracePublished(),
    "consistency": Consistency(),
    "hard_negative": HardNegative(),
    "length": Length(),
    "format": Format(),
}
# Which of them a negative's embedding does not move, and why.
DEAF_TO_NEGATIVES = {
    "grace_published": "its negative terms are the same for a whole group and cancel",
    "consistency": "it compares a rollout with its siblings only",
    "length": "it looks at the rationale only",
    "format": "it looks at the rationale only",
}
FORMS = {
    "grace_published": ["published", "unsupervised"],
    **dict.fromkeys(SHIPPED.keys() - {"grace_published"}, ["triplet", "quad", "unsupervised"]),
}
CASES = [(name, form) for name in SHIPPED for form in FORMS[name]]


def ordinary(form, seed=0):
    """Random embeddings; in each group the second rollout is truncated, the third one empty."""
    pool = random_batch(form, rows=4, samples=4, seed=seed).pool
    count = len(random_batch(form, rows=4, samples=4).texts)
    places = torch.arange(len(pool)) % 4
    pool = dataclasses.replace(
        pool,
        truncated=(places == 1) & (torch.arange(len(pool)) < count),
        rationales=["" if place == 2 else "words words" for place in places.tolist()],
    )
    return batch_of_pool(pool, torch.arange(count))


def runtime(name):
    return RewardRuntime(load_rewards([SHIPPED[name]], "."))


def advantages(name, batch):
    """TRL's with `scale_rewards: none`, all weights 1."""
    one = runtime(name)
    scored = one.score(batch)
    totals = weighted_totals(scored.rewards, one.weights)
    return (totals - group_means(totals, scored.group)).nan_to_num()


def moved(batch, rows):
    """The same batch with some pool rows' embeddings replaced."""
    embeddings = batch.pool.embeddings.clone()
    new = torch.randn(len(rows), embeddings.shape[1], generator=torch.Generator().manual_seed(5))
    embeddings[rows] = torch.nn.functional.normalize(new, dim=1)
    return batch_of_pool(
        dataclasses.replace(batch.pool, embeddings=embeddings), torch.arange(len(batch))
    )


@pytest.mark.parametrize(("name", "form"), CASES)
def test_it_varies_within_groups(name, form):
    scored = runtime(name).score(ordinary(form))
    assert scored.metrics[next(m for m in scored.metrics if m.endswith("within_group_std"))] > 1e-3
    assert advantages(name, ordinary(form)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["triplet", "quad", "published"])
@pytest.mark.parametrize("name", list(SHIPPED))
def test_changing_a_negative_text_changes_the_advantages(name, form):
    if name == "grace_published" and form != "published":
        pytest.skip("grace_published is defined on its own roles only")
    batch = ordinary(form)
    batch = dataclasses.replace(batch, truncated=torch.zeros_like(batch.truncated))
    negative = [
        i
        for i, role in enumerate(batch.pool.roles)
        if role == "negative" and batch.pool.example[i] == 0
    ]
    kept = [i not in negative for i in range(len(batch))]  # what the others feel of it
    before = advantages(name, batch)[kept]
    changed = moved(batch, negative)
    changed = dataclasses.replace(changed, truncated=batch.truncated)
    difference = (advantages(name, changed)[kept] - before).abs().max()
    if name in DEAF_TO_NEGATIVES:
        assert difference < 1e-4, DEAF_TO_NEGATIVES[name]
    else:
        assert difference > 1e-4


@pytest.mark.parametrize("form", ["triplet", "quad"])
def test_every_single_negative_moves_the_contrastive_advantage(form):
    batch = random_batch(form, rows=3, samples=4)
    texts = batch.pool.by_text
    before = advantages("contrastive", batch)
    first = batch.group == batch.group[0]
    for g in range(len(texts.texts)):
        own_side = texts.example[g] == batch.example[0] and texts.side[g] == batch.side[0]
        if own_side:
            continue
        rows = (batch.pool.group == texts.group[g]).nonzero()[:, 0].tolist()
        after = advantages("contrastive", moved(batch, rows))
        assert (after - before)[first].abs().max() > 1e-4, texts.texts[g]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_order_of_rows_does_not_matter(name, form):
    batch = ordinary(form)
    count, more = len(batch), len(batch.pool) - len(batch)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)
    pool_order = torch.cat([order, count + torch.randperm(more, generator=generator)])
    shuffled = batch_of_pool(batch.pool, order)
    mixed = batch_of_pool(batch.pool, pool_order)
    pool = dataclasses.replace(
        batch.pool,
        **{f.name: getattr(mixed, f.name) for f in dataclasses.fields(Rollouts)},
    )
    for other in (shuffled, batch_of_pool(pool, torch.arange(count))):
        torch.testing.assert_close(
            advantages(name, other), advantages(name, batch)[order], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("processes", [2, 8])
def test_splitting_a_batch_over_processes_changes_no_value(name, form, processes):
    batch = ordinary(form)
    reward = SHIPPED[name]

    def parts_of(output):
        output = output if isinstance(output, RewardOutput) else RewardOutput(output)
        gate = torch.ones(len(output.values)) if output.gate is None else output.gate.float()
        return torch.stack([output.values, gate, *output.components.values()])

    split = [parts_of(reward(part)) for part in split_batch(batch, processes)]
    torch.testing.assert_close(
        torch.cat(split, dim=1), parts_of(reward(batch)), atol=1e-4, rtol=1e-4, equal_nan=True
    )


# contrastive


def test_contrastive_is_the_info_nce_loss():
    batch = random_batch("triplet", rows=4, samples=1)
    texts = batch.pool.by_text
    values = Contrastive(temperature=0.2)(batch).values
    logits = batch.embeddings @ texts.centroids.T / 0.2
    for b in range(len(batch)):
        own = (texts.example == batch.example[b]) & (texts.side == batch.side[b])
        target = int((own & (texts.group != batch.group[b])).nonzero())
        logits[b, texts.group == batch.group[b]] = -torch.inf
        loss = torch.nn.functional.cross_entropy(logits[b], torch.tensor(target))
        torch.testing.assert_close(values[b], -loss)


def test_contrastive_without_a_counterpart_uses_the_siblings():
    row = {"text": [[1, 0], [1, 0], [0, 1]]}
    batch = example_batch([row, {"text": [[0, 1], [0, 1], [0, 1]]}], ["text"])
    output = Contrastive()(batch)
    expected = torch.tensor([0.5, 0.5]).sqrt()
    torch.testing.assert_close(output.components["counterpart"][:2], expected)
    assert output.values[0] > output.values[2]


def test_contrastive_without_a_negative_scores_nothing():
    output = Contrastive()(random_batch("unsupervised", rows=1))
    assert output.values.isnan().all()
    assert all(column.isnan().all() for column in output.components.values())


def test_contrastive_clips_at_the_bottom():
    batch = random_batch("triplet", seed=1)
    free, clipped = Contrastive(0.05)(batch).values, Contrastive(0.05, clip=-2.0)(batch).values
    assert free.min() < -2
    torch.testing.assert_close(clipped, free.clamp(min=-2.0))


# grace_published: values worked out by hand from eq. 13 to 17 of arXiv 2510.04506

QUERY = ([1.0, 0.0], [0.0, 1.0])
DOCUMENT = ([[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.8, 0.6]])
NEGATIVE = ([0.0, 1.0], [1.0, 0.0])


def golden(truncated=None):
    rows = [
        {"query": [QUERY[i]], "positive": DOCUMENT[i], "negative": [NEGATIVE[i]]} for i in (0, 1)
    ]
    return example_batch(rows, ["positive"], truncated=truncated)


def test_golden_values_with_labels():
    output = GracePublished()(golden())
    torch.testing.assert_close(output.values, torch.tensor([9.6, 5.6, 9.6, 5.6]))
    parts = {name: column.tolist()[:2] for name, column in output.components.items()}
    assert parts["positive"] == pytest.approx([1.0, 0.6])
    assert parts["negative"] == [0.0, 0.0]
    assert parts["consistency"] == pytest.approx([0.6, 0.6])
    assert parts["cross"] == pytest.approx([0.8, 0.8])
    torch.testing.assert_close(
        advantages("grace_published", golden()), torch.tensor([2.0, -2.0, 2.0, -2.0])
    )


def test_golden_values_without_labels():
    rows = [{"text": DOCUMENT[i], "anchor": [QUERY[i]]} for i in (0, 1)]
    batch = example_batch(rows, ["text"])
    torch.testing.assert_close(GracePublished()(batch).values, torch.tensor([11.2, 5.6, 11.2, 5.6]))
    torch.testing.assert_close(
        advantages("grace_published", batch), torch.tensor([2.8, -2.8, 2.8, -2.8])
    )


def test_a_truncated_rollout_gets_the_constant_even_where_that_is_the_best():
    values = GracePublished()(golden(truncated=[True, False, False, False])).values
    torch.testing.assert_close(values, torch.tensor([-1.0, 5.6, 9.6, 5.6]))


@pytest.mark.parametrize("seed", range(3))
def test_its_negative_terms_cancel_in_the_advantage(seed):
    batch = random_batch("published", rows=3, samples=4, seed=seed)
    output = GracePublished()(batch)
    without = (output.components["positive"] + 0.2 * output.components["consistency"]) / 0.1
    expected = without - group_means(without, batch.group)
    torch.testing.assert_close(advantages("grace_published", batch), expected, atol=1e-4, rtol=0)
    assert output.components["negative"].abs().max() > 0.1  # they are not zero, they cancel
    assert output.components["cross"].abs().max() > 0.1


def test_its_cross_term_does_not_cancel_without_labels():
    batch = random_batch("unsupervised", rows=3, samples=4)
    cross = GracePublished()(batch).components["cross"]
    assert (cross - group_means(cross, batch.group)).abs().max() > 0.01


@pytest.mark.parametrize("form", ["triplet", "quad"])
def test_it_refuses_other_roles(form):
    with pytest.raises(ValueError, match="rollouts of 'positive'"):
        GracePublished()(random_batch(form))


def test_it_names_a_missing_anchor():
    batch = example_batch([{"positive": [[1, 0]]}], ["positive"])
    with pytest.raises(ValueError, match="needs the role 'query'"):
        GracePublished()(batch)


# the others


def test_consistency_is_the_mean_cosine_with_siblings():
    batch = random_batch("triplet", rows=2, samples=3)
    values = Consistency()(batch)
    cosine = batch.embeddings @ batch.embeddings.T
    expected = (cosine[0, 1] + cosine[0, 2]) / 2
    torch.testing.assert_close(values[0], expected)
    assert Consistency()(random_batch(samples=1)).isnan().all()


def test_hard_negative_goes_from_the_largest_to_the_mean():
    batch = random_batch("triplet", rows=4)
    texts = batch.pool.by_text
    cosine = batch.embeddings @ texts.centroids.T
    other = batch.example[:, None] != texts.example[None, :]
    largest = cosine.masked_fill(~other, -torch.inf).amax(1)
    mean = (cosine * other).sum(1) / other.sum(1)
    torch.testing.assert_close(HardNegative(1e-4)(batch).values, -largest, atol=1e-3, rtol=0)
    torch.testing.assert_close(HardNegative(1e3)(batch).values, -mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(HardNegative()(batch).components["hardest"], largest)


def test_hard_negative_may_count_the_own_row():
    one = random_batch("triplet", rows=1)
    assert HardNegative()(one).values.isnan().all()
    assert HardNegative(own_row=True)(one).values.isfinite().all()


def test_a_truncated_rollout_is_never_the_best_of_its_group():
    for seed in range(5):
        batch = ordinary("triplet", seed)
        both = RewardRuntime(load_rewards([Contrastive(), Length(), Format()], "."))
        totals = weighted_totals(both.score(batch).rewards, both.weights)
        for group in batch.group.unique():
            mine = batch.group == group
            cut = totals[mine & batch.truncated].max()
            assert cut < totals[mine & ~batch.truncated].max()
        alone = RewardRuntime(load_rewards([Contrastive(), Length(margin=0.5)], "."))
        totals = weighted_totals(alone.score(batch).rewards, alone.weights)
        for group in batch.group.unique():
            mine = batch.group == group
            cut = totals[mine & batch.truncated].max()
            assert cut <= totals[mine & ~batch.truncated].min() - 0.49


def test_length_charges_what_is_beyond_the_free_tokens():
    batch = example_batch([{"text": [[1, 0]] * 2}], ["text"], rationales=["a b", "a b c d"])
    output = Length(cost_per_token=0.1, free_tokens=3)(batch)
    torch.testing.assert_close(output.values, torch.tensor([0.0, -0.1]))
    assert output.components["tokens"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("arguments", "rationale", "passes"),
    [
        ({}, " \n ", False),
        ({}, "cat", True),
        ({"pattern": r"\A\w+, \w+\Z"}, "cat, asleep", True),
        ({"pattern": r"\A\w+, \w+\Z"}, "a cat, asleep", False),
        ({"pattern": "a.b"}, "a\nb", True),
        ({"tags": ["think", "facts"]}, "<think>x</think>\n<facts>y\nz</facts>", True),
        ({"tags": ["think", "facts"]}, "<facts>y</facts><think>x</think>", False),
        ({"tags": ["facts"]}, "<facts>y</facts><facts>y</facts>", False),
        ({"tags": ["facts"]}, "<facts>\n</facts> y <", False),
        ({"tags": ["facts"]}, "<facts>y", False),
        ({"tags": ["a.b"]}, "<axb>y</axb>", False),
    ],
)
def test_format_passes(arguments, rationale, passes):
    assert Format(**arguments).passes(rationale) is passes


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Contrastive(temperature=0), "temperature must be above 0"),
        (lambda: Contrastive(clip=1.0), "must be below 0"),
        (lambda: GracePublished(temperature=-1), "temperature must be above 0"),
        (lambda: HardNegative(temperature=0), "temperature must be above 0"),
        (lambda: Length(margin=0), "margin must be above 0"),
        (lambda: Length(cost_per_token=-1), "must not be below 0"),
        (lambda: Length(free_tokens=3), "no effect without cost_per_token"),
        (lambda: Format(pattern="("), "not a regular expression"),
        (lambda: Format(margin=-1), "margin must be above 0"),
    ],
)
def test_wrong_arguments_fail_when_it_is_built(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_plugins_import_the_contract_only():
    """And what reads with a model of its own may use what readers are made of."""
    from pathlib import Path

    import grace_rl_rewards

    for path in Path(grace_rl_rewards.__path__[0]).glob("*.py"):
        lines = path.read_text().splitlines()
        ours = {
            line.split()[1] for line in lines if line.startswith(("from grace", "import grace"))
        }
        others = ours - {"grace_rl.reward"}
        assert all(name.startswith("grace_rl.embed.") for name in others), path
