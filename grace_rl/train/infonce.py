"""The baseline that rationales must be measured against: InfoNCE on the text, nothing written.

sentence-transformers' trainer and its `MultipleNegativesRankingLoss` (InfoNCE, arXiv 1807.03748)
do the training. What is added:

- A causal language model is trained as a sentence encoder, and keeps its head: model/ loads as a
  `SentenceTransformer` and with `AutoModelForCausalLM`, so that it can be the start of RL. An
  encoder model (BERT, MiniLM) is trained as it is.
- Rows are ours: `query`, `positive`, hard negatives. A quad gives two examples, its second pair
  having the query for a hard negative, so that InfoNCE sees all that a reward sees.
- Dropout on the input embeddings, for any architecture; early stopping on rows of a validation
  split.

It reads top to bottom: rows -> examples -> model -> loss -> trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback

from grace_rl.data.false_negatives import load_false_negatives
from grace_rl.data.rows import Row, pair_problems, read_rows
from grace_rl.embed.hidden_states import decoder_stack
from grace_rl.embed.sentence_encoder import SentenceEncoder
from grace_rl.embed.similarity import TIE
from grace_rl.errors import UserError, first_line
from grace_rl.recipe.rows import DataConfig
from grace_rl.rollout.policy import is_language_model, read_config
from grace_rl.train.guided_infonce import CachedGuidedInfoNCE, GuidedInfoNCE, Marks, row_numbers
from grace_rl.train.infonce_config import InfoNCEConfig, ValidationConfig
from grace_rl.train.policy_trainer import RowTrainer
from grace_rl.train.start import Build, Start

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

POOLING_MODES = {"mean": "mean", "last": "lasttoken", "cls": "cls"}

# --- rows -> examples ------------------------------------------------------------------------


def contrastive_examples(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """`(query, positive, hard negative, ...)` for each row, and for a quad's other pair.

    The loss needs the same number of hard negatives everywhere: the fewest that a row has.

    >>> contrastive_examples([{"query": "a", "positive": "b", "negative": ["c"],
    ...                        "negative_positive": "d"}])
    [('a', 'b', 'c'), ('c', 'd', 'a')]
    """
    examples = []
    for row in rows:
        negatives = row.get("negative") or []
        examples.append((row["query"], row["positive"], *negatives))
        if row.get("negative_positive"):
            examples.append((negatives[0], row["negative_positive"], row["query"]))
    width = min(map(len, examples))
    return [example[:width] for example in examples]


def examples_dataset(rows: Sequence[Mapping[str, Any]], numbered: bool = False) -> Dataset:
    """Columns `query`, `positive`, `negative_1`, ...: what the loss takes, in this order.

    `numbered` adds each example's number as its label.
    """
    examples = contrastive_examples(rows)
    names = ["query", "positive", *(f"negative_{i}" for i in range(1, len(examples[0]) - 1))]
    columns: dict[str, list[Any]] = dict(
        zip(names, map(list, zip(*examples, strict=True)), strict=True)
    )
    if numbered:
        columns["label"] = list(range(len(examples)))
    return Dataset.from_dict(columns)


def plan(recipe: Recipe, args: InfoNCEConfig, rows: Sequence[Row]) -> Build:
    """See `grace_rl.recipe.methods.Method`."""
    validation = []
    if args.validation is not None:
        validation = read_rows(_validation_data(recipe.data, args.validation))
    problems = pair_problems("infonce", rows)
    problems += pair_problems("infonce", validation, "the validation rows")
    if problems:
        raise UserError(problems)

    def build(start: Start) -> InfoNCETrainer:
        path = start.model_path()
        policy, tokenizer = start.load_policy() if is_policy(path) else (None, None)
        return InfoNCETrainer(
            path if policy is None else (policy, tokenizer),
            args,
            rows,
            validation,
            peft_config=start.peft_config,
            run_folder=start.run_folder,
        )

    return build


def _validation_data(data: DataConfig, wanted: ValidationConfig) -> DataConfig:
    if wanted.dataset_name is not None:
        data = DataConfig(dataset_name=wanted.dataset_name, columns=data.columns)
    return data.changed(train_split=wanted.split or data.train_split, rows=wanted.rows)


# --- model -----------------------------------------------------------------------------------


def is_policy(path: str) -> bool:
    """Whether a folder or hub id is a causal language model.

    Raises:
        UserError: There is no such model.
    """
    return is_language_model(read_config(path))


def sentence_transformer_of(policy: Any, tokenizer: Any, pooling: str) -> SentenceTransformer:
    """A policy's decoder stack and a pooling: the very same weights, the head left aside."""
    # On the meta device nothing is loaded: the module only learns what kind of model it has. Left
    # to itself it would put a text into the chat template.
    transformer = Transformer(
        policy.name_or_path,
        model_kwargs={"device_map": "meta"},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    stack: Any = decoder_stack(policy)
    transformer.model = stack
    transformer.processor = tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    pool = Pooling(stack.config.hidden_size, POOLING_MODES[pooling])
    return SentenceTransformer(modules=[transformer, pool], device=str(policy.device))


def encoder_model(path: str, pooling: str | None) -> SentenceTransformer:
    """An encoder model with its own pooling, or the one asked for.

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        model = SentenceTransformer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: cannot load {path!r}: {first_line(error)}") from error
    if pooling is not None:
        places = [i for i, module in enumerate(model) if isinstance(module, Pooling)]
        if not places:
            raise UserError(f"pooling: {path} has a pooling of its own kind; set pooling: null")
        own: Any = model[places[0]]
        own.pooling_mode = POOLING_MODES[pooling]
    return model


# --- loss ------------------------------------------------------------------------------------


def reader_loss(
    model: SentenceTransformer, args: InfoNCEConfig, marks: Marks | None = None
) -> nn.Module:
    """InfoNCE over the similarities of a batch (B, B * (1 + hard negatives)); `marks` mask some."""
    keywords: dict[str, Any] = {
        "scale": 1.0 / args.temperature,
        "gather_across_devices": args.gather_across_devices and args.world_size > 1,
    }
    if args.symmetric:
        keywords["directions"] = ("query_to_doc", "doc_to_query")
        keywords["partition_mode"] = "per_direction"
    if marks is not None and args.mini_batch_size is None:
        return GuidedInfoNCE(model, marks, **keywords)
    if marks is not None:
        return CachedGuidedInfoNCE(model, marks, mini_batch_size=args.mini_batch_size, **keywords)
    if args.mini_batch_size is None:
        return MultipleNegativesRankingLoss(model, **keywords)
    return CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=args.mini_batch_size, **keywords
    )


class RowScores(BaseEvaluator):
    """Recall@1 and triplet accuracy on rows; ties are errors, as in `evaluate.similarity`.

    Args:
        rows: Rows with `query`, `positive` and perhaps `negative`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.rows = rows

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        texts = [row[name] for name in ("query", "positive") for row in self.rows]
        owners = [i for i, row in enumerate(self.rows) for _ in row.get("negative") or []]
        texts += [text for row in self.rows for text in row.get("negative") or []]
        count = len(self.rows)
        unit = SentenceEncoder(model).encode(texts).vectors
        similarity = unit[:count] @ unit[count:].T  # (N, N + negatives)
        own = similarity.diagonal().clone() - TIE
        scores = {}
        if owners:
            given = similarity[owners, range(count, count + len(owners))]
            scores["triplet_accuracy"] = float((own[owners] > given).float().mean())
        similarity.diagonal().fill_(-torch.inf)
        return {"recall_at_1": float((own > similarity.amax(1)).float().mean()), **scores}


# --- trainer ---------------------------------------------------------------------------------


class InfoNCETrainer(RowTrainer, SentenceTransformerTrainer):
    """sentence-transformers' trainer on rows, for language models and encoders.

    Args:
        model: A policy and its tokenizer, or the folder or hub id of an encoder model.
        args: See `InfoNCEConfig`.
        rows: `query`, `positive`, optional `negative` (list) and `negative_positive`.
        validation: Rows that `args.validation` stands for; scored every `eval_steps`.
        callbacks: As in transformers.
        peft_config: An adapter to train; the saved model has it merged in.
        run_folder: Where the guide of `args.false_negatives` is kept; None keeps it for this
            process alone.

    Attributes:
        whole: What is saved: the policy with its head, or the encoder's transformer.
    """

    def __init__(
        self,
        model: tuple[Any, Any] | str,
        args: InfoNCEConfig,
        rows: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]] = (),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        run_folder: Path | None = None,
    ) -> None:
        false_negatives = load_false_negatives(
            args.false_negatives, [dict(row) for row in rows], run_folder
        )
        marks = None
        if false_negatives is not None:
            marks = Marks(false_negatives, contrastive_examples(rows), row_numbers(rows))
        if isinstance(model, str):
            sentences = encoder_model(model, args.pooling)
            self.whole: Any = sentences[0].model
        else:
            sentences = sentence_transformer_of(*model, args.pooling or "mean")
            self.whole = model[0]
        sentences.max_seq_length = args.max_text_tokens
        sentences.is_gradient_checkpointing = False  # type: ignore[assignment]  # TRL asks models
        self._adapter = None
        if peft_config is not None:
            self._adapter = _with_adapter(
                self.whole, peft_config, is_encoder=isinstance(model, str)
            )
        if args.dropout:
            _drop_inputs(sentences[0].model, args.dropout)
        callbacks = list(callbacks or [])
        if args.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(
            model=sentences,
            args=args,
            train_dataset=examples_dataset(rows, numbered=marks is not None),
            eval_dataset=examples_dataset(validation) if validation else None,
            loss=reader_loss(sentences, args, marks),
            evaluator=RowScores(validation) if validation else None,
            callbacks=callbacks,
        )

    def encoder(self) -> SentenceEncoder:
        """The model as it is now, as an encoder that writes nothing."""
        return SentenceEncoder(self.accelerator.unwrap_model(self.model))

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No model card: it would ask the hub about the data."""

    # -- saving: a checkpoint resumes, the model is whole ---------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model with its head, an adapter merged in; checkpoints keep the adapter."""
        if self._adapter is None or _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            merged = copy.deepcopy(self._adapter).merge_and_unload()
            self._write(merged, str(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        if self._adapter is None:
            self._write(self.whole, folder)
        else:
            self._adapter.save_pretrained(folder)

    def _write(self, whole: Any, folder: str) -> None:
        with _in_place_of_its_stack(self.accelerator.unwrap_model(self.model), whole) as model:
            model.save_pretrained(folder, create_model_card=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._adapter is None:
            saved = type(self.whole).from_pretrained(resume_from_checkpoint, dtype=self.whole.dtype)
            self.whole.load_state_dict(saved.state_dict())
        else:
            set_peft_model_state_dict(self._adapter, load_peft_weights(resume_from_checkpoint))


def _with_adapter(whole: nn.Module, peft_config: Any, is_encoder: bool) -> Any:
    """The PEFT model around `whole`, whose layers get the adapter's in place."""
    if is_encoder:
        peft_config.task_type = None  # TRL's configs say CAUSAL_LM
    return get_peft_model(whole, peft_config)  # type: ignore[arg-type]


def _drop_inputs(stack: Any, share: float) -> None:
    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, training=module.training)

    stack.get_input_embeddings().register_forward_hook(drop)


@contextmanager
def _in_place_of_its_stack(model: SentenceTransformer, whole: Any) -> Iterator[SentenceTransformer]:
    """Within it, saving the sentence-transformers model writes `whole` for its transformer."""
    transformer: Any = model[0]
    stack = transformer.model
    transformer.model = whole
    try:
        yield model
    finally:
        transformer.model = stack
