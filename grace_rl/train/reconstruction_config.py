"""Arguments of `ReconstructionTrainer`, and what must fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from transformers import TrainingArguments

from grace_rl.embed.reading_config import ReadingConfig
from grace_rl.errors import missing
from grace_rl.recipe.fields import Rule
from grace_rl.train.held import PROMPT, Held

Anchor = Literal["eos", "mean"]
POOLS = {"eos": "last", "mean": "mean"}
"""The reader's `pool` that reads what an anchor has trained."""


def reconstruction_problems(config: ReconstructionConfig) -> Iterator[str]:
    """What reconstruction cannot use."""
    if config.per_device_train_batch_size == 1:
        yield (
            "per_device_train_batch_size: must be at least 2: the information gain compares a "
            "row's vector with another row's"
        )
    file = config.writing_dataset_name
    if file is not None and not Path(file).is_file():
        yield f"writing_dataset_name: {missing(f'file {file}')}"


def anchor_problems(config: ReconstructionConfig) -> Iterator[str]:
    """The reader must read the vector that the anchor trains."""
    reader, anchor = config.reader, config.anchor
    if reader.weights != "policy":
        yield f"reader.weights: must be policy, the model in training, not {reader.weights!r}"
    if reader.pool != POOLS[anchor]:
        yield (
            f"anchor: {anchor} trains what a reader with pool: {POOLS[anchor]} reads, but the "
            f"reader's pool is {reader.pool}; change one of the two"
        )
    elif anchor == "eos" and reader.reads_alone:
        yield (
            "anchor: eos is the state at the end token, which a bottleneck reader leaves out; "
            "use reader.span: context, or anchor: mean"
        )


@dataclass
class ReconstructionConfig(ReadingConfig, TrainingArguments):
    """transformers' `TrainingArguments` with the fields of `ReadingConfig`.

    `reader` is how the next stage reads rationales; here it reads the texts themselves. A
    bottleneck reader sees the text alone; the others see it inside the prompt, which an end token
    closes as if the rationale were empty.

    Args:
        anchor: Which vector must hold the other side: `mean` over the tokens that are read, or the
            state at the end token (`eos`, as published). The reader's `pool` must agree: mean, or
            last, which needs `span: context` or `rationale`: what is read alone has no end token.
        alpha: Weight of rebuilding the positive from the query (EBQ2D), 0 to 1; rebuilding the
            query from the positive (EBD2Q) has the rest.
        writing_share: Ordinary text or rationales to write, as a share of a batch's rows and of the
            loss: 0 to below 1. It keeps the model able to write.
        writing_dataset_name: A local file of what is written: rows with `text` and `rationale`, or
            `text` alone. `None` takes the rationales of the rows, or their texts if there are none.
        writing_dataset_rows: Only its first so many rows.
    """

    anchor: Anchor = "mean"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    writing_share: Annotated[float, Field(ge=0, lt=1)] = 0.15
    writing_dataset_name: str | None = None
    writing_dataset_rows: Annotated[int, Field(ge=1)] | None = None

    rules: ClassVar[tuple[Rule, ...]] = (reconstruction_problems, anchor_problems)

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Held:
        """See `TrainerConfig.held`: both sides are read, both are rebuilt, and some are written."""
        tokens = text + (1 if self.reader.reads_alone else PROMPT)
        written = math.ceil(batch * self.writing_share)
        return Held(4 * batch + written, tokens, (2 * batch + written) * (text + 1))
