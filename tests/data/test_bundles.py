"""Roles, bundles and their sampler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from grace_rl.data.bundles import Bundles, BundleSampler, Role, parse_roles
from grace_rl.errors import UserError
from grace_rl.recipe.roles import RoleConfig

ROWS = [
    {
        "query": f"q{i}",
        "positive": f"p{i}",
        "negative": [f"n{i}", f"m{i}"],
        "negative_positive": f"np{i}",
    }
    for i in range(5)
]


def roles(given: dict[str, dict[str, Any]], num_generations: int) -> list[Role]:
    typed = {name: RoleConfig(**options) for name, options in given.items()}
    return parse_roles(typed, num_generations)


def test_trained_texts_stand_together_and_anchors_apart() -> None:
    wanted = roles(
        {"query": {}, "positive": {"samples": 4}, "negative": {"samples": 2, "train": False}}, 4
    )
    bundles = Bundles(ROWS, wanted)
    assert [t.text for t in bundles.prompts[:4]] == ["q0", "p0", "q1", "p1"]
    assert [(t.text, samples) for t, samples in bundles.anchors[1]] == [("n1", 2), ("m1", 2)]
    sides = {t.text: t.side for t in bundles.prompts} | {
        t.text: t.side for a in bundles.anchors for t, _ in a
    }
    assert (sides["q0"], sides["p0"], sides["n0"], sides["m0"]) == (0, 0, 1, 2)


def test_groups_are_unique_over_the_data_set() -> None:
    bundles = Bundles(
        ROWS, roles({"query": {}, "negative": {"train": False}, "negative_positive": {}}, 2)
    )
    texts = bundles.prompts + [t for row in bundles.anchors for t, _ in row]
    assert len({t.group for t in texts}) == len(texts)


def test_unsupervised_rows_pair_a_text_with_itself() -> None:
    bundles = Bundles(
        [{"text": "a"}, {"text": "b"}], roles({"text": {}, "anchor": {"train": False}}, 2)
    )
    text, (anchor, _) = bundles.prompts[0], bundles.anchors[0][0]
    assert text.text == anchor.text and text.side == anchor.side and text.group != anchor.group


def test_every_mistake_in_roles_is_reported() -> None:
    with pytest.raises(UserError) as error:
        roles({"positive": {"samples": 3}, "text": {}}, 4)
    keys = [problem.partition(":")[0] for problem in error.value.problems]
    assert keys == ["roles.positive.samples", "roles"]


def test_a_role_must_be_trained() -> None:
    with pytest.raises(UserError, match="no role is trained"):
        roles({"query": {"train": False}}, 4)


def test_rows_without_a_trained_role_are_named() -> None:
    rows = [ROWS[0], {"query": "q", "positive": "p"}]
    with pytest.raises(UserError, match="row 1: has no 'negative'"):
        Bundles(rows, roles({"query": {}, "negative": {}}, 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_bundles_stay_in_one_generation_batch(processes: int) -> None:
    sampler = BundleSampler(
        rows=5, texts_per_row=2, samples=4, rows_per_batch=2, repeat_count=2, seed=3
    )
    order = list(sampler)
    assert len(order) == len(sampler) == 2 * 2 * 8 * 2
    batch = 2 * 2 * 4
    for start in range(0, len(order), batch):
        counts = Counter(order[start : start + batch])
        assert set(counts.values()) == {4}
        rows = Counter(prompt // 2 for prompt in counts)
        assert set(rows.values()) == {2}
    # each batch is yielded repeat_count times in a row
    assert order[:batch] == order[batch : 2 * batch]


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BundleSampler(
            rows=20, texts_per_row=1, samples=1, rows_per_batch=4, repeat_count=1, seed=seed
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)
