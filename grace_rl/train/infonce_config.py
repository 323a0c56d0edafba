"""Arguments of `InfoNCETrainer`: sentence-transformers' own, and what InfoNCE needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers

Pooling = Literal["mean", "last", "cls"]
VALIDATION_KEYS = ("dataset_name", "split", "rows")


@dataclass
class InfoNCEConfig(SentenceTransformerTrainingArguments):
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
        false_negatives: Keywords of `grace_rl.data.false_negatives.FalseNegativeConfig`: a guide
            says which texts of the batch mean the same and must not count as negatives. In the
            modes `margin` and `ratio`, the direction from positive to query (`symmetric`) compares
            with the query's own positive too.
        validation: Rows to score during training: `dataset_name` (default: the recipe's), `split`
            and `rows`. Gives the metrics `eval_recall_at_1`, `eval_triplet_accuracy` (where rows
            have a negative) and `eval_loss`; transformers' `eval_strategy`, `eval_steps`,
            `metric_for_best_model` and `load_best_model_at_end` act on them.
        early_stopping_patience: Stop after so many scorings without a better one; 0 never. Needs
            `validation`, and sets `load_best_model_at_end`.
    """

    temperature: float = 0.05
    symmetric: bool = False
    pooling: Pooling | None = None
    max_text_tokens: int = 512
    dropout: float = 0.0
    mini_batch_size: int | None = None
    gather_across_devices: bool = True
    false_negatives: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    early_stopping_patience: int = 0
    # The same text twice in a batch would be its own negative.
    batch_sampler: BatchSamplers | str = field(default=BatchSamplers.NO_DUPLICATES)

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


def infonce_problems(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the settings of a recipe, each as `key: what to do`.

    >>> infonce_problems({"temperature": 0.0, "dropout": 0.1, "validation": {"row": 5},
    ...                       "pooling": None, "early_stopping_patience": 0})
    ['temperature: must be above 0, not 0.0',
     'validation.row: unknown key; there are dataset_name, split, rows']
    """
    problems = []
    if settings["temperature"] <= 0:
        problems.append(f"temperature: must be above 0, not {settings['temperature']}")
    if not 0 <= settings["dropout"] < 1:
        problems.append(f"dropout: must be from 0 to below 1, not {settings['dropout']}")
    if settings["pooling"] not in (None, *get_args(Pooling)):
        problems.append(f"pooling: must be one of {', '.join(get_args(Pooling))} or null")
    if settings["early_stopping_patience"] < 0:
        problems.append("early_stopping_patience: must be at least 0")
    if settings["early_stopping_patience"] > 0 and settings["validation"] is None:
        problems.append("early_stopping_patience: needs validation rows; give validation: {...}")
    for key, value in (settings["validation"] or {}).items():
        if key not in VALIDATION_KEYS:
            known = ", ".join(VALIDATION_KEYS)
            problems.append(f"validation.{key}: unknown key; there are {known}")
        elif key == "rows" and (type(value) is not int or value < 2):
            problems.append(f"validation.rows: must be a whole number from 2 on, not {value!r}")
        elif key != "rows" and not isinstance(value, str):
            problems.append(f"validation.{key}: must be a text, not {value!r}")
    return problems
