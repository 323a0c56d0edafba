"""Trying a reward on a few rollouts, and saying what a run with it would suffer from.

`grace-rl rewards check` prints what `try_reward` finds. It calls the reward as training does,
through `RewardRuntime`, so whatever would end a run is found here, with the line of the file.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from grace_rl.embed.similarity import rank_correlation
from grace_rl.errors import Finding
from grace_rl.recipe import RewardSpec
from grace_rl.reward.batch import RewardBatch
from grace_rl.reward.example import (
    batch_of_pool,
    random_batch,
    take_rows,
    with_prefixes,
)
from grace_rl.reward.loading import LoadedReward, load_rewards
from grace_rl.reward.runtime import RewardError, RewardRuntime, Scored
from grace_rl.rollout.groups import group_means, group_stds

Score = Callable[[RewardBatch], Scored]
SLOW = 5.0  # seconds; a reward that fails after so long waits for something
TOLERANCE = 1e-5  # relative; float32 sums in another order
PEERS = ("contrastive", "consistency", "hard_negative", "length")
TEXTS = {
    "query": "A grey cat sleeps on the warm roof of a house.",
    "positive": "An animal is asleep outside, on a roof in the sun.",
    "negative": "A grey dog sleeps on the warm roof of a house.",
    "negative_positive": "Another animal, a dog, is asleep on a roof.",
    "text": "A grey cat sleeps on the warm roof of a house.",
}
RATIONALES = (
    "A grey cat sleeps on the warm roof.",
    "cat roof",
    "An animal rests outside in the sun, and it does not move for a long time.",
    "The cat. The cat. The cat. The cat.",
)


def canned_batches() -> dict[str, RewardBatch]:
    """Rollouts made by hand, a batch for each form of rows, with texts, prefixes and truncation."""
    batches = {}
    for form in ("triplet", "quad", "unsupervised"):
        batch = random_batch(form, rows=4, samples=4)  # type: ignore[arg-type]
        own, count = len(batch), len(batch.pool)
        rationales = [RATIONALES[i % 4] for i in range(count)]
        pool = dataclasses.replace(
            batch.pool,
            texts=[
                f"{TEXTS['text' if role == 'anchor' else role]} Place {example}."
                for role, example in zip(batch.pool.roles, batch.pool.example.tolist(), strict=True)
            ],
            rationales=rationales,
            token_ids=[list(range(len(rationale.split()))) for rationale in rationales],
            truncated=torch.tensor([i % 4 == 3 for i in range(count)]),
        )
        batches[f"canned {form} rollouts"] = with_prefixes(batch_of_pool(pool, torch.arange(own)))
    return batches


def try_reward(reward: LoadedReward, batches: Mapping[str, RewardBatch]) -> list[Finding]:
    """Call a reward on every batch and look at what it returns.

    Args:
        reward: From `load_rewards`.
        batches: By the name to call them in messages; the first that it can score is also used for
            timing and comparison.

    Returns:
        What was found, errors first.
    """
    findings: list[Finding] = []
    scored: dict[str, Scored] = {}
    score = scorer(reward)
    for name, batch in batches.items():
        start = time.perf_counter()
        try:
            scored[name] = score(batch)
        except RewardError as error:
            findings.append(Finding("call", f"on {name}: {error}", "problem"))
            if time.perf_counter() - start > SLOW:  # each batch might wait for the same service
                break
    if not scored:
        return findings
    values = {name: result.values[:, 0] for name, result in scored.items()}
    findings += [
        value_range(values.values()),
        _nonfinite(scored, reward),
        _variance(scored, batches, reward),
    ]
    first = next(iter(scored))
    repeated = _repeat(score, batches[first], values[first], first)
    findings += repeated
    if repeated[0].level == "ok":  # else any change could be chance
        findings.append(_negatives(score, batches, values))
    findings.append(_peers(reward, batches[first], values[first]))
    findings.append(_time(score, batches[first]))
    order = ("problem", "warning", "ok")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def scorer(reward: LoadedReward) -> Score:
    """What calls a reward as training does, on one process."""
    runtime = RewardRuntime([reward])

    def score(batch: RewardBatch) -> Scored:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the runtime warns about is a finding here
            return runtime.score(batch)

    return score


def value_range(values: Iterable[Tensor]) -> Finding:
    """Lowest, highest and mean of what a reward gave, and how much it left unscored."""
    whole = torch.cat(list(values)) + 0.0  # not -0
    known = whole[~whole.isnan()]
    if not len(known):
        return Finding("range", "it scored no rollout at all", "problem")
    share = len(known) / len(whole)
    unscored = "" if share == 1 else f"; {1 - share:.0%} of the rollouts were not scored"
    text = f"{float(known.min()):.4g} to {float(known.max()):.4g}, mean {float(known.mean()):.4g}"
    return Finding("range", text + unscored, "ok" if share > 0.5 else "warning")


def _nonfinite(scored: Mapping[str, Scored], reward: LoadedReward) -> Finding:
    counts = {
        name: result.metrics[f"rewards/{reward.label}/nonfinite"] for name, result in scored.items()
    }
    bad = [f"{count:.0f} on {name}" for name, count in counts.items() if count]
    if bad:
        message = f"infinite values, which count as not scored: {', '.join(bad)}"
        return Finding("finite", message, "problem")
    return Finding("finite", "no infinite value")


def _variance(
    scored: Mapping[str, Scored], batches: Mapping[str, RewardBatch], reward: LoadedReward
) -> Finding:
    flat, spreads = [], []
    for name, result in scored.items():
        std = group_stds(result.values[:, 0], batches[name].group).nan_to_num()
        scale = float(result.values.nan_to_num().abs().max())
        spreads.append(float(std.mean()))
        if float(std.max()) <= 1e-6 * scale:
            flat.append(name)
    text = f"standard deviation inside groups {sum(spreads) / len(spreads):.4g}"
    if not flat:
        return Finding("within-group variance", text)
    if reward.gates:
        return Finding("within-group variance", f"{text}; a gate may be flat")
    message = (
        f"none on {', '.join(flat)}: what is the same for all rollouts of a text changes no "
        "advantage; compare batch.embeddings, or something that the rationale decides"
    )
    return Finding(
        "within-group variance", message, "problem" if len(flat) == len(scored) else "warning"
    )


def _repeat(score: Score, batch: RewardBatch, values: Tensor, name: str) -> list[Finding]:
    """Is it deterministic, and does the order or the split of the batch matter?"""
    again = score(batch).values[:, 0]
    if not _same(again, values):
        message = (
            f"{_change(again, values)} from one call to the next on {name}; derive random numbers "
            "from batch.seed and batch.step, so that a resumed run scores alike"
        )
        return [Finding("deterministic", message, "warning")]
    findings = [Finding("deterministic", "two calls agree")]
    order = torch.arange(len(batch) - 1, -1, -1)
    turned = score(take_rows(batch, order)).values[:, 0]
    if _same(turned, values[order]):
        findings.append(Finding("order", "the order of the rollouts does not matter"))
    else:
        message = f"{_change(turned, values[order])} when the rollouts come in another order"
        findings.append(Finding("order", message, "problem"))
    halves = torch.arange(len(batch)).tensor_split(2)  # a stored step may have an odd number
    parts = [take_rows(batch, half) for half in halves if len(half)]
    split = torch.cat([score(part).values[:, 0] for part in parts])
    if _same(split, values):
        findings.append(Finding("processes", "1 and 2 processes give the same values"))
    else:
        message = (
            f"{_change(split, values)} when two processes share the batch; compare with "
            "batch.pool, which is the same on all, not within batch"
        )
        findings.append(Finding("processes", message, "problem"))
    return findings


def _negatives(
    score: Score, batches: Mapping[str, RewardBatch], values: Mapping[str, Tensor]
) -> Finding:
    """Do advantages change when the negatives (anchors, never in the batch) are other vectors?"""
    name = next((n for n in values if "negative" in batches[n].pool.roles[len(batches[n]) :]), None)
    if name is None:
        return Finding("negatives", "not looked at: no rollouts with negative anchors")
    batch = batches[name]
    rows = torch.tensor([role == "negative" for role in batch.pool.roles])
    rows[: len(batch)] = False
    noise = torch.randn(batch.pool.embeddings.shape, generator=torch.Generator().manual_seed(0))
    moved = torch.where(
        rows[:, None], torch.nn.functional.normalize(noise, dim=1), batch.pool.embeddings
    )
    other = dataclasses.replace(batch, pool=dataclasses.replace(batch.pool, embeddings=moved))
    after = score(other).values[:, 0]
    within = [v - group_means(v, batch.group) for v in (values[name], after)]
    if not _same(values[name], after) and _same(within[0], within[1]):
        message = (
            "negatives move its values, but equally for all rollouts of a text, so they cancel in "
            "the advantages; let the rollout's own embedding meet the negatives"
        )
        return Finding("negatives", message, "warning")
    if _same(values[name], after):
        return Finding("negatives", "it does not look at negatives")
    return Finding("negatives", "negatives move advantages")


def _peers(reward: LoadedReward, batch: RewardBatch, values: Tensor) -> Finding:
    """Rank correlation with shipped rewards, inside groups."""
    own = values - group_means(values, batch.group)
    found = []
    for peer in load_rewards([RewardSpec(name) for name in PEERS], "."):
        theirs = scorer(peer)(batch).values[:, 0]
        theirs = theirs - group_means(theirs, batch.group)
        known = ~(own.isnan() | theirs.isnan())
        if known.any() and min(float(own[known].std()), float(theirs[known].std())) > 0:
            correlation = rank_correlation(own[known].tolist(), theirs[known].tolist())
            found.append(f"{peer.label} {correlation:+.2f}")
    text = "rank correlation inside groups: " + (", ".join(found) or "none can be computed")
    return Finding("shipped rewards", text)


def _time(score: Score, batch: RewardBatch) -> Finding:
    start = time.perf_counter()
    score(batch)
    seconds = (time.perf_counter() - start) / len(batch) * 1000
    return Finding("time", f"{seconds:.3g} s for 1,000 rollouts")


def _change(a: Tensor, b: Tensor) -> str:
    if not torch.equal(a.isnan(), b.isnan()):
        return "other rollouts are scored"
    return f"values move by up to {_distance(a, b):.3g}"


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).nan_to_num().abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    scale = max(1.0, float(b.nan_to_num().abs().max()))
    return torch.equal(a.isnan(), b.isnan()) and _distance(a, b) <= TOLERANCE * scale
