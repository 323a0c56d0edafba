"""The tokens that training has read, counted alike for every method."""

from __future__ import annotations

from typing import Any

import torch


class TokenCount:
    """Goes before a trainer whose steps read batches with masks and write no rationales.

    Counts the marked tokens of all processes in `state.num_input_tokens_seen`, where TRL's GRPO
    counts what it writes and reads, and logs it as `num_tokens`. A resumed run goes on counting.
    """

    args: Any
    state: Any
    accelerator: Any
    token_masks: tuple[str, ...] = ("attention_mask",)  # the ends of their names in a batch

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        masks = [mask for name, mask in inputs.items() if name.endswith(self.token_masks)]
        own = torch.stack([mask.sum() for mask in masks]).sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(own).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with `num_tokens` at logged steps and at the end."""
        if "loss" in logs or "train_runtime" in logs:
            logs.setdefault("num_tokens", self.state.num_input_tokens_seen)
        super().log(logs, start_time)  # type: ignore[misc]
