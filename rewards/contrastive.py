"""Log-softmax of a rollout's similarity to what means the same, against all that does not."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from grace_rl.reward import RewardBatch, RewardOutput, contrast_texts

Score = Literal["log_softmax", "probability", "margin"]


class Contrastive:
    """InfoNCE as a reward: be close to your counterpart, closer than to any negative.

    In plain words, for each rollout:

    1. Take one centroid per text of the pool: the mean of the text's rollouts.
    2. Measure the cosine to the texts that mean the same (the query's rollout to the positive, the
       positive's to the query, a negative's to its paraphrase). Where there is no such text, its
       siblings take the part: the mean of the other rollouts of the same text.
    3. Measure the cosine to the row's own hard negatives and to every text of the other rows,
       false negatives excepted.
    4. Divide all by `temperature`; the reward is the log-softmax at the counterpart: 0 at best. The
       other `score`s are its exponential, a probability, and the plain margin: the counterpart's
       cosine minus the mean over the negatives.

    The softmax is not linear, so every negative moves the advantage: near a negative, a rollout
    gains less from being near its counterpart. (In the published reward the negatives cancel.)

    Args:
        temperature: divides the cosines; 0.05 to 0.2 is common. Smaller looks at the hardest
            negatives only.
        clip: lowest log-softmax, or None. -5 to -10 keeps one hopeless rollout from setting the
            scale of its group; -3 suits step-wise credit on well separated texts.
        score: `log_softmax`; `probability` is bounded and flat where texts are easy; `margin` is
            linear, so that negatives count alike and cancel inside a group.

    Requirements: rows with a query and a positive, or a text; any number of negatives. At least
    two rows or one negative in a batch, else nothing is scored. No other columns.

    Recommendations: on quads (`negative_positive` given) both sides have a counterpart and each is
    the other's hard negative, which was steadier than triplets.

    Relations: `hard_negative` is its negative part alone; `consistency` its label-free part alone;
    `grace_published` is the linear form. `MultipleNegativesRankingLoss` of sentence-transformers is
    the same formula as a loss; here both sides are scored and may be negatives of other rows.

    Source: InfoNCE (van den Oord et al. 2018), paid as a reward.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"query": [[1, 0], [3, 4]], "positive": [[1, 0]], "negative": [[0, 1]]}],
        ...     trained=["query"],
        ... )
        >>> Contrastive(temperature=1.0)(batch).values
        tensor([-0.3133, -0.7981])
    """

    def __init__(
        self, temperature: float = 0.1, clip: float | None = None, score: Score = "log_softmax"
    ) -> None:
        self.check(temperature, clip, score)
        self.temperature = temperature
        self.clip = clip
        self.score = score

    @staticmethod
    def check(temperature: float, clip: float | None, score: Score) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if clip is not None and not clip < 0:
            raise ValueError(f"clip must be below 0, it is the lowest value, not {clip}")
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, not {score!r}")
        if clip is not None and score != "log_softmax":
            raise ValueError("clip is for score: log_softmax; the others are bounded")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        contrast = contrast_texts(batch)
        weights, scored = contrast.weights, contrast.scored
        if self.score == "margin":
            total = weights.sum(dim=1).where((weights > 0).any(dim=1), 1.0)
            values = contrast.counterpart - (contrast.similarity * weights).sum(dim=1) / total
        else:
            values = contrast.log_softmax(self.temperature)
            if self.clip is not None:
                values = values.clamp(min=self.clip)
            if self.score == "probability":
                values = values.exp()
        components = {
            "counterpart": contrast.counterpart,
            "hardest_negative": contrast.hardest,
            "accuracy": contrast.accuracy,
        }
        return RewardOutput(
            values=values.where(scored, torch.nan),
            components={name: c.where(scored, torch.nan) for name, c in components.items()},
        )
