"""How a text becomes a prompt, and a rationale a vector: the fields that methods share.

RL begins with the prompt that a cold start was taught, and reads as the encoder will.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.recipe.fields import TrainerConfig
from grace_rl.recipe.prompt import Instruction
from grace_rl.rollout.prompts import DEFAULT_INSTRUCTION, PromptTemplate


@dataclass
class ReadingConfig(TrainerConfig):
    """Fields of every config whose method reads or writes rationales.

    Args:
        reader: How a rationale becomes a vector.
        instruction: System message of the prompt, or the whole prompt, see `PromptConfig`; `None`
            has neither.
        max_text_tokens: Longer texts are cut here (at least 1); the chat template around them stays
            whole.
        chat_template_kwargs: Keywords for the chat template, such as `{enable_thinking: false}`.
    """

    reader: ReaderConfig = field(default_factory=ReaderConfig)
    instruction: Instruction | None = DEFAULT_INSTRUCTION
    max_text_tokens: Annotated[int, Field(ge=1)] = 512
    chat_template_kwargs: dict[str, Any] | None = None

    def prompt_templates(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptTemplate]:
        """The prompt of every text, called `""`, and of each role that is told something else.

        Raises:
            UserError: See `PromptTemplate`.
        """
        pinned: Mapping[str, tuple[str, str]] = getattr(self, "_surroundings", {})
        told = (tokenizer, self.instruction, self.max_text_tokens, self.chat_template_kwargs)
        found = {"": PromptTemplate(*told, pinned.get(""))}
        for name, role in getattr(self, "roles", {}).items():
            if role.instruction is not None:
                found[name] = found[""].with_instruction(role.instruction, pinned.get(name))
        return found

    def pin_prompts(self, surroundings: Mapping[str, tuple[str, str]]) -> None:
        """Take what stands before and after a text from where the run began, not anew."""
        self._surroundings = surroundings
