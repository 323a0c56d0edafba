"""DeepSpeed ZeRO-3, where no process holds a whole weight: models that must stay out of it, and
moments in which weights must be whole.

Without ZeRO-3 nothing here does anything. Cheap to import.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

Module = TypeVar("Module", bound="nn.Module")


@contextmanager
def outside_zero3() -> Iterator[None]:
    """Inside, `from_pretrained` loads whole models, as if there were no ZeRO-3.

    For every model beside the policy: sentence encoders, guides, reward models. transformers would
    split their weights over the processes like the policy's, and nothing would ever gather them.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    held = integration and integration._hf_deepspeed_config_weak_ref
    config = held and held()
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def is_split(module: nn.Module) -> bool:
    """Whether ZeRO-3 has split any weight of a module."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a module, to look at.

    All processes must enter. Not for a forward pass of a policy in training, see `whole_policy`.
    """
    if not is_split(module):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def plain_copy(module: Module) -> Module:
    """A deep copy with whole weights of its own, that nothing splits; all processes must call it.

    Weights that were tied are tied in the copy.
    """
    if not is_split(module):
        return copy.deepcopy(module)
    from torch import nn

    with gathered(module):
        whole = {
            id(parameter): nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            for parameter in module.parameters()
        }
        return copy.deepcopy(module, memo=dict(whole))


@contextmanager
def whole_policy(trainer: Any) -> Iterator[None]:
    """Inside, each process can use a trainer's policy on its own: any number of forwards.

    All processes must enter and leave together; what they do in between is free. Weights must not
    be changed inside.

    Args:
        trainer: transformers' or TRL's, before, while or after it trains.
    """
    from trl.models import unwrap_model_for_generation

    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    )
    # Under ZeRO-3 `generate` would wait for the other processes at every token.
    with unwrapped, _without_step_hook(trainer.model_wrapped), outside_zero3():
        yield


@contextmanager
def _without_step_hook(engine: Any) -> Iterator[None]:
    """Take away the one hook of DeepSpeed's that TRL leaves: each forward begins with a collective
    as long as DeepSpeed learns the order of the modules."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return
    hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    hook = hooks.pop(number)
    try:
        yield
    finally:
        hooks[number] = hook
