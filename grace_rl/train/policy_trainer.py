"""What the trainers of all methods do alike: say something, save an encoder, count, average."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from grace_rl.train.checkpointed import CheckpointMixin


class PolicyTrainer(CheckpointMixin):
    """Goes before a trainer whose `encoder()` is the policy as it is now.

    Attributes:
        console: Where advice is printed, on the main process; None prints none.
    """

    console: Console | None = None

    def encoder(self) -> Any:
        """The policy as it is now, as an encoder; it is kept beside the weights."""
        raise NotImplementedError

    def say(self, advice: str | None) -> None:
        """Print advice, where there is any."""
        if advice and self.console is not None and self.accelerator.is_main_process:
            self.console.print(advice, style="yellow", highlight=False)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        self.encoder().save_beside(Path(output_dir or str(self.args.output_dir)))


class RowTrainer(PolicyTrainer):
    """The same for a trainer whose steps read batches with masks and write no rationales.

    Counts the marked tokens of all processes in `state.num_input_tokens_seen`, where TRL's GRPO
    counts what it writes and reads, and logs it as `num_tokens`. A resumed run goes on counting.
    """

    token_masks: tuple[str, ...] = ("attention_mask",)  # the ends of their names in a batch

    @cached_property
    def noted(self) -> dict[str, list[Tensor]]:
        """Metrics since the last log, which logs their means over steps and processes."""
        return defaultdict(list)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        masks = [mask for name, mask in inputs.items() if name.endswith(self.token_masks)]
        own = torch.stack([mask.sum() for mask in masks]).sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(own).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with what is noted, and `num_tokens` also at the end."""
        if "loss" in logs or "train_runtime" in logs:
            logs.setdefault("num_tokens", self.state.num_input_tokens_seen)
        if "loss" in logs and self.noted:
            means = [torch.stack(values).float().mean() for values in self.noted.values()]
            own = torch.stack([mean.to(self.args.device) for mean in means])
            everyones = self.accelerator.reduce(own, reduction="mean").tolist()
            logs |= dict(zip(self.noted, everyones, strict=True))
            self.noted.clear()
        super().log(logs, start_time)  # type: ignore[misc]
