"""What an encoder must know besides the weights, as a file beside them; and the ways of writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import Field, Strict

from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.errors import UserError, first_line
from grace_rl.recipe.prompt import Instruction, PromptConfig
from grace_rl.recipe.roles import RoleConfig
from grace_rl.recipe.schema import Section
from grace_rl.rollout.prompts import DEFAULT_INSTRUCTION, PromptTemplate
from grace_rl.run.files import write_text

RationaleMode = Literal["none", "greedy", "sample"]
SETTINGS_FILE = "grace.json"
S = TypeVar("S", bound=Section)


class Writing(Section):
    """What is written for a text.

    Args:
        rationale: `greedy`, `sample`, or `none`: the text is read in the rationale's place, or by
            the reader `joint` alone.
        max_rationale_tokens: Longest rationale, at least 1.
        temperature: Of `sample`, above 0; greedy needs none.
        seed: Of `sample`.
        instruction: System message, or whole prompt, in place of the one the policy was trained
            with; None keeps it.

    Raises:
        UserError: With every mistake in the values.
    """

    rationale: RationaleMode
    max_rationale_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = 0
    instruction: Instruction | None = None


class Changes(TypedDict, total=False):
    """What one call may do differently; see `RationaleEncoder`."""

    max_rationale_tokens: int | None
    temperature: float | None
    seed: int | None
    instruction: str | PromptConfig | None


class EncoderRole(Section):
    """What is different for queries, or for documents.

    Attributes:
        write: Whether rationales are written for them.
        instruction: In place of the encoder's own, where it is given.
        prompt: What stood before and after such a text in training.
    """

    write: bool = True
    instruction: Instruction | None = None
    prompt: Annotated[tuple[str, str], Strict(False)] | None = None


class EncoderSettings(Section):
    """What an encoder must know besides the weights; `grace.json` beside them.

    The defaults are for a language model that was not trained here.

    Attributes:
        reader: How rationales are read.
        instruction, max_text_tokens, chat_template_kwargs: Of the prompt, see `PromptTemplate`.
        max_rationale_tokens: Longest rationale that is written.
        rationale: How rationales are written unless a call says otherwise.
        roles: What is different for queries and for documents; both are of `EncoderRole`.
        prompt: What stood before and after a text in training. A chat template may render
            something else today, such as the date.
    """

    reader: ReaderConfig = Field(default_factory=ReaderConfig)
    instruction: Instruction | None = DEFAULT_INSTRUCTION
    max_text_tokens: int = Field(default=512, ge=1)
    max_rationale_tokens: int = Field(default=64, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    rationale: RationaleMode = "greedy"
    roles: dict[Literal["query", "document"], EncoderRole] = Field(default_factory=dict)
    prompt: Annotated[tuple[str, str], Strict(False)] | None = None

    def template(self, tokenizer: Any) -> PromptTemplate:
        """What renders texts to prompts."""
        return PromptTemplate(
            tokenizer,
            self.instruction,
            self.max_text_tokens,
            self.chat_template_kwargs,
            self.prompt,
        )

    def save(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False)
        write_text(folder / SETTINGS_FILE, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> EncoderSettings:
        """Read them back.

        Raises:
            UserError: The folder holds no `grace.json`, so it is not known how its rationales are
                read, or one that was not written here.
        """
        path = folder / SETTINGS_FILE
        if not path.exists():
            raise UserError(f"{folder}: has no {SETTINGS_FILE}; give the model/ folder of a run")
        return load_settings(cls, path)


def pinned_prompts(
    roles: Mapping[Any, EncoderRole],
) -> dict[str | PromptConfig, tuple[str, str]]:
    """Instruction -> what stood before and after a text of the role that was trained with it."""
    return {
        role.instruction: role.prompt
        for role in roles.values()
        if role.instruction is not None and role.prompt is not None
    }


def encoder_roles(
    roles: Mapping[str, RoleConfig], prompts: Mapping[str, PromptTemplate]
) -> dict[Any, EncoderRole]:
    """What training told of its roles, for use: a `positive` is a document.

    Args:
        roles: Of the recipe.
        prompts: Of roles that were told something of their own.
    """
    found = {}
    for name, trained in (("query", "query"), ("document", "positive")):
        role = roles.get(trained)
        if role is not None and (not role.write or role.instruction is not None):
            pinned = prompts[trained].surroundings if trained in prompts else None
            found[name] = EncoderRole(write=role.write, instruction=role.instruction, prompt=pinned)
    return found


def load_settings(cls: type[S], path: Path) -> S:
    """A section from a JSON file.

    Raises:
        UserError: With every mistake, each after the path.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError("is not a mapping")
        return cls(**content)
    except UserError as error:
        raise UserError([f"{path}: {problem}" for problem in error.problems]) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
