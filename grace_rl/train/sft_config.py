"""Arguments of `GraceSFTTrainer`: TRL's `SFTConfig`, and how a text becomes a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from grace_rl.train.reading_config import ReadingConfig


@dataclass
class GraceSFTConfig(ReadingConfig, SFTConfig):
    """TRL's `SFTConfig` with the fields of `ReadingConfig`; every TRL field keeps its meaning."""
