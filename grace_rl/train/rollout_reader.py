"""Reading rollouts in training: from the forwards that TRL makes anyway, else in few of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grace_rl.embed.reader import Reader, Written


class RolloutReader:
    """A reader beside TRL's forwards over prompts and completions.

    Args:
        reader: What to read.
        policy: The unwrapped policy.

    Attributes:
        shares_forwards: The reader sees prompt and rationale together with the policy's own
            weights, so TRL's forward has the states that it needs.
    """

    def __init__(self, reader: Reader, policy: nn.Module) -> None:
        self.reader = reader
        self.policy = policy
        self.shares_forwards = reader.config.in_context and reader.config.weights == "policy"

    @contextmanager
    def during_forward(
        self,
        written: Sequence[Written],
        input_ids: Tensor,
        logits_to_keep: int,
        ends: Tensor | None = None,
        chunk: int | None = None,
    ) -> Iterator[list[Tensor]]:
        """Within it, TRL's forward over these rows also yields their raw vectors.

        Args:
            written: B rollouts; only their prompts and token ids are looked at.
            input_ids: (B, T). Prompts, padded left, end where the last `logits_to_keep` tokens
                begin; completions, padded right, start there.
            logits_to_keep: Longest completion.
            ends: (B, K+1) ends of prefixes, in tokens of the completion.
            chunk: Rows of each of its passes over the decoder stack; all by default.

        Yields:
            One tensor per pass, (b, H), or (b, K+1, H) with ends.
        """
        seam = input_ids.size(1) - logits_to_keep
        mask = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        for i, item in enumerate(written):
            _, first = self.reader.tokens_to_read(item)
            mask[i, seam - len(item.prompt.token_ids) + first : seam + len(item.token_ids)] = True
        places = None if ends is None else seam + ends.to(input_ids.device)
        size = chunk or len(mask)

        def span(number: int) -> tuple[Tensor, Tensor | None]:
            rows = slice(number * size, (number + 1) * size)
            return mask[rows], None if places is None else places[rows]

        vectors: list[Tensor] = []
        with self.reader.tap(self.policy, span, vectors):
            yield vectors

    def apart(
        self, written: list[Written], anchors: list[Written], ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Raw vectors of rollouts, (B, H), or with their prefixes (B, K+1, H), and of anchors, (A,
        H), in one reading of all."""
        if ends is None:
            both = self.reader.read(written + anchors)
            return both[: len(written)], both[len(written) :]
        whole = torch.tensor([len(item.token_ids) for item in anchors], dtype=torch.long)
        ends = torch.cat([ends, whole[:, None].expand(-1, ends.size(1))])
        both = self.reader.read(written + anchors, ends)
        return both[: len(written)], both[len(written) :, -1]
