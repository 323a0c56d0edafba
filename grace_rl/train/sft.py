"""Cold start: teach a policy to write rationales from examples, before any reward.

TRL's `SFTTrainer` does the training. What differs:

- Rows are `{text, rationale}`. A text becomes the same prompt that rollouts will start from
  (`PromptTemplate`), so that no token of the prompt changes between the cold start and RL. The loss
  covers the rationale and its end token.
- Rows of pairs with explanations (`query`, `positive`, `rationale_positive: [...]`) become one
  example for each text and explanation. Rows without a rationale are left out and counted.

It reads top to bottom: rows -> examples -> tokens -> trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader
from grace_rl.errors import UserError
from grace_rl.rollout.generator import end_token, end_token_ids
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train.policy_trainer import RowTrainer
from grace_rl.train.sft_config import GraceSFTConfig
from grace_rl.train.start import Build

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

Example = tuple[str, str]
"""(text, rationale)"""


def sft_examples(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Example], int]:
    """Pair every text of every row with every rationale given for it.

    Args:
        rows: `{text, rationale}`, or `{query, positive, ...}` with `rationale` (for the query),
            `rationale_positive` (why the positive follows: for query and positive) or both; each a
            text or a list of texts.

    Returns:
        The examples in the order of the rows, and the number of rows that had none.

    Raises:
        UserError: A rationale is no text.

    >>> pair = {"query": "A man walks.", "positive": "Someone moves."}
    >>> rows = [pair | {"rationale_positive": ["To walk is to move."]}, {"text": "A cat sleeps."}]
    >>> examples, skipped = sft_examples(rows)
    >>> examples
    [('A man walks.', 'To walk is to move.'), ('Someone moves.', 'To walk is to move.')]
    >>> skipped
    1
    """
    examples: list[Example] = []
    skipped = 0
    for row in rows:
        before = len(examples)
        if "text" in row:
            examples += [(row["text"], rationale) for rationale in _texts(row, "rationale")]
        else:
            examples += [(row["query"], rationale) for rationale in _texts(row, "rationale")]
            for rationale in _texts(row, "rationale_positive"):
                examples += [(row["query"], rationale), (row["positive"], rationale)]
        skipped += len(examples) == before
    return examples, skipped


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    value = row.get(column)
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise UserError(f"{column}: must be a text or a list of texts, not {value!r}")
    return [text.strip() for text in values if text and text.strip()]


def tokenize_examples(examples: Sequence[Example], template: PromptTemplate) -> Dataset:
    """Examples as token ids: prompt, rationale, end token.

    `completion_mask` is 1 from the rationale's first token on.

    Prompt and rationale are tokenized apart, because that is how a policy writes: the prompt is
    given, and its own tokens follow.

    Raises:
        UserError: The tokenizer has no end token.
    """
    tokenizer, end = template.tokenizer, end_token(template.tokenizer)
    written_texts = [rationale for _, rationale in examples]
    rationales = tokenizer(written_texts, add_special_tokens=False)["input_ids"]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for (text, _), written in zip(examples, rationales, strict=True):
        prompt = template.render(text).token_ids
        columns["input_ids"].append([*prompt, *written, end])
        columns["completion_mask"].append([0] * len(prompt) + [1] * (len(written) + 1))
    return Dataset.from_dict(columns)


def _check_examples(examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]) -> None:
    if not examples:
        raise UserError(
            f"method sft: none of the {len(rows)} rows has a rationale; give rows with text "
            "and rationale, or with query, positive and rationale_positive"
        )


def plan(recipe: Recipe, args: GraceSFTConfig, rows: Sequence[Mapping[str, Any]]) -> Build:
    """See `grace_rl.recipe.methods.Method`."""
    _check_examples(sft_examples(rows)[0], rows)
    return lambda start: start.trainer(GraceSFTTrainer, rows)


class GraceSFTTrainer(RowTrainer, SFTTrainer):
    """TRL's `SFTTrainer` on rows of texts and rationales.

    Args:
        model: The policy.
        args: `train_sampling_strategy: sequential` keeps the order of the rows. `reader` is how the
            policy's rationales will be read; it is kept beside the weights.
        rows: See `sft_examples`.
        processing_class: The policy's tokenizer, with an end token; its padding token must be
            another one.
        callbacks, peft_config: As in TRL.

    Attributes:
        examples: Number of examples trained on.
        skipped_rows: Number of rows without a rationale.
        longest_rationale: Tokens of the longest rationale, its end token among them.

    Raises:
        UserError: No row has a rationale, or the tokenizer has no end token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: GraceSFTConfig,
        rows: Sequence[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        examples, self.skipped_rows = sft_examples(rows)
        self.examples = len(examples)
        _check_examples(examples, rows)
        if args.completion_only_loss is None:
            args.completion_only_loss = True
        self.prompt_template = args.prompt_templates(processing_class)[""]
        dataset = tokenize_examples(examples, self.prompt_template)
        self.longest_rationale = max(sum(mask) for mask in dataset["completion_mask"])
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        policy = self.accelerator.unwrap_model(self.model)
        self.end_ids = end_token_ids(policy.generation_config, processing_class)
        self.reader = Reader(
            args.reader, processing_class, self.end_ids, policy, self.accelerator.device
        )

    def encoder(self) -> RationaleEncoder:
        """The policy as it is now, as an encoder."""
        return RationaleEncoder(
            self.accelerator.unwrap_model(self.model),
            self.prompt_template.tokenizer,
            self.prompt_template,
            self.reader,
            self.end_ids,
            self.longest_rationale,
        )
