"""Soft tokens: a language model goes on from a text in mixtures of words instead of words.

GIRCSE (arXiv 2509.24291): with logits l_k at the last position and input embeddings E,

    s_k = softmax(l_k / T) over the whole vocabulary, in float32
    d_k = s_k @ E, the next input
    g_k = last hidden state at d_k
    z_k = mean(g_1 .. g_k), the embedding after k steps

Each d_k depends only on what came before it, so a run of K steps holds every shorter run. What
differs from the released code: the prefix is computed once (its keys and values are kept, with
their gradients, while it recomputes the prefix in each of K + 1 passes), logits are computed at one
position, and gradient checkpointing keeps working beside the kept keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer
from trl.models.utils import _ForwardRedirection

from grace_rl.embed.hidden_states import decoder_blocks, decoder_stack, tap_layers


@dataclass(frozen=True)
class SoftTokens:
    """What a model's steps gave.

    Attributes:
        prompt: (B, H) last hidden state of the text itself, g_0.
        states: (B, K, H) g_1 to g_K.
        entropy: (B, K) entropy of each s_k in nats, detached.
        word_ids: (B, K, M) most likely vocabulary items of each s_k, best first.
        word_shares: (B, K, M) their probabilities.
    """

    prompt: Tensor
    states: Tensor
    entropy: Tensor
    word_ids: Tensor
    word_shares: Tensor

    def vectors(self) -> Tensor:
        """(B, K, H) float32 z_1 to z_K, not normalised; for K = 0 (B, 1, H), the text's own g_0."""
        if self.states.size(1) == 0:
            return self.prompt.float().unsqueeze(1)
        return running_mean(self.states)


def running_mean(states: Tensor) -> Tensor:
    """(B, K, H) -> (B, K, H) float32: the mean of the first k states, for every k.

    >>> running_mean(torch.tensor([[[2.0], [4.0], [0.0]]])).flatten().tolist()
    [2.0, 3.0, 2.0]
    """
    counts = torch.arange(1, states.size(1) + 1, device=states.device).view(1, -1, 1)
    return states.float().cumsum(1) / counts


def soft_tokens(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    words: int = 0,
    cache: bool = True,
    until: Callable[[Tensor], bool] | None = None,
) -> SoftTokens:
    """Run K soft-token steps.

    Gradients flow through all of it where they are enabled. If the model has gradient checkpointing
    switched on and trains, each layer of each step is recomputed in the backward pass.

    Args:
        model: A causal language model, PEFT included.
        input_ids, attention_mask: (B, T), padded on either side; each row has at least one token.
        steps: K, at least 0.
        temperature: T of the softmax, above 0.
        words: How many of the most likely items of each s_k to keep, M.
        cache: False computes the whole prefix again in every step, as the released code does in
            training: K + 1 passes. The same numbers; for comparison.
        until: Asked after each step with the states so far (B, k, H); true ends the run early.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    stack: Any = decoder_stack(base)
    embeddings = stack.get_input_embeddings()
    ids, mask = _left_padded(input_ids, attention_mask)
    inputs = embeddings(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kept = Cache(layers=[_KeptLayer() for _ in decoder_blocks(stack)]) if cache else None
    states: list[Tensor] = []  # each (B, H), of the last position
    said: list[tuple[Tensor, ...]] = []  # entropy (B,), shares and ids of the likeliest (B, M)
    last_states = tap_layers(stack, [-1], lambda every: states.append(every[:, -1]))
    with _checkpointed_steps(base, stack, kept), last_states:
        for step in range(steps + 1):
            arguments = {
                "inputs_embeds": inputs,
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": kept,
                "use_cache": cache,
            }
            if step == steps:
                stack(**arguments)  # no logits: nothing follows
                break
            logits = base(**arguments, logits_to_keep=1).logits[:, -1]
            if step and until is not None and until(torch.stack(states[1:], 1)):
                break
            shares = (logits.float() / temperature).softmax(-1)  # (B, V)
            with torch.no_grad():
                said.append((torch.special.entr(shares).sum(-1), *shares.topk(words)))
            mixed, place = _mix(embeddings, shares), positions[:, -1:] + 1
            if not cache:
                mixed, place = torch.cat([inputs, mixed], 1), torch.cat([positions, place], 1)
            inputs, positions = mixed, place
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return _gathered(states, said, words)


def _left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """With padding on the left, so that every row goes on at the same place."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _gathered(states: list[Tensor], said: list[tuple[Tensor, ...]], words: int) -> SoftTokens:
    prompt, *rest = states

    def stacked(parts: list[Tensor], *width: int) -> Tensor:
        taken = parts[: len(rest)]  # one more distribution than states, where a run ended early
        return torch.stack(taken, 1) if taken else prompt.new_zeros(len(prompt), 0, *width)

    return SoftTokens(
        prompt=prompt,
        states=stacked(rest, prompt.size(-1)),
        entropy=stacked([entropy for entropy, _, _ in said]),
        word_ids=stacked([ids for _, _, ids in said], words),
        word_shares=stacked([shares for _, shares, _ in said], words),
    )


def _mix(embeddings: nn.Module, shares: Tensor) -> Tensor:
    """(B, V) shares -> (B, 1, H) mixed input embeddings, in the embeddings' own precision.

    It goes through the module's own call, since under ZeRO-3 its weight is there only within.
    """
    weight: Any = embeddings.weight
    scale = getattr(embeddings, "embed_scale", 1.0)  # Gemma multiplies inside the module

    def mixture(shares: Tensor) -> Tensor:
        mixed = shares.to(weight.dtype) @ weight * scale
        return mixed.to(weight.dtype).unsqueeze(1)  # autocast's product is in half precision

    return _ForwardRedirection()(embeddings, embeddings, mixture, shares)  # type: ignore[no-any-return]


class _KeptLayer(DynamicLayer):
    """One layer's keys and values as pieces, one for each step, so that any step can be redone."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.pieces = [*self.pieces, (key_states, value_states)]
        keys, values = zip(*self.pieces, strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def get_seq_length(self) -> int:
        return sum(keys.size(-2) for keys, _ in self.pieces)


@contextmanager
def _checkpointed_steps(base: nn.Module, stack: Any, kept: Cache | None) -> Iterator[None]:
    """Within it, gradient checkpointing and kept keys and values go together.

    transformers drops the cache where it checkpoints, since redoing a layer would append to it
    again. Here a layer is redone with the pieces that it had found.
    """
    flagged: list[Any] = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)]
    if kept is None or not flagged or not base.training:
        yield
        return

    def checkpointed(forward: Any, layer: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = layer.pieces

            def redo(*args: Any, **kwargs: Any) -> Any:
                layer.pieces = before
                return forward(*args, **kwargs)

            return checkpoint(redo, *args, use_reentrant=False, **kwargs)

        return run

    blocks = decoder_blocks(stack)
    for module in flagged:
        module.gradient_checkpointing = False
    for block, layer in zip(blocks, kept.layers, strict=True):
        block.forward = checkpointed(block.forward, layer)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        for module in flagged:
            module.gradient_checkpointing = True
