"""A contrastive loss beside the rewards: the policy learns to read what it learns to write.

Rewards move the words that are written; nothing moves how they are read, except by accident. This
loss is InfoNCE as the shipped reward `contrastive` has it, of the same rollouts, masks and
negatives, but with a gradient through the reader: minus the log-softmax at the counterpart.

The rollouts of a mini-batch are read with the weights as they are now. What they are compared with
is the pool of the batch, as it was read when it was written: so one mini-batch has every text of
every process as candidates, and nothing has to be exchanged between processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from grace_rl.data.false_negatives import FalseNegatives
from grace_rl.embed.reader import Reader, Written
from grace_rl.recipe.schema import Section
from grace_rl.reward import RewardBatch, contrast_texts
from grace_rl.reward.batch import reward_batch
from grace_rl.rollout.rollouts import Rollouts

WEIGHT_STEP = 1.05


class ReaderLossConfig(Section):
    """The recipe's `reader_loss`.

    Args:
        weight: Factor of the loss beside the policy's, above 0.
        temperature: Divides the cosines, above 0.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "reader_loss"

    weight: float = Field(0.1, gt=0)
    temperature: float = Field(0.1, gt=0)


def reader_loss_problems(config: Any) -> list[str]:
    """What keeps the loss of a `GraceGRPOConfig` from having an effect."""
    problems = []
    if config.reader_loss is not None and config.reader.weights != "policy":
        problems.append(
            "reader_loss: nothing could learn to read with reader.weights: "
            f"{config.reader.weights}; it needs policy"
        )
    if config.reader_loss is None and config.reader.learn_weight:
        problems.append("reader.learn_weight: follows reader_loss, and there is none")
    if config.reader_loss is not None and config.use_liger_kernel:
        problems.append("reader_loss: the fused loss of use_liger_kernel has no place for it")
    return problems


def learn_weight(
    reader: Reader,
    raw: Tensor,
    world: Rollouts,
    temperature: float,
    false_negatives: FalseNegatives | None = None,
) -> None:
    """Move a `joint` reader's weight by one small step to where the loss of a batch is less.

    Three weights are tried: the present one, and one 5% below and above. So the weight follows many
    batches, none moves it far, and every process, which sees the same batch, moves it alike.

    Args:
        reader: Of span `joint`.
        raw: (N, 2H) what it has read of all processes' rollouts and anchors.
        world: These N rollouts.
        temperature: Of the loss.
        false_negatives: As the rewards have it.
    """
    trained = slice(0, int(world.trained.sum()))
    losses = {}
    for weight in (reader.weight, reader.weight / WEIGHT_STEP, reader.weight * WEIGHT_STEP):
        reader.weight = weight
        read = dataclasses.replace(
            world, embeddings=reader.finish(raw), prefix_embeddings=None, prefix_ends=None,
            step_scores=None,
        )  # fmt: skip
        contrast = contrast_texts(reward_batch(read, trained, false_negatives))
        values = contrast.log_softmax(temperature)[contrast.scored]
        losses[weight] = float(-values.mean()) if len(values) else 0.0
    reader.weight = min(losses, key=lambda weight: losses[weight])


class ReaderLoss:
    """The loss of one batch of rollouts, mini-batch by mini-batch.

    Args:
        config: Weight and temperature.
        reader: The policy's.
        written: The B rollouts of this process.
        batch: What their rewards saw: B rollouts and the pool of all processes.

    Attributes:
        weight: Factor of the loss beside the policy's.
    """

    def __init__(
        self,
        config: ReaderLossConfig,
        reader: Reader,
        written: Sequence[Written],
        batch: RewardBatch,
    ) -> None:
        self._reader = reader
        self._temperature = config.temperature
        self._batch = batch
        self.weight = config.weight
        self.written = written

    def __call__(self, rows: Tensor, raw: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the rollouts `rows`, which the reader has just read anew.

        Args:
            rows: (b,) long, which of the B rollouts.
            raw: (b, H) their raw vectors, with a gradient.
            usable: (b,) bool, False where a rollout was hidden from the forward.

        Returns:
            The mean over `rows`, in nats, where those without a counterpart or a negative count as
            0; and the share of the others that are nearer to their counterpart than to any
            negative (NaN where there are none).
        """
        known = self._batch.embeddings
        vectors = self._reader.finish(raw).to(known)
        contrast = contrast_texts(self._batch.read_as(known.index_copy(0, rows, vectors)))
        values = contrast.log_softmax(self._temperature)[rows]
        hits, counts = contrast.accuracy[rows].detach(), usable & contrast.scored[rows]
        loss = -values.where(counts, 0.0).sum() / len(rows)
        return loss, hits.where(counts, torch.nan).nanmean()
