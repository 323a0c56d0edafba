"""Rebuilding a text from a vector: the vector takes one input slot before the text's own tokens.

The language model that wrote the vector, or any other of the same width, reads it as if it were the
embedding of a first token, with no projection in between, and says how likely the text is. Targets
are padded on the right, so what stands beside a row in a batch changes nothing.

Source: bidirectional reconstruction ("Anchor Embedding", EMNLP 2025 main 216, equations 2 and 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def right_padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one block, (N, L) long, and its mask, (N, L) long, 1 at a row's tokens.

    >>> right_padded([[5, 6, 7], [8]], padding=0)
    (tensor([[5, 6, 7],
            [8, 0, 0]]), tensor([[1, 1, 1],
            [1, 0, 0]]))
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def rebuild_logps(model: Any, vectors: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of every token of a text, given a vector and the tokens before it.

    Args:
        model: A causal language model, without PEFT around it.
        vectors: (N, H), as they are: neither scaled nor projected.
        ids: (N, L) target tokens, right padded.
        mask: (N, L), 1 at target tokens.

    Returns:
        (N, L) float32, in nats; 0 at padding.
    """
    before = model.get_input_embeddings()(ids[:, :-1])
    inputs = torch.cat([vectors.unsqueeze(1).to(before.dtype), before], dim=1)
    output = model.get_decoder()(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    return token_logps(model, output.last_hidden_state, ids, mask)


def token_logps(model: Any, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of tokens from the states that predict them; only marked ones are computed.

    Args:
        model: A causal language model, without PEFT around it.
        states: (N, L, H) after the final norm; the one at t predicts token t of `ids`.
        ids, mask: (N, L).

    Returns:
        (N, L) float32, in nats; 0 where the mask is 0.
    """
    marked = mask.bool()
    logits = model.get_output_embeddings()(states[marked]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logps = -cross_entropy(logits, ids[marked], reduction="none")
    return torch.zeros(ids.shape, device=logps.device).masked_scatter(marked, logps)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """(N, L) values as (N,) means over a row's marked tokens; 0 where there are none.

    >>> row_means(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([2.])
    """
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
