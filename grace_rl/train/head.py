"""The language model's head on a CPU: only the positions that count, in one product.

The head is the largest matrix of a small model, and two things multiply it there. TRL's fused head
projects every position of a row and masks afterwards, where no Triton kernel is to be had: with
prompts as long as rationales that is twice the work. And what transformers hands to the head at the
end of a prompt is a slice, for which torch copies the whole weight once for every row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""Fields of TRL's FusedCausalLMOutput that have a value for each position."""


def spare_head(policy: nn.Module) -> None:
    """Have the policy's head do no more than is asked of it, on a CPU; values stay the same.

    Args:
        policy: A causal language model that TRL's `add_fused_lm_head` has prepared; an adapter may
            be around it.
    """
    model: Any = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    fused = model.forward

    @functools.wraps(fused)
    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels is None or labels.device.type != "cpu":
            return fused(*args, **kwargs)
        counts = labels[:, 1:] != -100
        if not counts.any():
            return fused(*args, **kwargs)
        picked = model.base_model.register_forward_hook(functools.partial(_pick, counts=counts))
        ignored = labels.new_full((1,), -100)  # the fused head leaves the first label out
        try:
            kwargs["labels"] = torch.cat([ignored, labels[:, 1:][counts]])[None]
            output = fused(*args, **kwargs)
        finally:
            picked.remove()
        values = {name: getattr(output, name) for name in PER_TOKEN}
        spread = {name: _spread(one, counts) for name, one in values.items() if one is not None}
        return dataclasses.replace(output, label_mask=counts, **spread)

    model.forward = forward


def _in_one_piece(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].contiguous(), *args[1:])


def _pick(backbone: nn.Module, args: Any, output: Any, *, counts: Tensor) -> Any:
    """The states before the labels that count, as one row, with one more at its end."""
    states = output.last_hidden_state
    output.last_hidden_state = torch.cat([states[:, :-1][counts], states[:1, -1]])[None]
    return output


def _spread(values: Tensor, counts: Tensor) -> Tensor:
    """(1, N) values of what counts -> as wide as the batch, zero elsewhere."""
    return values.new_zeros(counts.shape).masked_scatter(counts, values)
