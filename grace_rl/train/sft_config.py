"""Arguments of `GraceSFTTrainer`: TRL's `SFTConfig`, and how a text becomes a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

from grace_rl.embed.reading_config import ReadingConfig
from grace_rl.train.held import PROMPT, Held


@dataclass
class GraceSFTConfig(ReadingConfig, SFTConfig):
    """TRL's `SFTConfig` with the fields of `ReadingConfig`; every TRL field keeps its meaning."""

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Held:
        """See `TrainerConfig.held`; a rationale is no longer than the longest text."""
        tokens = min(2 * text + PROMPT, self.max_length or 2 * text + PROMPT)
        return Held(batch, tokens, batch * tokens)
