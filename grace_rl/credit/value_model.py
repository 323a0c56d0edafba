"""The critic: a value for every token, from the policy's own forward pass.

It hangs in the policy as the submodule `value_model`, so that DDP and ZeRO wrap, synchronise and
shard it with the rest. What is written for users, or pushed into vLLM, goes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from grace_rl.embed.hidden_states import decoder_stack
from grace_rl.run.zero import plain_copy

NAME = "value_model"


@dataclass
class ValuedOutput(FusedCausalLMOutput):
    """TRL's output with (B, T) values; part of the output, so that DDP sees the critic used."""

    state_values: Tensor | None = None


class ValueModel(nn.Module):
    """A linear head on hidden states, zero at first, so that the first values are 0.

    Args:
        hidden_size: H.
        backbone: The critic's own decoder stack; None reads the policy's hidden states.
        detach: Keep the value loss from changing the backbone that is read.
    """

    def __init__(
        self, hidden_size: int, backbone: nn.Module | None = None, detach: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.detach = detach
        self.head = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, H) -> (B, T) float32. The value at t is that of the text up to and including t."""
        states = states.detach() if self.detach else states
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.head(states.to(self.head.weight.dtype))
        return values.squeeze(-1).float()


def attach_value_model(
    policy: nn.Module, critic: str, receive: Callable[[Tensor], None]
) -> ValueModel:
    """Hang a critic into a policy.

    Args:
        policy: A causal language model with TRL's fused head, or a PEFT model around one.
        critic: `shared`: a head on the policy's hidden states; `detached`: the same without
            gradients into the policy; `separate`: a head on a copy of the decoder stack.
        receive: Gets (B, T) values in every forward that uses the fused head.
    """
    owner, stack = _owner(policy), decoder_stack(policy)
    backbone = plain_copy(stack) if critic == "separate" else None
    hidden_size = owner.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    device = next(stack.parameters()).device
    value_model = ValueModel(hidden_size, backbone, detach=critic == "detached").to(device)
    owner.add_module(NAME, value_model)
    seen: list[Tensor] = []  # hidden states of the forward under way
    under_way: list[bool] = []

    def begin(module: nn.Module, args: Any, keywords: Any) -> None:
        under_way[:] = [True] if keywords.get("fused_lm_head") else []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if under_way:
            seen[:] = [output.last_hidden_state]

    def add_values(module: nn.Module, args: Any, keywords: Any, output: Any) -> Any:
        if not under_way:
            return output
        under_way.clear()
        states = seen.pop()
        if value_model.backbone is not None:
            inputs = {name: keywords[name] for name in ("input_ids", "attention_mask")}
            states = value_model.backbone(**inputs, use_cache=False).last_hidden_state
        values = value_model(states)
        receive(values)
        return ValuedOutput(**output, state_values=values)

    owner.register_forward_pre_hook(begin, with_kwargs=True)
    stack.register_forward_hook(keep)
    owner.register_forward_hook(add_values, with_kwargs=True)
    return value_model


@contextmanager
def without_value_model(policy: nn.Module) -> Iterator[None]:
    """Inside, the policy's parameters and state are those of the language model alone.

    A policy that has no critic is left as it is.
    """
    owner = _owner(policy)
    value_model = owner._modules.pop(NAME, None)
    try:
        yield
    finally:
        if value_model is not None:
            owner.add_module(NAME, value_model)


def is_value_parameter(name: str) -> bool:
    """Whether a parameter of the policy belongs to the critic.

    >>> is_value_parameter("base_model.model.value_model.head.weight")
    True
    >>> is_value_parameter("model.layers.0.mlp.up_proj.weight")
    False
    """
    return NAME in name.split(".")


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A policy's state as the language model's, and the critic's under its own names."""
    language = {name: t for name, t in state.items() if not is_value_parameter(name)}
    critic = {
        name.partition(f"{NAME}.")[2]: t for name, t in state.items() if is_value_parameter(name)
    }
    return language, critic


def _owner(policy: nn.Module) -> nn.Module:
    """The causal language model itself, without PEFT around it."""
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    if not isinstance(base, nn.Module):
        raise TypeError(f"base: {type(base).__name__} is no nn.Module")
    return base
