"""Arguments of `InfoNCETrainer`: sentence-transformers' own, and what InfoNCE needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers

from grace_rl.data.false_negatives import FalseNegativeConfig
from grace_rl.recipe.fields import Rule, TrainerConfig
from grace_rl.recipe.schema import Section
from grace_rl.train.held import Held

Pooling = Literal["mean", "last", "cls"]


class ValidationConfig(Section):
    """Rows to score during training.

    Args:
        dataset_name: Where they come from; None is the recipe's.
        split: None is the recipe's.
        rows: Only the first so many, at least 2.
    """

    recipe_key = "validation"

    dataset_name: str | None = None
    split: str | None = None
    rows: int | None = Field(None, ge=2)


def infonce_problems(config: InfoNCEConfig) -> Iterator[str]:
    """What InfoNCE cannot use."""
    if config.early_stopping_patience > 0 and config.validation is None:
        yield "early_stopping_patience: needs validation rows; give validation: {...}"


@dataclass
class InfoNCEConfig(TrainerConfig, SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` with the keys of the InfoNCE baseline.

    Args:
        temperature: Cosines are divided by it, above 0; .02 to .1 is usual.
        symmetric: Also let each positive find its query, and average the two losses.
        pooling: How token states become a vector: `mean`, `last` or `cls`. `null` keeps a sentence
            encoder's own and is `mean` for a language model.
        max_text_tokens: Longer texts are cut here, at least 1.
        dropout: Share of the input embeddings' numbers that are dropped in training, 0 to below 1.
        mini_batch_size: Texts per forward; the loss still sees the whole batch (gradient cache,
            arXiv 2101.06983). `null` forwards the batch at once.
        gather_across_devices: Negatives from all processes.
        false_negatives: See `grace_rl.data.false_negatives.FalseNegativeConfig`: a guide
            says which texts of the batch mean the same and must not count as negatives. In the
            modes `margin` and `ratio`, the direction from positive to query (`symmetric`) compares
            with the query's own positive too.
        validation: Rows to score during training, see `ValidationConfig`. Gives the metrics
            `eval_recall_at_1`, `eval_triplet_accuracy` (where rows have a negative) and
            `eval_loss`; transformers' `eval_strategy`, `eval_steps`, `metric_for_best_model` and
            `load_best_model_at_end` act on them.
        early_stopping_patience: Stop after so many scorings without a better one; 0 never. Needs
            `validation`, and sets `load_best_model_at_end`.
    """

    temperature: Annotated[float, Field(gt=0)] = 0.05
    symmetric: bool = False
    pooling: Pooling | None = None
    max_text_tokens: Annotated[int, Field(ge=1)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mini_batch_size: Annotated[int, Field(ge=1)] | None = None
    gather_across_devices: bool = True
    false_negatives: FalseNegativeConfig | None = None
    validation: ValidationConfig | None = None
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    # The same text twice in a batch would be its own negative.
    batch_sampler: BatchSamplers | str = field(default=BatchSamplers.NO_DUPLICATES)

    rules: ClassVar[tuple[Rule, ...]] = (infonce_problems,)
    takes_encoders: ClassVar[bool] = True

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Held:
        """See `TrainerConfig.held`: a query, its positive and hard negatives, or a part of all."""
        texts = batch * (2 + min(len(row.get("negative") or []) for row in rows))
        return Held(min(texts, self.mini_batch_size or texts), text, in_parts=True)

    def __post_init__(self) -> None:
        if self.validation is not None:
            if self.eval_strategy == "no":
                self.eval_strategy = "steps"
            if self.metric_for_best_model is None:
                self.metric_for_best_model = "eval_recall_at_1"
                self.greater_is_better = True
        if self.early_stopping_patience:
            self.load_best_model_at_end = True
            if self.save_strategy != "best":
                self.save_strategy = self.eval_strategy
                self.save_steps = self.eval_steps or self.logging_steps
        super().__post_init__()
