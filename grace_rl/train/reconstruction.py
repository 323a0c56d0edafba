"""Bidirectional reconstruction: a stage before RL that makes a vector say what the other side says.

A pair's query is read into one vector, the way the next stage will read rationales, and the same
model rebuilds the positive from this vector alone; and the other way round, on every batch. Besides
it goes on writing ordinary text or rationales, or RL would find a policy that cannot write.

The log has each direction's loss and the information gain: how much worse, in nats per token, a
text is rebuilt from another row's vector. While it is zero, the vector says nothing.

Source: bidirectional reconstruction ("Anchor Embedding", EMNLP 2025 main 216); what differs is in
`grace_rl.train.reconstruction_loss`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from grace_rl.data.rows import pair_problems, read_rows
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader, Written
from grace_rl.embed.settings import RationaleMode
from grace_rl.errors import UserError
from grace_rl.recipe.rows import DataConfig
from grace_rl.rollout.generator import end_token_ids
from grace_rl.run.screen import Screen
from grace_rl.train.keep import is_logged
from grace_rl.train.policy_trainer import RowTrainer
from grace_rl.train.reconstruction_config import ReconstructionConfig
from grace_rl.train.reconstruction_loss import PairCollator, add_reconstruction
from grace_rl.train.sft import sft_examples
from grace_rl.train.start import Build

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

WritingExample = tuple[str | None, str]
"""(text, rationale), or (None, plain text)."""

NO_GAIN = 0.01  # nats per token; untrained models lie below, and a few dozen steps pass it
WATCHED = 5  # logged gains in a row before the user is warned
LONGEST_RATIONALE = 128  # tokens the saved model may write until another stage says better


def plan(recipe: Recipe, args: ReconstructionConfig, rows: Sequence[Mapping[str, Any]]) -> Build:
    """See `grace_rl.recipe.methods.Method`."""
    examples = paired_with_writing(rows, args)
    return lambda start: start.trainer(ReconstructionTrainer, examples, console=start.console)


def writing_examples(
    rows: Sequence[Mapping[str, Any]], args: ReconstructionConfig
) -> list[WritingExample]:
    """What the model goes on writing: rationales where there are any, else the texts themselves.

    Raises:
        UserError: The file that `writing_dataset_name` names is bad.
    """
    if args.writing_dataset_name is not None:
        data = DataConfig(dataset_name=args.writing_dataset_name, rows=args.writing_dataset_rows)
        rows = read_rows(data)
    rationales, _ = sft_examples(rows)
    if rationales:
        return list(rationales)
    texts = [row[key] for row in rows for key in ("text", "query", "positive") if key in row]
    return [(None, text) for text in texts]


def paired_with_writing(
    rows: Sequence[Mapping[str, Any]], args: ReconstructionConfig
) -> list[dict[str, Any]]:
    """`{query, positive, writing}` for each row.

    Raises:
        UserError: The rows are no pairs, or what is to be written cannot be read.
    """
    if problems := pair_problems("reconstruction", rows):
        raise UserError(problems)
    if len(rows) < 2:
        raise UserError(f"method reconstruction needs at least 2 rows, not {len(rows)}")
    writing = writing_examples(rows, args) if args.writing_share else [(None, "")]
    return [
        {"query": row["query"], "positive": row["positive"], "writing": writing[i % len(writing)]}
        for i, row in enumerate(rows)
    ]


class TextEncoder(RationaleEncoder):
    """Embeds texts as they are, as the stage reads them."""

    writes_rationales = False
    collator: PairCollator

    def write(
        self, texts: Sequence[str], rationale: RationaleMode | None = None, **changes: Any
    ) -> list[Written]:
        """The texts in their rationales' places, whatever is asked for."""
        return [self.collator.written(text) for text in texts]


class ReconstructionTrainer(RowTrainer, Trainer):
    """transformers' trainer with the reconstruction loss.

    Args:
        model: The policy.
        args: The configuration.
        rows: From `paired_with_writing`.
        processing_class: Its tokenizer, with an end token.
        peft_config: Train an adapter instead of all weights.
        callbacks: As in transformers.
        console: Where it is said that the information gain stays at zero.

    Raises:
        UserError: The tokenizer has no end token.
    """

    token_masks = ("read_attention", "target_mask", "write_attention")

    def __init__(
        self,
        model: PreTrainedModel,
        args: ReconstructionConfig,
        rows: Sequence[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        console: Console | None = None,
    ) -> None:
        args.remove_unused_columns = False
        self.console = console or Screen()
        self.template = args.prompt_templates(processing_class)[""]
        if peft_config is not None:
            model = get_peft_model(model, peft_config)  # type: ignore[assignment]
        end_ids = end_token_ids(model.generation_config, processing_class)
        self.reader = Reader(args.reader, processing_class, end_ids, model, args.device)
        self.collator = PairCollator(self.template, self.reader, args.writing_share)
        add_reconstruction(model, args)
        self._gains: list[float] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(rows),  # type: ignore[arg-type]  # anything with a length
            data_collator=self.collator,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # a mean over rows: nothing to be rescaled

    # -- the loss, and what is logged of it ---------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(pairs=inputs, probe=is_logged(self.state.global_step + 1, self))
        centre = self.accelerator.reduce(outputs.pop("centre"), reduction="mean")
        self.reader.update_centre(centre.repeat(self.reader.config.parts)[None])
        for name, value in outputs.items():
            if name != "loss":
                self.noted[name].append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "information_gain" in logs:
            self._watch(logs["information_gain"])

    def _watch(self, gain: float) -> None:
        """Say so, every few logs, while vectors say nothing of the other side."""
        self._gains.append(gain)
        if len(self._gains) < WATCHED:
            return
        if max(self._gains) < NO_GAIN:
            self.say(
                f"The information gain is {gain:.4f} nats per token after {WATCHED} logs: texts "
                "are rebuilt as well from another row's vector, so the vector says nothing yet. If "
                "this stays so, raise learning_rate or look at the pairs (docs/reconstruction.md)."
            )
        self._gains.clear()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers knows single texts only."""
        return 0

    # -- using and saving it ---------------------------------

    def encoder(self) -> TextEncoder:
        """The model as it is now, as an encoder of texts."""
        policy = self.accelerator.unwrap_model(self.model)
        tokenizer = self.template.tokenizer
        encoder = TextEncoder(
            policy,
            tokenizer,
            self.template,
            self.reader,
            end_token_ids(policy.generation_config, tokenizer),
            LONGEST_RATIONALE,
        )
        encoder.rationale, encoder.collator = "none", self.collator
        return encoder

    def save_extra_state(self, folder: Path) -> None:
        (folder / "gains.json").write_text(json.dumps(self._gains), encoding="utf-8")

    def load_extra_state(self, folder: Path) -> None:
        self.reader.load(folder)
        self._gains = json.loads((folder / "gains.json").read_text(encoding="utf-8"))
