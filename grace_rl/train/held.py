"""What one process holds in a forward with gradients: each method's config says it by `held`."""

from __future__ import annotations

from typing import NamedTuple

PROMPT = 64  # tokens of the instruction and the chat template around a text


class Held(NamedTuple):
    """Of one forward with gradients.

    Attributes:
        sequences: How many.
        tokens: Of the longest.
        logits: Positions whose logits over the whole vocabulary are held; RL's fused head has none.
        in_parts: `mini_batch_size` decides `sequences`, whatever the batch.
    """

    sequences: int
    tokens: int
    logits: int = 0
    in_parts: bool = False
