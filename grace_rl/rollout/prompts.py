"""The one place that turns a text into the prompt a policy continues.

A prompt is `prefix + text + suffix`. Prefix and suffix come from the model's own chat template and
do not depend on the text, so the text's place is known by counting characters, and the tokenizer's
offsets turn characters into tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grace_rl.errors import UserError, reading
from grace_rl.recipe.prompt import PromptConfig

DEFAULT_INSTRUCTION = (
    "Read the text and say in a few plain words what it is about: who or what, what happens, "
    "where, when, and whatever else would tell it apart from similar texts. "
    "Write only this short rationale."
)


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: The text, stripped and cut to the token limit.
        string: The whole prompt.
        token_ids: Its tokens, `len(token_ids)` = P.
        span: Tokens `[start, stop)` that hold the text, `0 <= start <= stop <= P`.
    """

    text: str
    string: str
    token_ids: list[int]
    span: tuple[int, int]


class PromptTemplate:
    """Renders texts with a tokenizer's chat template, or with a plain layout where there is none.

    Args:
        tokenizer: A fast tokenizer (offsets are needed).
        instruction: System message, or a whole prompt; `None` for none. Templates without a system
            role get the system message before the first text.
        max_text_tokens: Texts are cut to this many tokens, at least 1.
        chat_template_kwargs: Passed on to the template, e.g. `{"enable_thinking": False}`.
        surroundings: What stands before and after a text, as an earlier template has rendered it
            (its `prefix` and `suffix`): a template that prints the date gives another one today.

    Raises:
        UserError: The tokenizer is slow, or its template changes with the text it is given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str | PromptConfig | None = DEFAULT_INSTRUCTION,
        max_text_tokens: int = 512,
        chat_template_kwargs: dict[str, Any] | None = None,
        surroundings: tuple[str, str] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{tokenizer.name_or_path}: prompts need a fast tokenizer "
                "(one with a tokenizer.json)"
            )
        if type(max_text_tokens) is not int or max_text_tokens < 1:
            raise UserError(
                f"max_text_tokens must be a whole number of at least 1, not {max_text_tokens!r}"
            )
        self.tokenizer = tokenizer
        self.instruction = instruction
        if isinstance(instruction, PromptConfig):
            self._told = instruction
        else:
            self._told = PromptConfig(system=instruction)
        self.max_text_tokens = max_text_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._special = [token for token in tokenizer.get_added_vocab() if token.strip()]
        with reading(tokenizer.name_or_path, "the chat template"):
            self.prefix, self.suffix = surroundings or self._surroundings()

    @property
    def surroundings(self) -> tuple[str, str]:
        """What stands before and after every text."""
        return self.prefix, self.suffix

    def with_instruction(
        self, instruction: str | PromptConfig, surroundings: tuple[str, str] | None = None
    ) -> PromptTemplate:
        """The same prompt with another instruction; with another system message, whatever else it
        has rendered stays.

        Args:
            instruction: System message, or a whole prompt.
            surroundings: As they have been rendered for it earlier.
        """
        pinned, own = surroundings, self._told.system
        if isinstance(instruction, str):
            if pinned is None and own and self.prefix.count(own) == 1:
                pinned = (self.prefix.replace(own, instruction), self.suffix)
            if isinstance(self.instruction, PromptConfig):
                instruction = self.instruction.changed(system=instruction)
        return PromptTemplate(
            self.tokenizer, instruction, self.max_text_tokens, self.chat_template_kwargs, pinned
        )

    def with_limit(self, max_text_tokens: int) -> PromptTemplate:
        """The same prompt for longer or shorter texts."""
        return PromptTemplate(
            self.tokenizer,
            self.instruction,
            max_text_tokens,
            self.chat_template_kwargs,
            self.surroundings,
        )

    def changes_with(self) -> list[str]:
        """What the chat template's prompt depends on besides its arguments: `date`, `chance`."""
        now, found = self._surroundings(), []
        if self._surroundings(strftime_now=lambda form: f"<{form}>") != now:
            found.append("date")
        if any(self._surroundings() != now for _ in range(8)):
            found.append("chance")
        return found

    def render(self, text: str) -> Prompt:
        """The prompt for one text.

        Raises:
            UserError: The text is blank.
        """
        text = text.strip()
        if not text:
            raise UserError("a blank text cannot be made into a prompt")
        token_ids, ends, span = self._tokenize(text)
        if span[1] - span[0] > self.max_text_tokens:
            text = text[: ends[span[0] + self.max_text_tokens - 1]].rstrip()
            token_ids, _, span = self._tokenize(text)
        return Prompt(text, self.prefix + text + self.suffix, token_ids, span)

    def _tokenize(self, text: str) -> tuple[list[int], list[int], tuple[int, int]]:
        """Token ids, each token's end as a character of the text, and the text's span in tokens."""
        start, stop = len(self.prefix), len(self.prefix) + len(text)
        if any(token in text for token in self._special):
            # A text that spells a control token must not become one: tokenize it apart, as plain
            # characters.
            parts = [
                self._encode(self.prefix),
                self._encode(text, split_special_tokens=True),
                self._encode(self.suffix),
            ]
            ids = [token for part in parts for token in part["input_ids"]]
            first = len(parts[0]["input_ids"])
            ends = [0] * first + [end for _, end in parts[1]["offset_mapping"]]
            return ids, ends, (first, len(ends))
        encoded = self._encode(self.prefix + text + self.suffix)
        offsets = encoded["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
        return encoded["input_ids"], [b - start for _, b in offsets], (inside[0], inside[-1] + 1)

    def _encode(self, string: str, **kwargs: Any) -> Any:
        return self.tokenizer(
            string, add_special_tokens=False, return_offsets_mapping=True, **kwargs
        )

    def _surroundings(self, **extra: Any) -> tuple[str, str]:
        """What stands before and after the text.

        Two different texts show where the template stops depending on it.
        """
        if self.tokenizer.chat_template is None:
            return self._plain_surroundings()
        first, second = self._fill("a", extra), self._fill("b", extra)
        prefix = os.path.commonprefix([first, second])
        suffix = os.path.commonprefix([first[::-1], second[::-1]])[::-1]
        if prefix + "a" + suffix != first or prefix + "some longer text" + suffix != self._fill(
            "some longer text", extra
        ):
            raise UserError(
                f"{self.tokenizer.name_or_path}: the chat template does not insert a user message "
                "unchanged and once; set another chat template"
            )
        return prefix, suffix

    def _fill(self, text: str, extra: dict[str, Any]) -> str:
        turns, system = self._turns(text), self._told.system
        if system is None:
            return self._apply(turns, extra)
        try:
            filled = self._apply([{"role": "system", "content": system}, *turns], extra)
            if system in filled:
                return filled
        except TemplateError:  # how templates refuse a system role
            pass
        first = turns[0] | {"content": f"{system}\n\n{turns[0]['content']}"}
        return self._apply([first, *turns[1:]], extra)

    def _turns(self, text: str) -> list[dict[str, str]]:
        """The user's and the policy's messages; the last is about the text."""
        before, after = self._told.around
        turns: list[dict[str, str]] = []
        for example in self._told.examples:
            turns.append({"role": "user", "content": before + example.text + after})
            turns.append({"role": "assistant", "content": example.rationale})
        return [*turns, {"role": "user", "content": before + text + after}]

    def _apply(self, messages: list[dict[str, str]], extra: dict[str, Any]) -> str:
        given = extra | self.chat_template_kwargs
        rendered = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **given
        )
        return str(rendered)

    def _plain_surroundings(self) -> tuple[str, str]:
        """A base model's prompt: begin token (if the tokenizer has one), instruction, examples,
        text, cue."""
        bos = self.tokenizer.bos_token
        begins = bos is not None and self.tokenizer("a")["input_ids"][:1] == [
            self.tokenizer.bos_token_id
        ]
        system, (before, after) = self._told.system, self._told.around
        head = "" if system is None else f"{system}\n\n"
        for example in self._told.examples:
            head += f"Text: {before}{example.text}{after}\n\nRationale: {example.rationale}\n\n"
        return (bos if begins else "") + head + "Text: " + before, after + "\n\nRationale:"
