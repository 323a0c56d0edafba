"""Which words earned it: each word of a rationale is left out, and what is left is read again.

Where a vector depends on the words (every reader that reads rationales), what a word earned can be
measured: with it minus without it, for the cosine to the text that means the same, for that to the
hardest negative, and for each reward that asks no model. Everything else stays: the other rollouts
of the step, their centroids, the mask of negatives, siblings.

The weights of the very step are gone, so the step's first checkpoint at or after it reads them all,
the whole rationales too; `StepCredit.likeness` says how near that is to the stored vectors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from grace_rl.errors import UserError
from grace_rl.inspect.beside import kept_credit, rollouts_stamp
from grace_rl.inspect.checkpoints import Checkpoint, checkpoint_after, checkpoints, loaded
from grace_rl.inspect.run import Run
from grace_rl.reward import RewardBatch, contrast_texts
from grace_rl.reward.consent import run_rewards
from grace_rl.reward.loading import LoadedReward, load_rewards
from grace_rl.reward.runtime import RewardRuntime
from grace_rl.reward.stored import stored_batch, stored_steps
from grace_rl.rollout.store import REWARD

AT_ONCE = 1024  # shortened rationales between two reports of progress


def shortened(rationale: str) -> list[tuple[str, str]]:
    """Each word of a rationale, and the rationale without it.

    >>> shortened("red fox runs")
    [('red', 'fox runs'), ('fox', 'red runs'), ('runs', 'red fox')]
    """
    found = re.finditer(r"\S+", rationale)
    return [
        (word[0], (rationale[: word.start()] + rationale[word.end() :].lstrip()).rstrip())
        for word in found
    ]


class StepCredit:
    """The rollouts of a stored step, read by one checkpoint, and what their words earned.

    Args:
        run: The run.
        step: A step whose rollouts are kept.
        rewards: What is measured besides the cosines; those that ask a model are left out.

    Attributes:
        checkpoint: What reads.
        likeness: Mean cosine of its vectors and the stored ones, -1 to 1; NaN where none are
            stored that can be compared.

    Raises:
        UserError: Nothing is stored of that step, or no checkpoint reads rationales.
    """

    def __init__(self, run: Run, step: int, rewards: Sequence[LoadedReward] = ()) -> None:
        self.step = step
        self.checkpoint: Checkpoint = loaded(run, checkpoint_after(run, step))
        self.rewards = [reward for reward in rewards if not reward.asks_a_model]
        self._runtime = RewardRuntime(self.rewards, main_process=False) if self.rewards else None
        (stored,) = stored_steps(run.path, [step])
        vectors = torch.from_numpy(self.checkpoint.read(stored.rationales, stored.texts))
        alike = stored.embeddings.shape == vectors.shape
        self.likeness = float((stored.embeddings * vectors).sum(1).mean()) if alike else np.nan
        same = dataclasses.replace(
            stored, embeddings=vectors, prefix_embeddings=None, prefix_ends=None, step_scores=None
        )
        self.batch = stored_batch(same, run.path)

    def measure(self, rows: Sequence[int]) -> Iterator[pd.DataFrame]:
        """Credit of every word of some rollouts, in parts of about `AT_ONCE` words.

        Args:
            rows: Places in the step's file; anchors have no credit and are left out.

        Yields:
            Tables with `step row group role place word`, `positive`, `negative` (cosines), `margin`
            (their difference), `reward/<label>` for each reward, and `credit`: their weighted sum,
            or the margin where no reward is measured.
        """
        waiting: list[tuple[int, int, str, str]] = []
        for row in (row for row in rows if row < len(self.batch)):
            parts = shortened(self.batch.rationales[row])
            waiting += [(row, place, word, rest) for place, (word, rest) in enumerate(parts)]
            if len(waiting) >= AT_ONCE:
                yield self._measured(waiting)
                waiting = []
        if waiting:
            yield self._measured(waiting)

    def _measured(self, words: Sequence[tuple[int, int, str, str]]) -> pd.DataFrame:
        rows = [row for row, _, _, _ in words]
        whole = self.batch.take(torch.tensor(rows))
        rests = [rest for _, _, _, rest in words]
        vectors = torch.from_numpy(self.checkpoint.read(rests, whole.texts))
        tokens = [item.token_ids for item in self.checkpoint.encoder.written(rests, whole.texts)]
        ends = {"rationales": rests, "token_ids": tokens}
        before, after = self._scores(whole, {}), self._scores(whole.read_as(vectors, **ends), ends)
        texts = contrast_texts(whole)
        hardest = texts.similarity.masked_fill(texts.weights == 0, -torch.inf).argmax(dim=1)
        to_hardest = texts.similarity.gather(1, hardest[:, None])[:, 0]
        near = contrast_texts(whole.read_as(vectors))
        negative = to_hardest - near.similarity.gather(1, hardest[:, None])[:, 0]
        negative[~(texts.weights > 0).any(dim=1)] = torch.nan
        positive = texts.counterpart - near.counterpart
        table = {
            "step": self.step,
            "row": rows,
            "group": whole.group.tolist(),
            "role": whole.roles,
            "place": [place for _, place, _, _ in words],
            "word": [word for _, _, word, _ in words],
            "positive": positive.numpy(),
            "negative": negative.numpy(),
            "margin": (positive - negative.nan_to_num()).numpy(),
        }
        earned = before - after
        for reward, column in zip(self.rewards, earned.T, strict=True):
            table[REWARD + reward.label] = column.numpy()
        weights = torch.tensor([reward.weight for reward in self.rewards])
        sums = (earned.nan_to_num() * weights).sum(1).numpy()
        return pd.DataFrame(table | {"credit": sums if self.rewards else table["margin"]})

    def _scores(self, batch: RewardBatch, words: dict[str, Any]) -> Tensor:
        """(V, R) what the rewards say; one that scores steps sees one prefix, the whole."""
        if self._runtime is None:
            return torch.empty(len(batch), 0)
        ends = torch.tensor([[len(ids)] for ids in batch.token_ids], dtype=torch.long)
        whole = {"prefix_embeddings": batch.embeddings[:, None], "prefix_ends": ends}
        return self._runtime.score(batch.read_as(batch.embeddings, **words, **whole)).values


@lru_cache(maxsize=2)
def _reading(run: Run, step: int, folder: Path, stamps: tuple[Any, ...]) -> StepCredit:
    return StepCredit(run, step, measurable_rewards(run)[0])


def measured(run: Run, step: int, rows: Sequence[int]) -> Iterator[tuple[float, Any]]:
    """What the words of some rollouts earned: from beside the run, or measured now.

    Yields:
        The share of the work that is done, and None; at last 1.0, the table and how it was read.

    Raises:
        UserError: As `StepCredit`.
    """
    if (kept := kept_credit(run, step)) is not None:
        table = kept[0][kept[0]["row"].isin(rows)]
        if len(table):  # whole groups are kept
            yield 1.0, (table, kept[1])
            return
    folder = checkpoints(run)[checkpoint_after(run, step)]
    stamps = (*rollouts_stamp(run, step), folder.stat().st_mtime_ns)
    credit = _reading(run, step, folder, stamps)
    parts: list[pd.DataFrame] = []
    for done, row in enumerate(rows):
        yield done / len(rows), None
        parts += credit.measure([row])
    yield 1.0, (pd.concat(parts) if parts else pd.DataFrame(), said(credit))


def two_cosines(
    checkpoint: Checkpoint, text: str, rationale: str, vectors: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """What each word of any rationale adds to its cosines with other vectors.

    Args:
        checkpoint: What reads.
        text: What the rationale is about.
        rationale: Anything.
        vectors: `positive`, `negative` or both, (H,) unit vectors.

    Returns:
        `place word`, a column for each vector, and `credit`: the first minus the second.
    """
    parts = shortened(rationale)
    read = checkpoint.read([rationale, *(rest for _, rest in parts)], [text] * (len(parts) + 1))
    table: dict[str, Any] = {"place": range(len(parts)), "word": [word for word, _ in parts]}
    for name, vector in vectors.items():
        cosines = read @ vector
        table[name] = (cosines[0] - cosines[1:]).astype(float)
    found = pd.DataFrame(table)
    return found.assign(credit=found["positive"] - found.get("negative", 0.0))


def measurable_rewards(run: Run) -> tuple[list[LoadedReward], str]:
    """The rewards of a run that may be called unasked, and else why not: "" where all may."""
    try:
        rewards = load_rewards(run_rewards(run.path), run.path)
    except UserError as error:
        return [], str(error)
    left_out = ", ".join(reward.label for reward in rewards if reward.asks_a_model)
    return rewards, f"not measured, since it asks a model: {left_out}" if left_out else ""


def said(credit: StepCredit) -> str:
    """How the words were read, in a sentence."""
    text = f"read by {credit.checkpoint.name}"
    if credit.likeness == credit.likeness:
        text += f", whose vectors have a mean cosine of {credit.likeness:.3f} to the stored ones"
    return text
