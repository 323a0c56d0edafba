"""What the soft tokens of a few texts say before and after training, in words.

`soft_tokens.jsonl` in the run directory has one line for each text and moment:

    {"step": 200, "text": "A man plays a guitar.",
     "steps": [{"words": [["music", 0.31], ["guitar", 0.12]], "entropy": 2.9, "cosine": null}, ...]}

`step` is the training step, 0 before training. `steps` has one entry for each soft token: its most
likely vocabulary items and their shares, best first; the entropy of the whole distribution in nats;
the cosine between the embeddings after this step and the one before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TrainerCallback

from grace_rl.embed.soft_token_encoder import StepWords
from grace_rl.run.files import write_text
from grace_rl.run.zero import whole_policy

SHOWN_WORDS = 3


class StepWordsWriter(TrainerCallback):
    """Writes the words when training begins and ends, and prints a table at the end.

    Args:
        trainer: A `GIRCSETrainer`.
        texts: The texts, without prompts.
        file: Where the lines go; those of other training steps are kept.
        console: Where the table goes; None prints none.
    """

    def __init__(
        self, trainer: Any, texts: Sequence[str], file: Path, console: Console | None = None
    ) -> None:
        self.trainer = trainer
        self.texts = list(texts)
        self.file = file
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self._write(args, state)
        if found and self.console is not None:
            self.console.print(words_table(found))

    def _write(self, args: Any, state: Any) -> list[StepWords]:
        found: list[StepWords] = []
        with whole_policy(self.trainer):
            if state.is_world_process_zero:
                encoder = self.trainer.encoder()
                before = encoder.settings.query_instruction  # the texts are queries
                found = encoder.step_words(self.texts, instruction=before)
                write_words(self.file, state.global_step, found)
            self.trainer.accelerator.wait_for_everyone()
        return found


def write_words(file: Path, step: int, found: Sequence[StepWords]) -> None:
    """Put a training step's lines into the file, in the place of older ones of the same step."""
    lines = [line for line in read_words(file) if line["step"] != step]
    for item in found:
        steps = [
            {
                "words": [[word, round(share, 4)] for word, share in words],
                "entropy": round(entropy, 4),
                "cosine": None if cosine is None else round(cosine, 5),
            }
            for words, entropy, cosine in zip(item.words, item.entropy, item.cosine, strict=True)
        ]
        lines.append({"step": step, "text": item.text, "steps": steps})
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_words(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's `soft_tokens.jsonl`, in their order; none if there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def words_table(found: Sequence[StepWords]) -> Table:
    """A column for each text, a row for each step with its likeliest words."""
    table = Table(title="What the soft tokens say", title_justify="left")
    table.add_column("step", justify="right")
    for item in found:
        table.add_column(escape(item.text), ratio=1)
    for k in range(max(len(item.words) for item in found)):
        cells = (
            escape(", ".join(word.strip() or repr(word) for word, _ in item.words[k][:SHOWN_WORDS]))
            for item in found
        )
        table.add_row(str(k + 1), *cells)
    return table
