"""Small batches made by hand, for trying and testing a reward without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from grace_rl.reward.batch import Pool, RewardBatch
from grace_rl.rollout.rollouts import row_fields
from grace_rl.rollout.segments import Segmenter

FORMS: dict[str, dict[str, bool]] = {  # role -> is it trained
    "triplet": {"query": True, "positive": True, "negative": False},
    "quad": {"query": True, "positive": True, "negative": True, "negative_positive": True},
    "unsupervised": {"text": True, "anchor": False},
    "published": {"positive": True, "query": False, "negative": False},
}


def example_batch(
    rows: Sequence[Mapping[str, Sequence[Sequence[float]]]],
    trained: Sequence[str],
    *,
    rationales: Sequence[str] | None = None,
    truncated: Sequence[bool] | None = None,
    texts: Mapping[tuple[int, str], str] | None = None,
) -> RewardBatch:
    """A batch on one process, from the embeddings of each role's rollouts.

    Args:
        rows: one mapping per row of the data: role -> embeddings of its rollouts, any length above
            zero (they are normalised here).
        trained: the roles whose rollouts are scored; the others are anchors.
        rationales: of the scored rollouts, in the order of `rows`; also decide the token ids, one
            per word. The default is "words words ...".
        truncated: of the scored rollouts; the default is False.
        texts: (row, role) -> text, where it should not be "<role> <row>".

    >>> row = {"query": [[1, 0], [3, 4]], "positive": [[0, 2]]}
    >>> batch = example_batch([row], trained=["query"])
    >>> batch.texts, batch.pool.texts
    (['query 0', 'query 0'], ['query 0', 'query 0', 'positive 0'])
    >>> batch.embeddings
    tensor([[1.0000, 0.0000],
            [0.6000, 0.8000]])
    """
    entries = []  # (is an anchor, row, role, group, embedding)
    for row, roles in enumerate(rows):
        for role, written_for in roles.items():
            group = row * 8 + list(roles).index(role)
            entries += [(role not in trained, row, role, group, e) for e in written_for]
    entries.sort(key=lambda entry: entry[0])  # stable: trained rollouts first
    count = sum(not anchor for anchor, *_ in entries)
    more = len(entries) - count
    written = [*(rationales or ["words words"] * count), *["words words"] * more]
    embeddings = torch.tensor([entry[4] for entry in entries], dtype=torch.float32)
    pool = Pool(
        texts=[
            (texts or {}).get((row, "text" if role == "anchor" else role))
            or f"{'text' if role == 'anchor' else role} {row}"
            for _, row, role, _, _ in entries
        ],
        rationales=written,
        roles=[role for _, _, role, _, _ in entries],
        token_ids=[list(range(len(rationale.split()))) for rationale in written],
        example=torch.tensor([row for _, row, _, _, _ in entries]),
        group=torch.tensor([group for _, _, _, group, _ in entries]),
        side=torch.tensor([int(role.startswith("negative")) for _, _, role, _, _ in entries]),
        embeddings=torch.nn.functional.normalize(embeddings, dim=1),
        truncated=torch.tensor([*(truncated or [False] * count), *[False] * more]),
    )
    return batch_of_pool(pool, torch.arange(count))


def random_batch(
    form: Literal["triplet", "quad", "unsupervised", "published"] = "triplet",
    *,
    rows: int = 4,
    samples: int = 4,
    dim: int = 8,
    seed: int = 0,
) -> RewardBatch:
    """A batch with random embeddings that lean towards what their side of the row means.

    Args:
        form: which roles there are; `published` is the paper's (only the positive is trained).
        rows: of the data.
        samples: rollouts of each trained text; anchors have one.
        dim: of the embeddings.
        seed: of everything random here.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = []
    for _ in range(rows):
        scene = noise(dim)
        sides = [scene, scene + noise(dim)]  # a hard negative is not far
        made.append(
            {
                role: (
                    sides[role.startswith("negative")] + noise(samples if trained else 1, dim)
                ).tolist()
                for role, trained in FORMS[form].items()
            }
        )
    return example_batch(made, [role for role, trained in FORMS[form].items() if trained])


def with_prefixes(batch: RewardBatch, segments: int = 4, seed: int = 0) -> RewardBatch:
    """The batch with an embedding for every prefix: random at first, and ever nearer to the whole.

    Args:
        batch: its rationales need at least one token each.
        segments: K; rationales with fewer tokens are one segment.
        seed: of the noise.

    >>> batch = with_prefixes(random_batch("triplet"), segments=2)
    >>> batch.prefix_embeddings.shape, batch.prefix_ends[0]
    (torch.Size([32, 3, 8]), tensor([0, 1, 2]))
    """
    whole = batch.embeddings
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(seed))
    share = torch.linspace(0, 1, segments + 1)[None, :, None]
    mixed = share * whole[:, None] + (1 - share) * torch.nn.functional.normalize(noise)[:, None]
    cuts = Segmenter(segments, min_tokens=1)
    ends = [cuts.ends(ids) for ids in batch.token_ids]
    is_whole = torch.tensor([[end == row[-1] for end in row] for row in ends])[..., None]
    prefixes = torch.where(is_whole, whole[:, None], torch.nn.functional.normalize(mixed, dim=2))
    return dataclasses.replace(
        batch, prefix_embeddings=prefixes, prefix_ends=torch.tensor(ends, dtype=torch.long)
    )


def batch_of_pool(pool: Pool, rows: torch.Tensor) -> RewardBatch:
    """The batch of some rows of a pool: (B,) long -> B rollouts, with the pool shared."""
    chosen = {name: getattr(pool.take(rows), name) for name in row_fields(pool)}
    prompts = [f"Describe: {text}" for text in chosen["texts"]]
    return RewardBatch(**chosen | {"prompts": prompts}, pool=pool)


def split_batch(batch: RewardBatch, processes: int) -> list[RewardBatch]:
    """The same rollouts as several processes would see them, in world order, with one pool.

    Raises:
        ValueError: the rollouts do not divide evenly.
    """
    if len(batch) % processes:
        raise ValueError(f"{len(batch)} rollouts do not divide over {processes} processes")
    return [take_rows(batch, rows) for rows in torch.arange(len(batch)).chunk(processes)]


def take_rows(batch: RewardBatch, rows: torch.Tensor) -> RewardBatch:
    """Some rollouts of a batch in some order: (N,) long -> N rollouts, with the same pool."""
    return batch.take(rows)
