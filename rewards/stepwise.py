"""What each part of a rationale adds: another reward, asked after every segment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grace_rl.reward import (
    LoadedReward,
    RewardBatch,
    RewardOutput,
    RewardSpec,
    load_rewards,
    score_prefixes,
)


class Stepwise:
    """The value of another reward, and its value after every segment of the rationale.

    In plain words, for each rollout:

    1. Cut the rationale into K segments and embed what stands before each cut (the trainer does).
    2. Ask the `potential` for its value at each of these K + 1 embeddings: s_0 without any
       rationale, ..., s_K for the whole. Counterpart, negatives and siblings are the same, whole
       ones for all of them.
    3. The reward is s_K; what segment k adds, s_k - s_{k-1}, becomes its credit
       (docs/methods.md).

    This is the step-wise objective of GIRCSE, "every step better than the last", as credit for
    words: the sum of what the segments add is s_K - s_0, so it pays for nothing else than the
    potential alone would.

    Args:
        potential: the reward to ask: its name, or a mapping with its name and arguments, such as
            `{name: contrastive, temperature: 0.1, score: probability}`. It must look at
            `batch.embeddings` and have neither a gate nor steps. From Python also a built object. A
            `path/to/file.py:Name` starts at the working directory.
        over_text: pay what the rationale adds, s_K - s_0. With a reader that reads the text too
            (`joint`) s_0 is the score of the text alone, which no rationale can change: within a
            group nothing is ranked otherwise, but the number says what the words are worth, and a
            critic can foresee it.

    Requirements: those of the potential; a reader that uses a language model. No columns.

    Recommendations: use it in the potential's place, not beside it. `segments`,
    `segment_min_tokens` and `shaping` of the recipe say how credit is given. Watch
    `shaping/beta_k`: above 0.5 the prefixes say something about the whole.

    Relations: with `segments: 1` it trains exactly as its potential does.

    Source: the step-wise objective of GIRCSE (arXiv 2509.24291) as a potential (Ng, Harada and
    Russell 1999).

    Example:
        >>> import dataclasses, torch
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"query": [[0, 1]], "positive": [[0, 1]], "negative": [[1, 0]]}], trained=["query"]
        ... )
        >>> prefixes = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
        >>> batch = dataclasses.replace(
        ...     batch, prefix_embeddings=prefixes, prefix_ends=torch.tensor([[0, 1, 2]])
        ... )
        >>> Stepwise({"name": "contrastive", "score": "margin"})(batch).steps
        tensor([[-1.0000,  0.2000,  1.0000]])
    """

    steps = True

    def __init__(
        self,
        potential: str | dict[str, Any] | Callable[[RewardBatch], Any] = "contrastive",
        over_text: bool = False,
    ) -> None:
        self.potential = _loaded(potential)
        self.over_text = over_text

    @staticmethod
    def check(
        potential: str | dict[str, Any] | Callable[[RewardBatch], Any], over_text: bool
    ) -> None:
        if not isinstance(over_text, bool):
            raise ValueError(f"over_text must be true or false, not {over_text!r}")
        _loaded(potential)

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        found = score_prefixes(self.potential, batch)
        if not self.over_text or found.steps is None:
            return found
        start = found.steps[:, :1]
        adds = torch.as_tensor(found.values) - start[:, 0]
        return dataclasses.replace(found, values=adds, steps=found.steps - start)


def _loaded(potential: Any) -> LoadedReward:
    spec = potential
    if isinstance(potential, dict):
        keywords = dict(potential)
        spec = RewardSpec(name=str(keywords.pop("name", "")), keywords=keywords)
    try:
        (loaded,) = load_rewards([spec], Path.cwd())
    except ValueError as error:
        raise ValueError(str(error).replace("rewards[0]", "potential")) from error
    if loaded.gates or loaded.steps or loaded.trl_parameters is not None:
        raise ValueError(
            f"potential ({loaded.name}) must be a plain value of batch.embeddings: no gate, no "
            "steps, no TRL function"
        )
    return loaded
