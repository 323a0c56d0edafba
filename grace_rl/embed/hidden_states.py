"""Hidden states of the decoder stack by forward hooks: no logits, and not all layers kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad
from transformers import PreTrainedModel


def decoder_stack(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head (under PEFT, of the base model)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(base, PreTrainedModel)
    stack = base.get_decoder()
    assert isinstance(stack, nn.Module)
    return stack


@contextmanager
def tap_layers(
    stack: nn.Module, layers: Sequence[int], receive: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within it, every forward of `stack` hands `receive` its mixed states (B, T, H), float32.

    Args:
        stack: From `decoder_stack`.
        layers: Numbers as in `output_hidden_states`: 0 are the input embeddings, -1 (or the number
            of layers) is the output after the final norm. One layer is taken as it is; several are
            each layer-normalised (no learned scale) and added, so that none drowns the others
            (findings of the bottleneck reader).
        receive: Called once per forward.
    """
    count = len(stack.layers)  # type: ignore[arg-type]
    wanted = [layer % (count + 1) for layer in layers]
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        seen[count] = output[0] if isinstance(output, tuple) else output.last_hidden_state
        states = [seen[layer].float() for layer in wanted]
        seen.clear()
        if len(states) > 1:
            states = [layer_norm(state, state.shape[-1:]) for state in states]
        receive(torch.stack(states).sum(0))

    hooks = [stack.register_forward_hook(finish)]
    if 0 in wanted:
        hooks.append(stack.get_input_embeddings().register_forward_hook(keep(0)))  # type: ignore[operator]
    for layer in wanted:
        if 0 < layer < count:
            block = stack.get_submodule(f"layers.{layer - 1}")
            hooks.append(block.register_forward_hook(keep(layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def pool_states(states: Tensor, mask: Tensor, pool: str = "mean") -> Tensor:
    """Pool hidden states over the marked tokens.

    Args:
        states: (B, T, H).
        mask: (B, T), true where a token counts; a row without any gives zeros.
        pool: `mean`, or `last` for the last marked token.

    Returns:
        (B, H) float32.
    """
    weights = mask.to(states.dtype)
    if pool == "last":
        position = torch.arange(mask.size(1), device=mask.device)
        last = (position * mask).amax(dim=1, keepdim=True)
        weights = weights * (position == last)
    return (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1.0)


def pool_prefixes(states: Tensor, mask: Tensor, ends: Tensor, pool: str = "mean") -> Tensor:
    """Pool the marked tokens before each end: every prefix's embedding from one cumulative sum.

    Valid because the attention mask is causal: states do not change when the text goes on.

    Args:
        states: (B, T, H).
        mask: (B, T), true where a token counts.
        ends: (B, K) exclusive ends, as token positions `0 <= end <= T`.
        pool: `mean`, or `last` for the last marked token before the end.

    Returns:
        (B, K, H) float32; zeros where no marked token lies before the end.
    """
    weights = mask.to(states.dtype)
    wide = (-1, -1, states.size(-1))
    if pool == "last":
        position = torch.arange(1, mask.size(1) + 1, device=mask.device)
        last = pad((position * mask).cummax(1).values, (1, 0)).gather(1, ends)  # 0: none so far
        return pad(states, (0, 0, 1, 0)).gather(1, last.unsqueeze(-1).expand(wide))
    sums = pad((states * weights.unsqueeze(-1)).cumsum(1), (0, 0, 1, 0))
    counts = pad(weights.cumsum(1), (1, 0))
    picked = sums.gather(1, ends.unsqueeze(-1).expand(wide))
    return picked / counts.gather(1, ends).clamp(min=1.0).unsqueeze(-1)
