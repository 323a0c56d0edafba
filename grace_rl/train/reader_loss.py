"""A contrastive loss beside the rewards: the policy learns to read what it learns to write.

Rewards move the words that are written; nothing moves how they are read, except by accident. This
loss is InfoNCE as the shipped reward `contrastive` has it, of the same rollouts, masks and
negatives, but with a gradient through the reader: minus the log-softmax at the counterpart.

The rollouts of a mini-batch are read with the weights as they are now. What they are compared with
is the pool of the batch, as it was read when it was written: so one mini-batch has every text of
every process as candidates, and nothing has to be exchanged between processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from grace_rl.embed.reader import Reader, Written
from grace_rl.errors import UserError
from grace_rl.recipe.keys import unknown_keys
from grace_rl.reward import RewardBatch, contrast_texts

KEY = "reader_loss"


@dataclass(frozen=True)
class ReaderLossConfig:
    """The recipe's `reader_loss`.

    Args:
        weight: Factor of the loss beside the policy's, above 0.
        temperature: Divides the cosines, above 0.

    Raises:
        UserError: With every mistake in the values.
    """

    weight: float = 0.1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and value > 0):
                problems.append(f"{KEY}.{field.name}: must be a number above 0, not {value!r}")
        if problems:
            raise UserError(problems)


def reader_loss_config(settings: Mapping[str, Any]) -> ReaderLossConfig | None:
    """The loss that a config asks for, if it asks for one.

    Args:
        settings: Fields of `GraceGRPOConfig` by name: `reader_loss`, `reader` and
            `use_liger_kernel`.

    Raises:
        UserError: With every mistake, each beginning with its key.
    """
    values = settings[KEY]
    if values is None:
        return None
    problems = unknown_keys(KEY, values, ReaderLossConfig)
    known = {field.name for field in fields(ReaderLossConfig)}
    weights = settings["reader"].get("weights", "policy")
    if weights != "policy":
        problems.append(
            f"{KEY}: nothing could learn to read with reader.weights: {weights}; it needs policy"
        )
    if settings["use_liger_kernel"]:
        problems.append(f"{KEY}: the fused loss of use_liger_kernel has no place for it")
    try:
        config = ReaderLossConfig(**{k: v for k, v in values.items() if k in known})
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return config


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
