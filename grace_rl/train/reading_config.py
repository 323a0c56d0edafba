"""How a text becomes a prompt, and a rationale a vector: the fields that methods share.

RL begins with the prompt that a cold start was taught, and reads as the encoder will.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grace_rl.rollout.prompts import DEFAULT_INSTRUCTION


@dataclass
class ReadingConfig:
    """Fields of every config whose method reads or writes rationales.

    Args:
        reader: Keywords of `grace_rl.embed.reader.ReaderConfig`: how a rationale becomes a vector.
        instruction: System instruction of the prompt; `None` leaves it out.
        max_text_tokens: Longer texts are cut here (at least 1); the chat template around them stays
            whole.
        chat_template_kwargs: Keywords for the chat template, such as `{enable_thinking: false}`.
    """

    reader: dict[str, Any] = field(default_factory=dict)
    instruction: str | None = DEFAULT_INSTRUCTION
    max_text_tokens: int = 512
    chat_template_kwargs: dict[str, Any] | None = None
