"""A whole prompt, where a system message is not enough: `instruction`, or a role's."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from grace_rl.errors import UserError
from grace_rl.recipe.schema import Items, Section

TEXT = "{text}"


class Example(Section):
    """One turn that shows what to write.

    Args:
        text: A text, which stands in the user's message as the others will.
        rationale: What is to be written for it.
    """

    text: str
    rationale: str


class PromptConfig(Section):
    """What a policy is told.

    Args:
        system: The system message; None has none.
        user: The user's message around `{text}`, which must be in it once.
        examples: Turns before it, few-shot.

    Raises:
        UserError: With every mistake in the values.

    >>> PromptConfig(user="Answer in one sentence: {text}").around
    ('Answer in one sentence: ', '')
    """

    recipe_key = "instruction"

    system: str | None = None
    user: str = TEXT
    examples: Items[Example] = ()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.user.count(TEXT) != 1:
            raise UserError(f"user: must have {TEXT} in it once, where the text goes")
        return self

    @property
    def around(self) -> tuple[str, str]:
        """What stands before and after a text in the user's message."""
        before, after = self.user.split(TEXT)
        return before, after


def _section(value: Any) -> Any:
    return PromptConfig.of(value) if isinstance(value, dict) else value


Instruction = Annotated[str | PromptConfig, BeforeValidator(_section)]
"""A system message, or a whole prompt."""
