"""A policy in use: texts in, rationales and vectors out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grace_rl.embed.reader import Reader, ReaderConfig, Written
from grace_rl.errors import UserError
from grace_rl.rollout.prompts import PromptTemplate

RationaleMode = Literal["none", "greedy"]


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder must know besides the weights; `grace.json` beside them.

    Attributes:
        reader: How rationales are read.
        instruction, max_text_tokens, chat_template_kwargs: Of the prompt, see `PromptTemplate`.
        max_rationale_tokens: Longest rationale that is written.
    """

    reader: ReaderConfig
    instruction: str | None
    max_text_tokens: int
    max_rationale_tokens: int
    chat_template_kwargs: dict[str, Any]

    def save(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / "grace.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> EncoderSettings:
        """Read them back.

        Raises:
            UserError: The folder holds no `grace.json`, so it is not known how its rationales are
                read.
        """
        if not (folder / "grace.json").exists():
            raise UserError(f"{folder}: has no grace.json; give the model/ folder of a run")
        settings = json.loads((folder / "grace.json").read_text(encoding="utf-8"))
        return cls(**settings | {"reader": ReaderConfig(**settings["reader"])})


@dataclass(frozen=True)
class Encoded:
    """Texts as a policy sees them, in their order: `written` (N), unit `vectors` (N, H) float32."""

    written: list[Written]
    vectors: Tensor

    @property
    def rationales(self) -> list[str]:
        return [item.rationale for item in self.written]


class RationaleEncoder:
    """Writes a rationale for each text and reads it into a vector.

    Attributes:
        writes_rationales: True; encoders of other methods embed a text as it is.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        template: Renders texts to prompts.
        reader: Turns what was written into vectors.
        end_ids: Token ids that end a rationale.
        max_rationale_tokens: Longest rationale.
        batch_size: Texts per generation batch.
    """

    writes_rationales = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        reader: Reader,
        end_ids: Sequence[int],
        max_rationale_tokens: int,
        batch_size: int = 256,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.reader = reader
        self.end_ids = list(end_ids)
        self.max_rationale_tokens = max_rationale_tokens
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> RationaleEncoder:
        """Load what training left in `runs/<name>/model`.

        Raises:
            UserError: The folder is no such model.
        """
        folder = Path(folder)
        settings = EncoderSettings.load(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.to(device).eval()  # type: ignore[arg-type]  # transformers' wrapper hides the types
        tokenizer = AutoTokenizer.from_pretrained(folder)
        template = PromptTemplate(
            tokenizer, settings.instruction, settings.max_text_tokens, settings.chat_template_kwargs
        )
        end_ids = end_token_ids(model, tokenizer)
        reader = Reader(settings.reader, tokenizer, end_ids, model, device)
        reader.load(folder)
        return cls(model, tokenizer, template, reader, end_ids, settings.max_rationale_tokens)

    def save(self, folder: Path) -> None:
        """Write what `from_pretrained` needs besides the model and the tokenizer."""
        settings = EncoderSettings(
            reader=self.reader.config,
            instruction=self.template.instruction,
            max_text_tokens=self.template.max_text_tokens,
            max_rationale_tokens=self.max_rationale_tokens,
            chat_template_kwargs=self.template.chat_template_kwargs,
        )
        settings.save(folder)
        self.reader.save(folder)

    @torch.no_grad()
    def write(self, texts: Sequence[str], rationale: RationaleMode = "greedy") -> list[Written]:
        """Rationales for texts, greedy. With `none` the text stands in the rationale's place."""
        prompts = [self.template.render(text) for text in texts]
        if rationale == "none":
            return [
                Written(prompt, prompt.token_ids[slice(*prompt.span)], prompt.text)
                for prompt in prompts
            ]
        token_ids: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        for start in range(0, len(prompts), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            for i, ids in zip(
                chosen, self._continue([prompts[i].token_ids for i in chosen]), strict=True
            ):
                token_ids[i] = ids
        rationales = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [Written(*item) for item in zip(prompts, token_ids, rationales, strict=True)]

    def encode(self, texts: Sequence[str], rationale: RationaleMode = "greedy") -> Encoded:
        """Write rationales and read them; the reader's centre is set, or fitted by `fit_centre`."""
        written = self.write(texts, rationale)
        return Encoded(written, self.reader.finish(self.reader.read(written)))

    def _continue(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy continuations, each up to and including its first end token."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        attention = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        was_training = self.model.training
        self.model.eval()
        generated = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=self.max_rationale_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.end_ids,
            pad_token_id=pad,
        )
        self.model.train(was_training)
        continuations: list[list[int]] = generated[:, width:].tolist()
        return [_until_end(row, self.end_ids) for row in continuations]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's end token and those the model declares."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *declared]))


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first end token.

    >>> _until_end([5, 6, 2, 0, 0], [2])
    [5, 6, 2]
    """
    ends = [i for i, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
