"""What an encoder must know besides the weights, as a file beside them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_rl.embed.reader import ReaderConfig
from grace_rl.embed.writers import RationaleMode
from grace_rl.errors import UserError
from grace_rl.rollout.prompts import DEFAULT_INSTRUCTION
from grace_rl.run.files import write_text


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder must know besides the weights; `grace.json` beside them.

    The defaults are for a language model that was not trained here.

    Attributes:
        reader: How rationales are read.
        instruction, max_text_tokens, chat_template_kwargs: Of the prompt, see `PromptTemplate`.
        max_rationale_tokens: Longest rationale that is written.
        rationale: How rationales are written unless a call says otherwise.
    """

    reader: ReaderConfig = dataclasses.field(default_factory=ReaderConfig)
    instruction: str | None = DEFAULT_INSTRUCTION
    max_text_tokens: int = 512
    max_rationale_tokens: int = 64
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    rationale: RationaleMode = "greedy"

    def save(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_text(folder / "grace.json", text + "\n")

    @classmethod
    def load(cls, folder: Path) -> EncoderSettings:
        """Read them back.

        Raises:
            UserError: The folder holds no `grace.json`, so it is not known how its rationales are
                read, or one that was not written here.
        """
        path = folder / "grace.json"
        if not path.exists():
            raise UserError(f"{folder}: has no grace.json; give the model/ folder of a run")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return cls(**settings | {"reader": ReaderConfig(**settings["reader"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: is not a grace.json of this version: {error}") from error
