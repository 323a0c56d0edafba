"""Arguments of `ReconstructionTrainer`, and what must fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from grace_rl.embed.reader import ReaderConfig
from grace_rl.errors import UserError
from grace_rl.train.reading_config import ReadingConfig

Anchor = Literal["eos", "mean"]
POOLS = {"eos": "last", "mean": "mean"}
"""The reader's `pool` that reads what an anchor has trained."""


@dataclass
class ReconstructionConfig(ReadingConfig, TrainingArguments):
    """transformers' `TrainingArguments` with the fields of `ReadingConfig`.

    `reader` is how the next stage reads rationales; here it reads the texts themselves. A
    bottleneck reader sees the text alone; the others see it inside the prompt, which an end token
    closes as if the rationale were empty.

    Args:
        anchor: Which vector must hold the other side: `mean` over the tokens that are read, or the
            state at the end token (`eos`, as published). The reader's `pool` must agree: mean, or
            last, which needs `span: context` or `rationale` since a bottleneck reads no end token.
        alpha: Weight of rebuilding the positive from the query (EBQ2D), 0 to 1; rebuilding the
            query from the positive (EBD2Q) has the rest.
        writing_share: Ordinary text or rationales to write, as a share of a batch's rows and of the
            loss: 0 to below 1. It keeps the model able to write.
        writing_dataset_name: A local file of what is written: rows with `text` and `rationale`, or
            `text` alone. `None` takes the rationales of the rows, or their texts if there are none.
        writing_dataset_rows: Only its first so many rows.
    """

    anchor: Anchor = "mean"
    alpha: float = 0.2
    writing_share: float = 0.15
    writing_dataset_name: str | None = None
    writing_dataset_rows: int | None = None


def reconstruction_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings, as `Method.check` wants it."""
    problems = []
    if not 0 <= settings["alpha"] <= 1:
        problems.append(f"alpha: must be from 0 to 1, not {settings['alpha']}")
    if not 0 <= settings["writing_share"] < 1:
        problems.append(
            f"writing_share: must be from 0 to below 1, not {settings['writing_share']}"
        )
    if settings["per_device_train_batch_size"] == 1:
        problems.append(
            "per_device_train_batch_size: must be at least 2: the information gain compares a "
            "row's vector with another row's"
        )
    file = settings["writing_dataset_name"]
    if file is not None and not Path(file).is_file():
        problems.append(
            f"writing_dataset_name: there is no file {file}; paths start at the working directory "
            f"{Path.cwd()}"
        )
    try:
        reader = ReaderConfig(**settings["reader"])
    except (UserError, TypeError):  # reported where readers are checked
        return problems
    anchor = settings["anchor"]
    if reader.weights != "policy":
        problems.append(
            f"reader.weights: must be policy, the model in training, not {reader.weights!r}"
        )
    if reader.pool != POOLS[anchor]:
        problems.append(
            f"anchor: {anchor} trains what a reader with pool: {POOLS[anchor]} reads, but the "
            f"reader's pool is {reader.pool}; change one of the two"
        )
    elif anchor == "eos" and reader.span == "bottleneck":
        problems.append(
            "anchor: eos is the state at the end token, which a bottleneck reader leaves out; "
            "use reader.span: context, or anchor: mean"
        )
    return problems
