"""The mask: what it may change, and what it may never depend on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from grace_rl_rewards.contrastive import Contrastive
from grace_rl_rewards.hard_negative import HardNegative

from grace_rl.data import guide as guides
from grace_rl.data.false_negatives import (
    FalseNegativeConfig,
    FalseNegatives,
    load_false_negatives,
)
from grace_rl.data.guide import Guide, build_guide, calibrate, row_texts
from grace_rl.errors import UserError
from grace_rl.reward import load_rewards
from grace_rl.reward.example import batch_of_pool, random_batch, split_batch

ROWS = [
    {"query": f"query {i}", "positive": f"positive {i}", "negative": [f"negative {i}"]}
    for i in range(4)
]


def two_alike(texts):
    """Rows 0 and 1 mean the same; all else is orthogonal."""
    axes = [0 if text[-1] == "1" and "negative" not in text else int(text[-1]) for text in texts]
    vectors = np.zeros((len(texts), 16))
    for row, (text, axis) in enumerate(zip(texts, axes, strict=True)):
        vectors[row, axis + 8 * ("negative" in text)] = 1
        vectors[row, 15] = 0.1
    return vectors


def mask(tmp_path: Path, **keywords) -> FalseNegatives:
    guide = build_guide(tmp_path / "guide", lambda: ROWS, "two_alike", two_alike)
    return FalseNegatives(FalseNegativeConfig(guide="two_alike", **keywords), guide)


def guided(batch, false_negatives):
    pool = dataclasses.replace(batch.pool, false_negatives=false_negatives)
    return batch_of_pool(pool, torch.arange(len(batch)))


def with_noise(batch, rows, seed=5):
    """The same batch with other embeddings in some pool rows."""
    pool = batch.pool
    embeddings = pool.embeddings.clone()
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
    embeddings[rows] = torch.nn.functional.normalize(noise, dim=1)[rows]
    return batch_of_pool(dataclasses.replace(pool, embeddings=embeddings), torch.arange(len(batch)))


@pytest.mark.parametrize(
    "reward",
    [Contrastive(), Contrastive(score="margin"), HardNegative()],
    ids=["contrastive", "contrastive-margin", "hard_negative"],
)
@pytest.mark.parametrize("mode", ["absolute", "margin", "ratio"])
def test_a_masked_candidate_has_no_influence(tmp_path, reward, mode):
    keywords = {"sigma": 0.9} if mode == "absolute" else {"margin": 0.05}
    batch = guided(random_batch("triplet"), mask(tmp_path, mode=mode, **keywords))
    first = batch.example == 0
    twin = (batch.pool.example == 1) & (batch.pool.side == 0)
    assert not batch.others()[first][:, twin].any()
    changed = with_noise(batch, twin)
    torch.testing.assert_close(reward(changed).values[first], reward(batch).values[first])
    free, freely_changed = guided(batch, None), guided(changed, None)
    difference = reward(freely_changed).values[first] - reward(free).values[first]
    assert difference.abs().max() > 1e-3  # it had influence before


def test_the_own_positive_is_never_masked_and_own_negatives_only_if_asked(tmp_path):
    everything = mask(tmp_path, mode="absolute", sigma=-0.5)
    batch = guided(random_batch("triplet"), everything)
    plain = random_batch("triplet")
    assert torch.equal(batch.positives(), plain.positives())
    assert not batch.others().any() and not batch.hard_negatives().any()
    assert Contrastive()(batch).values.isnan().all()  # nothing left to compare with: not scored
    trusted = mask(tmp_path, mode="absolute", sigma=-0.5, own_negatives=False)
    batch = guided(random_batch("triplet"), trusted)
    assert torch.equal(batch.hard_negatives(), plain.hard_negatives())


@pytest.mark.parametrize("mode", ["absolute", "margin", "ratio", "soft"])
def test_all_rollouts_of_a_group_share_their_mask_whatever_the_policy_wrote(tmp_path, mode):
    batch = guided(random_batch("triplet"), mask(tmp_path, mode=mode))
    weights = batch.negative_weights()
    for group in batch.group.unique():
        rows = weights[batch.group == group]
        assert (rows == rows[0]).all()
    everywhere = torch.ones(len(batch.pool), dtype=torch.bool)
    assert torch.equal(with_noise(batch, everywhere).negative_weights(), weights)


def test_the_mask_does_not_depend_on_the_temperature(tmp_path):
    batch = guided(random_batch("triplet"), mask(tmp_path, mode="absolute", sigma=0.9))
    twin = (batch.pool.example == 1) & (batch.pool.side == 0)
    first = batch.example == 0
    changed = with_noise(batch, twin)
    for temperature in (0.02, 0.1, 1.0):
        reward = Contrastive(temperature=temperature)
        torch.testing.assert_close(reward(changed).values[first], reward(batch).values[first])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree(tmp_path, processes):
    batch = guided(random_batch("triplet"), mask(tmp_path, mode="margin", margin=0.05))
    split = torch.cat([Contrastive()(part).values for part in split_batch(batch, processes)])
    torch.testing.assert_close(split, Contrastive()(batch).values)


def test_soft_weights_lie_between_masked_and_unmasked(tmp_path):
    batch = guided(random_batch("triplet"), mask(tmp_path, mode="soft", sigma=0.5, width=0.4))
    hard = guided(random_batch("triplet"), mask(tmp_path, mode="absolute", sigma=0.5))
    none = random_batch("triplet")
    first = batch.example == 0
    values = [Contrastive()(b).values[first] for b in (none, batch, hard)]
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


def test_a_guide_that_doubts_nothing_changes_nothing(tmp_path):
    batch = guided(random_batch("triplet"), mask(tmp_path, mode="absolute", sigma=1.0))
    for name in ("contrastive", "hard_negative"):
        (reward,) = load_rewards([name], tmp_path)
        plain = reward.function(random_batch("triplet"))
        assert torch.equal(reward.function(batch).values, plain.values)


# -- the guide ---------------------------------


def test_a_guide_gives_back_what_the_encoder_said(tmp_path):
    guide = build_guide(tmp_path, lambda: ROWS, "two_alike", two_alike)
    texts = [text for row in ROWS for text in row_texts(row)]
    expected = torch.nn.functional.normalize(torch.tensor(two_alike(texts)).float(), dim=1)
    torch.testing.assert_close(guide.vectors(texts), expected, atol=1e-3, rtol=0)
    assert (tmp_path / "vectors.npy").stat().st_size < 128 + len(texts) * 16 * 2 + 1
    with pytest.raises(UserError, match="has not seen 1 of the texts"):
        guide.vectors(["query 0", "a new text"])


def test_a_killed_guide_embeds_no_text_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(guides, "BLOCK_TEXTS", 3)
    seen: list[str] = []

    def dies(texts):
        if len(seen) >= 6:
            raise KeyboardInterrupt
        seen.extend(texts)
        return two_alike(texts)

    def lives(texts):
        seen.extend(texts)
        return two_alike(texts)

    with pytest.raises(KeyboardInterrupt):
        build_guide(tmp_path, lambda: ROWS, "two_alike", dies)
    build_guide(tmp_path, lambda: ROWS, "two_alike", lives)
    assert sorted(seen) == sorted(text for row in ROWS for text in row_texts(row))
    more = [*ROWS, {"text": "query 7"}]
    build_guide(tmp_path, lambda: more, "two_alike", lives)  # only the new one
    assert seen.count("query 7") == 1 and len(seen) == len(set(seen))
    with pytest.raises(UserError, match="holds vectors of two_alike, not of another"):
        build_guide(tmp_path, lambda: ROWS, "another", lives)


def test_vectors_of_an_encoder_that_has_changed_are_not_taken_for_its_own(tmp_path):
    encoder = tmp_path / "mine.py"
    encoder.write_text("def encode(texts):\n    return [[1.0, 2.0] for text in texts]\n")
    name, folder = f"{encoder}:encode", tmp_path / "guide"
    build_guide(folder, lambda: ROWS, name)
    build_guide(folder, lambda: ROWS, name)
    encoder.write_text(encoder.read_text().replace("2.0", "3.0"))
    with pytest.raises(UserError, match="holds vectors of another encoder of the name"):
        build_guide(folder, lambda: ROWS, name)


@pytest.mark.parametrize("name", ["guide.json", "keys.npy", "vectors.npy"])
def test_a_damaged_guide_is_one_line(tmp_path, name):
    build_guide(tmp_path, lambda: ROWS, "two_alike", two_alike)
    for content in (b"{}", b"", (tmp_path / name).read_bytes()[:-40], None):
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="guide") as error:
            Guide(tmp_path)
        assert len(error.value.problems) == 1 and "\n" not in error.value.problems[0]


def test_a_misspelt_encoder_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        build_guide(tmp_path, lambda: ROWS, str(tmp_path / "nowhere"))
    assert len(build_guide(tmp_path, lambda: ROWS, "two_alike", two_alike)) == 12
    config = FalseNegativeConfig(guide=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^false_negatives\.guide: "):
        load_false_negatives(config, ROWS, None)


def test_sigma_is_above_random_pairs_and_not_above_most_positives(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(300)]
    base = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))

    def encode(texts):
        noise = torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(len(texts)))
        return torch.stack([base[int(text[1:])] for text in texts]) + 0.3 * noise

    guide = build_guide(tmp_path, lambda: rows, "encode", encode)
    cross = (
        guide.vectors([r["query"] for r in rows]) @ guide.vectors([r["positive"] for r in rows]).T
    )
    own = cross.diagonal().clone()
    share = ((cross > guide.sigma).sum() - (own > guide.sigma).sum()) / (300 * 299)
    assert 0.003 < share < 0.008
    assert guide.sigma <= own.median()
    assert calibrate(guide, [{"text": "q1"}]) == (None, {})


def test_the_guide_in_the_run_folder_is_used_again(tmp_path):
    encoder = tmp_path / "mine.py"
    encoder.write_text(
        "def encode(texts):\n"
        "    open(__file__ + '.calls', 'a').write('x' * len(texts))\n"
        "    return [[1.0, float(len(text)), float(hash(text) % 7)] for text in texts]\n"
    )
    config = FalseNegativeConfig(guide=f"{encoder}:encode")
    for _ in range(2):
        load_false_negatives(config, ROWS, tmp_path)
    assert len((tmp_path / "mine.py.calls").read_text()) == 12
    ready = load_false_negatives(FalseNegativeConfig(guide=str(tmp_path / "guide")), ROWS, None)
    assert ready is not None and ready.sigma == Guide(tmp_path / "guide").sigma
    assert load_false_negatives(None, ROWS, None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guide": "x", "mode": "hard"}, "mode: must be one of"),
        (
            {"guide": "x", "mode": "margin", "sigma": 0.9},
            "sigma: belongs to mode absolute and soft",
        ),
        ({"guide": "x", "sigma": 1.5}, "sigma: must be at most 1"),
        ({"guide": "x", "sima": 0.5}, "sima: unknown key"),
        ({"mode": "soft"}, "guide: is missing"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        FalseNegativeConfig.of(values)


def test_a_mask_that_does_nothing_or_too_much_is_called_out(tmp_path):
    for share, words in ((0.0, "masked nothing"), (0.5, "masks 50%"), (0.01, None)):
        watched = mask(tmp_path, mode="absolute", sigma=0.9)
        said = [watched.watch(share) for _ in range(12)]
        assert said[:9] == [None] * 9 and said[10:] == [None, None]
        assert (words in said[9]) if words else said[9] is None
