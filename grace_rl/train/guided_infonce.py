"""InfoNCE without false negatives: sentence-transformers' losses, with a guide's say in each pair.

Those losses see token ids, not texts. So every example's number comes along as its label, and what
the guide knows of its texts is appended to their embeddings: it passes through gathering and
chunking with them, and the similarity function takes it off again.

Why not `CachedGISTEmbedLoss`: it knows the modes `margin` and `ratio` alone, not `absolute` (the
default here, with a calibrated sigma) nor `soft`; it leaves no word to the labels
(`own_negatives: false`); it compares queries with queries and documents with documents besides; and
it runs the guide on every batch, which must be a SentenceTransformer, while here vectors are read
that were made once, perhaps by a function. So the library's uncached and cached losses do the
training, and only the weight of a pair is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim
from torch import Tensor

from grace_rl.data.false_negatives import FalseNegatives

MARKS = 4  # beside the guide's vector: cosine with the own positive, example, row, is a positive


class Marks:
    """What is appended to the embeddings of a batch.

    Args:
        false_negatives: The mask.
        examples: All examples, `(query, positive, hard negative, ...)`.
        row_numbers: The row that each example is of.
    """

    def __init__(
        self,
        false_negatives: FalseNegatives,
        examples: Sequence[tuple[str, ...]],
        row_numbers: Sequence[int],
    ) -> None:
        self.false_negatives, self.examples, self.row_numbers = (
            false_negatives,
            examples,
            row_numbers,
        )
        self.width = 0

    def of_column(self, column: int, labels: Sequence[int]) -> Tensor:
        """(B, D + 4) for the texts of one column of the examples with these numbers."""
        guide = self.false_negatives.guide
        query, positive, own = (
            guide.vectors([self.examples[n][c] for n in labels]) for c in (0, 1, column)
        )
        numbers = [[float(n), float(self.row_numbers[n]), float(column == 1)] for n in labels]
        cosine = (query * positive).sum(1, keepdim=True)
        return torch.cat([own, cosine, torch.tensor(numbers)], dim=1)

    def append(self, embeddings: Tensor, column: int, labels: Sequence[int] | None) -> Tensor:
        """(B, H) -> (B, H + D + 4); as it is without labels: validation rows are not masked."""
        self.width = embeddings.size(1)
        if labels is None:
            return embeddings
        marks = self.of_column(column, labels).to(embeddings.device)
        return torch.cat([embeddings.float(), marks], dim=1)

    def similarity(self, first: Tensor, second: Tensor, scale: float) -> Tensor:
        """(N, M) cosines, lowered so that, times `scale`, a pair counts by its weight."""
        cosine = cos_sim(first[:, : self.width], second[:, : self.width])
        if first.size(1) == self.width:
            return cosine
        first, second = first[:, self.width :], second[:, self.width :]
        guide = first[:, :-MARKS] @ second[:, :-MARKS].T
        weights = self.false_negatives.of_cosines(guide, first[:, -MARKS].unsqueeze(1))
        same_example = first[:, -3].unsqueeze(1) == second[:, -3]
        own_positive = same_example & (second[:, -1] > 0)
        same_row = first[:, -2].unsqueeze(1) == second[:, -2]
        weights = self.false_negatives.trust_labels(weights, own_positive, same_row)
        return cosine + weights.log() / scale


class GuidedInfoNCE(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` with a mask; labels are numbers of examples.

    Args:
        marks: See `Marks`.
        model, keywords: As in the base class.
    """

    def __init__(self, model: Any, marks: Marks, **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.marks = marks
        self.similarity_fct = lambda a, b: marks.similarity(a, b, self.scale)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        numbers = None if labels is None else labels.tolist()
        marked = [self.marks.append(e, column, numbers) for column, e in enumerate(embeddings)]
        return super().compute_loss_from_embeddings(marked, labels)


class CachedGuidedInfoNCE(CachedMultipleNegativesRankingLoss):
    """`CachedMultipleNegativesRankingLoss` with a mask, as `GuidedInfoNCE`."""

    def __init__(self, model: Any, marks: Marks, **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.marks = marks
        self.similarity_fct = lambda a, b: marks.similarity(a, b, self.scale)  # type: ignore[misc]
        self._numbers: list[int] | None = None

    def forward(self, sentence_features: Any, labels: Tensor) -> Tensor:
        self._numbers = None if labels is None else labels.tolist()
        loss: Tensor = super().forward(sentence_features, labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        marked = []
        for column, chunks in enumerate(reps):
            ends = torch.tensor([len(chunk) for chunk in chunks]).cumsum(0).tolist()
            marked.append(
                [
                    self.marks.append(
                        c, column, self._numbers and self._numbers[end - len(c) : end]
                    )
                    for c, end in zip(chunks, ends, strict=True)
                ]
            )
        return super().calculate_loss(marked, labels, with_backward=with_backward)


def row_numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The row of each example: a quad gives two.

    >>> row_numbers([{"negative_positive": "d"}, {}])
    [0, 0, 1]
    """
    return [i for i, row in enumerate(rows) for _ in range(1 + bool(row.get("negative_positive")))]
