"""Hidden states of the decoder stack: no logits, and not all layers kept.

The hooks that see them stay on the model once they are there and do nothing by themselves: each
looks for the tap that its own thread has opened. Threads that read with one model at once therefore
never see each other's states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad
from transformers import PreTrainedModel

from grace_rl.errors import UserError


def decoder_stack(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head (under PEFT, of the base model).

    Raises:
        UserError: The model has none.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    stack = base.get_decoder() if isinstance(base, PreTrainedModel) else None
    if not isinstance(stack, nn.Module):
        raise UserError(f"{type(base).__name__} is no language model with a decoder stack")
    return stack


def decoder_blocks(stack: nn.Module) -> nn.ModuleList:
    """The layers of a stack, found by their number, since each family calls them otherwise.

    Raises:
        UserError: There are none.
    """
    count = stack.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in stack.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(stack).__name__}: its {count} layers cannot be told from its modules")


def layer_numbers(layers: Sequence[int], count: int) -> list[int]:
    """Layers counted from the front, 0 to `count`; -1 is `count`.

    Args:
        layers: `reader.layers`.
        count: Layers of the model (`num_hidden_layers`).

    Raises:
        UserError: One of them is not there.

    >>> layer_numbers([0, -1], 3)
    [0, 3]
    """
    wrong = [layer for layer in layers if not -count - 1 <= layer <= count]
    if wrong:
        raise UserError(
            f"reader.layers: no layer {', '.join(map(str, wrong))} in a model of {count}; "
            f"there are 0 (input embeddings) to {count} (after the final norm), or -{count + 1} to "
            "-1"
        )
    return [layer % (count + 1) for layer in layers]


@dataclass
class _Tap:
    """What one thread wants of one stack's forwards."""

    stack: nn.Module
    wanted: list[int]
    count: int
    blocks: dict[int, int]  # id of a module -> the layer that is its input
    receive: Callable[[Tensor], None]
    seen: dict[int, Tensor] = field(default_factory=dict)


_TAP: ContextVar[_Tap | None] = ContextVar("tap", default=None)  # of this thread


def _keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
    tap = _TAP.get()
    if tap is not None and id(module) in tap.blocks:
        tap.seen[tap.blocks[id(module)]] = args[0] if args else kwargs["hidden_states"]


def _finish(module: nn.Module, args: Any, output: Any) -> None:
    tap = _TAP.get()
    if tap is None or module is not tap.stack:
        return
    tap.seen[tap.count] = output[0] if isinstance(output, tuple) else output.last_hidden_state
    states = [tap.seen[layer] for layer in tap.wanted]
    tap.seen.clear()
    tap.receive(mix_layers(states))


def mix_layers(states: Sequence[Tensor]) -> Tensor:
    """States of layers as one, each (B, T, H) -> (B, T, H) float32.

    One layer is taken as it is; several are each layer-normalised (no learned scale) and added, so
    that none drowns the others (findings of the bottleneck reader).
    """
    several = [state.float() for state in states]
    if len(several) > 1:
        several = [layer_norm(state, state.shape[-1:]) for state in several]
    return torch.stack(several).sum(0)


@contextmanager
def tap_layers(
    stack: nn.Module, layers: Sequence[int], receive: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within it, every forward of `stack` in this thread hands `receive` its mixed states.

    Args:
        stack: From `decoder_stack`.
        layers: Numbers as in `output_hidden_states`: 0 are the input embeddings, -1 (or the number
            of layers) is the output after the final norm. How they are mixed: `mix_layers`.
        receive: Called once per forward with (B, T, H), float32.

    Raises:
        UserError: A layer is not there.
    """
    blocks = decoder_blocks(stack)
    wanted = layer_numbers(layers, len(blocks))
    places = {id(blocks[layer]): layer for layer in wanted if layer < len(blocks)}
    for layer in wanted:
        if layer < len(blocks) and not _is_last(_keep_input, blocks[layer]._forward_pre_hooks):
            blocks[layer].register_forward_pre_hook(_keep_input, with_kwargs=True)
    if not _is_last(_finish, stack._forward_hooks):
        stack.register_forward_hook(_finish)
    token = _TAP.set(_Tap(stack, wanted, len(blocks), places, receive))
    try:
        yield
    finally:
        _TAP.reset(token)


def _is_last(hook: Callable[..., None], hooks: dict[int, Any]) -> bool:
    """Whether a hook is there, after all others: it must see what DeepSpeed's make of a tensor, on
    every process alike. DeepSpeed puts its own anew whenever a policy was used as a whole."""
    number = next((key for key, one in hooks.items() if one is hook), None)
    if number is not None and number != next(reversed(hooks)):
        hooks[number] = hooks.pop(number)
    return number is not None


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
