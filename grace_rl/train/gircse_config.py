"""Arguments of `GIRCSETrainer`, and what must fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Annotated, Any, ClassVar

from pydantic import Field
from transformers import TrainingArguments

from grace_rl.data.false_negatives import FalseNegativeConfig
from grace_rl.recipe.fields import Rule, TrainerConfig
from grace_rl.train.gircse_terms import ICRConfig
from grace_rl.train.held import PROMPT, Held


def gircse_problems(config: GIRCSEConfig) -> Iterator[str]:
    """What GIRCSE cannot use."""
    if config.per_device_train_batch_size == 1 and config.hard_negatives == 0:
        yield "per_device_train_batch_size: 1 without hard negatives has nothing to contrast with"
    for key in ("query_prompt", "passage_prompt"):
        try:
            prompt_columns(getattr(config, key))
        except ValueError as error:
            yield f"{key}: {error}; braces name a column, as in {{instruction}}"


@dataclass
class GIRCSEConfig(TrainerConfig, TrainingArguments):
    """transformers' `TrainingArguments` with the keys of soft-token refinement.

    Args:
        gircse_steps: Soft tokens after each text, at least 0; 5 is published. 0 trains the last
            token's state, without any.
        inference_steps: Steps of the saved encoder, at least 0; `null` takes `gircse_steps`.
            Published scores use 20. It can be changed with every call.
        soft_temperature: Temperature of the soft tokens' softmax, above 0.
        icr: What is asked of the steps, see `grace_rl.train.gircse_terms.ICRConfig`.
        hard_negatives: How many of a row's negatives become candidates, at least 0. Rows with fewer
            go without.
        false_negatives: See `grace_rl.data.false_negatives.FalseNegativeConfig`: a guide
            says which candidates mean the same as a query and leave its softmax. `null`: only those
            with its own or its positive's text do.
        mini_batch_size: Texts per forward, at least 1; the loss still sees the whole batch
            (gradient cache, arXiv 2101.06983). Activations are kept for one part only, at the price
            of a second forward, so that a batch may be as large as one likes. `null` forwards the
            batch at once.
        query_prompt, passage_prompt: What comes before a text. `{column}` is filled from the row:
            "Instruct: {instruction}\\nQuery:".
        max_text_tokens: Prompt and text are cut here, at least 1.
        word_examples: Texts whose soft tokens are kept as words (soft_tokens.jsonl), before and
            after training; 0 keeps none.
        learning_rate: Published 1e-5.
        dataloader_drop_last: A last smaller batch has fewer negatives, and is left out.
    """

    gircse_steps: Annotated[int, Field(ge=0)] = 5
    inference_steps: Annotated[int, Field(ge=0)] | None = None
    soft_temperature: Annotated[float, Field(gt=0)] = 1.0
    icr: ICRConfig = field(default_factory=ICRConfig)
    hard_negatives: Annotated[int, Field(ge=0)] = 1
    false_negatives: FalseNegativeConfig | None = None
    mini_batch_size: Annotated[int, Field(ge=1)] | None = None
    query_prompt: str = ""
    passage_prompt: str = ""
    max_text_tokens: Annotated[int, Field(ge=1)] = 512
    word_examples: Annotated[int, Field(ge=0)] = 3
    learning_rate: float = 1e-5
    dataloader_drop_last: bool = True

    rules: ClassVar[tuple[Rule, ...]] = (gircse_problems,)

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Held:
        """See `TrainerConfig.held`: a query, its positive and hard negatives, or a part of all."""
        negatives = min(self.hard_negatives, max(len(row.get("negative") or []) for row in rows))
        texts = batch * (2 + negatives)
        texts = min(texts, self.mini_batch_size or texts)
        prompt = PROMPT if self.query_prompt or self.passage_prompt else 0
        tokens = min(text + prompt, self.max_text_tokens) + self.gircse_steps
        return Held(texts, tokens, texts * self.gircse_steps, in_parts=True)


def prompt_columns(prompt: str) -> set[str]:
    """The columns that a prompt names.

    Raises:
        ValueError: It is no prompt with columns.

    >>> prompt_columns("Instruct: {instruction}\\nQuery:")
    {'instruction'}
    """
    columns = set()
    for _, name, form, conversion in Formatter().parse(prompt):
        if name is None:
            continue
        if form or conversion or not name or name.isdigit() or set(name) & set(".["):
            raise ValueError(f"{{{name}}} must be a column's name alone")
        columns.add(name)
    return columns
