"""Soft-token refinement (GIRCSE, arXiv 2509.24291): embeddings that get better step by step.

A text is followed by K soft tokens, mixtures of words (`grace_rl.embed.soft_tokens`); the mean of
their states is the embedding. Every step is trained, by InfoNCE between queries and passages that
are both at this step, and to be no worse than the one before (`gircse_terms`).

What differs from the released code: keys and values of the text are computed once; negatives come
from all processes, and from batches as large as one likes; the regulariser has the weight it is
given, is per example and leaves the earlier step alone; a text is never its own negative.

It reads top to bottom: rows -> texts -> states of every step -> losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import get_peft_model
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.models.utils import _ForwardRedirection

from grace_rl.data.false_negatives import load_false_negatives
from grace_rl.data.guide import text_key
from grace_rl.data.rows import Row, pair_problems
from grace_rl.embed.soft_token_encoder import SoftTokenEncoder, SoftTokenSettings, tokenize_texts
from grace_rl.embed.soft_tokens import soft_tokens
from grace_rl.errors import UserError
from grace_rl.train.gircse_config import GIRCSEConfig, prompt_columns
from grace_rl.train.gircse_terms import icr_loss, step_losses
from grace_rl.train.gircse_words import StepWordsWriter
from grace_rl.train.policy_trainer import RowTrainer
from grace_rl.train.start import Build

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

WORDS_FILE = "soft_tokens.jsonl"
LENGTH_GROUPS, GROUP_TEXTS = 4, 16  # texts of like length share a forward: less padding

# --- rows -> texts ---------------------------------------------------------------------------


def row_problems(args: GIRCSEConfig, rows: Sequence[Row]) -> list[str]:
    """What is wrong with rows."""
    if problems := pair_problems("gircse", rows):
        return problems
    for key in ("query_prompt", "passage_prompt"):
        for column in sorted(prompt_columns(getattr(args, key))):
            without = sum(row.get(column) is None for row in rows)
            if without:
                problems.append(f"{key}: {without} of {len(rows)} rows have no column {column!r}")
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows) < batch:
        problems.append(
            f"per_device_train_batch_size: one batch takes {batch} rows "
            f"({args.per_device_train_batch_size} x {args.world_size} processes), but there are "
            f"only {len(rows)}"
        )
    return problems


def plan(recipe: Recipe, args: GIRCSEConfig, rows: Sequence[Row]) -> Build:
    """See `grace_rl.recipe.methods.Method`."""
    problems = row_problems(args, rows)
    if problems:
        raise UserError(problems)
    return lambda start: start.trainer(
        GIRCSETrainer, rows, console=start.console, run_folder=start.run_folder
    )


class TextCollator:
    """Rows to one batch of tokens: B queries, B positives, then B negatives for each n.

    A row with fewer negatives repeats its positive, which `counts` leaves out.

    Args:
        args: Prompts, `max_text_tokens` and `hard_negatives`.
        tokenizer: The policy's.
        negatives: n, how many candidates beside the positive a row gives.
    """

    def __init__(self, args: GIRCSEConfig, tokenizer: Any, negatives: int) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.negatives = negatives

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokens (B (2 + n), T), `keys` and `counts` (B (2 + n)), and the `texts` themselves."""
        sides, prompts, counts = [], [], []
        for row in rows:
            given = [row["positive"], *(row.get("negative") or [])][: 1 + self.negatives]
            missing = 1 + self.negatives - len(given)
            sides.append([row["query"], *given, *[row["positive"]] * missing])
            counts.append([True] * (1 + len(given)) + [False] * missing)
            passage = self.args.passage_prompt.format_map(row)
            prompts.append(
                [self.args.query_prompt.format_map(row)] + [passage] * len(sides[-1][1:])
            )
        texts = [text for column in zip(*sides, strict=True) for text in column]
        before = [prompt for column in zip(*prompts, strict=True) for prompt in column]
        whole = [prompt + text for prompt, text in zip(before, texts, strict=True)]
        return {
            **tokenize_texts(self.tokenizer, whole, self.args.max_text_tokens),
            "keys": torch.tensor([text_key(text) >> 1 for text in texts]),  # fits a signed integer
            "counts": torch.tensor(counts).T.flatten(),
            "texts": texts,
        }


# --- trainer ---------------------------------------------------------------------------------


class GIRCSETrainer(RowTrainer, Trainer):
    """transformers' `Trainer` with the objective of GIRCSE, on rows of pairs.

    Args:
        model: A causal language model.
        args: See `GIRCSEConfig`.
        rows: `query`, `positive`, optional `negative` (a list).
        processing_class: The model's tokenizer.
        callbacks: As in transformers.
        peft_config: An adapter to train; embeddings and head then stay as they are.
        console: Where the words of the soft tokens are printed at the end, and advice on the mask;
            None prints nothing.
        run_folder: Where the words are kept (`StepWordsWriter`), and the guide of the mask; None
            keeps neither.

    Raises:
        UserError: `args.icr` or `args.false_negatives` is wrong, or there is no such guide.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: GIRCSEConfig,
        rows: Sequence[Row],
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        console: Console | None = None,
        run_folder: Path | None = None,
    ) -> None:
        self.icr = args.icr
        self.false_negatives = load_false_negatives(args.false_negatives, list(rows), run_folder)
        self.console = console
        args.remove_unused_columns = False
        if peft_config is not None:
            model = get_peft_model(model, peft_config)  # type: ignore[assignment]
        most = max(len(row.get("negative") or []) for row in rows)
        self.negatives = min(args.hard_negatives, most)
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(rows),  # type: ignore[arg-type]  # anything with a length
            data_collator=TextCollator(args, processing_class, self.negatives),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # a mean over rows: nothing to be rescaled
        if args.word_examples and args.gircse_steps and run_folder is not None:
            texts = list(dict.fromkeys(row["query"] for row in rows))[: args.word_examples]
            self.add_callback(StepWordsWriter(self, texts, run_folder / WORDS_FILE, console))

    # -- the loss ---------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inner = self.accelerator.unwrap_model(model)
        tokens = inputs["input_ids"], inputs["attention_mask"]
        # One forward of the wrapper around all steps: DDP and DeepSpeed count forwards.
        vectors, entropy = _ForwardRedirection()(model, inner, self._vectors, *tokens)
        losses = self._step_losses(vectors, inputs)  # (Q, K), of all processes
        loss, penalty = icr_loss(losses, self.icr)
        self._note(losses.detach(), penalty.detach(), entropy)
        # Each process has gradients for its own texts only, and the wrapper averages them.
        processes = self.accelerator.num_processes
        loss = loss + (processes - 1) * (loss - loss.detach())
        return (loss, {"losses": losses}) if return_outputs else loss

    def _vectors(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(N, max(K, 1), H) embeddings after each step, and the mean entropy of soft tokens."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        if not isinstance(args, GIRCSEConfig):
            raise TypeError(f"args: {type(args).__name__} is no GIRCSEConfig")
        lengths = attention_mask.sum(1)
        order = lengths.argsort()
        groups = max(1, min(LENGTH_GROUPS, len(order) // GROUP_TEXTS))
        cached = args.mini_batch_size is not None and args.mini_batch_size < len(order)
        parts = order.split(args.mini_batch_size) if cached else order.chunk(groups)

        def encode(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            with self.accelerator.autocast():
                found = soft_tokens(
                    model, ids, mask, args.gircse_steps, temperature=args.soft_temperature
                )
            return found.vectors(), found.entropy

        vectors, entropy = [], []
        for part in parts:
            width = int(lengths[part].max())
            tokens = input_ids[part, -width:], attention_mask[part, -width:]
            # A gradient cache: recomputed in the backward pass, part by part.
            found = checkpoint(encode, *tokens, use_reentrant=False) if cached else encode(*tokens)
            vectors.append(found[0])
            entropy.append(found[1].detach())
        return torch.cat(vectors)[order.argsort()], torch.cat(entropy).mean()

    def _step_losses(self, vectors: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(Q, K) InfoNCE of the queries of all processes against the passages of all."""
        gathered = self.accelerator.gather(vectors.detach())
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        if processes > 1:
            slices = list(gathered.chunk(processes))
            slices[own] = vectors  # with its gradient
            gathered = torch.cat(slices)
        else:
            gathered = vectors
        columns = 2 + self.negatives
        batch = len(vectors) // columns

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            values = values.view(processes, columns, batch, *values.shape[1:])
            return values[:, 0].flatten(0, 1), values[:, 1:].flatten(0, 2)

        queries, candidates = sides(gathered)
        query_keys, keys = sides(self.accelerator.gather(inputs["keys"]))
        counts = sides(self.accelerator.gather(inputs["counts"]))[1]
        positives = torch.arange(len(queries), device=vectors.device)
        positives = positives // batch * (columns - 1) * batch + positives % batch
        same = (keys == query_keys[:, None]) | (keys == keys[positives][:, None])
        mask = (counts & ~same).float()
        if self.false_negatives is not None:
            mask = mask * self._guide_weights(inputs["texts"], batch, positives).to(mask)
        return step_losses(queries, candidates, positives, mask, self.icr.temperature)

    def _guide_weights(self, texts: list[str], batch: int, positives: Tensor) -> Tensor:
        """(Q, C) how much the guide lets a candidate count as a negative of a query."""
        guide, width = self.false_negatives, len(texts)
        if guide is None:
            raise RuntimeError("guide must be there")
        if self.accelerator.num_processes > 1:
            texts = gather_object(texts)
        parts = [texts[start : start + width] for start in range(0, len(texts), width)]
        queries = [text for part in parts for text in part[:batch]]
        candidates = [text for part in parts for text in part[batch:]]
        places = positives.tolist()
        weights = guide.weights(queries, candidates, [candidates[place] for place in places])
        place, row = torch.arange(len(candidates))[None], torch.arange(len(queries))[:, None]
        same_row = place // (width - batch) * batch + place % batch == row
        weights = guide.trust_labels(weights, positives.cpu()[:, None] == place, same_row)
        share = float((weights == 0).float().mean())
        self.noted["false_negatives/masked_share"].append(torch.tensor(share))
        self.say(guide.watch(share))
        return weights

    def _note(self, losses: Tensor, penalty: Tensor, entropy: Tensor) -> None:
        for k, value in enumerate(losses.mean(0), start=1):
            self.noted[f"icr/loss_{k}"].append(value)
        if losses.size(1) > 1:
            self.noted["icr/penalty"].append(penalty)
            better = losses[:, 1:] <= losses[:, :-1]
            self.noted["icr/share_not_worse"].append(better.float().mean())
            self.noted["soft_tokens/entropy"].append(entropy)

    # -- using and saving it ---------------------------------

    def encoder(self) -> SoftTokenEncoder:
        """The model as it is now, as an encoder that writes no rationale."""
        args = self.args
        if not isinstance(args, GIRCSEConfig):
            raise TypeError(f"args: {type(args).__name__} is no GIRCSEConfig")
        steps = args.gircse_steps if args.inference_steps is None else args.inference_steps
        settings = SoftTokenSettings(
            gircse_steps=steps,
            soft_temperature=args.soft_temperature,
            max_text_tokens=args.max_text_tokens,
            instruction=self._prompt("passage_prompt"),
            query_instruction=self._prompt("query_prompt"),
        )
        model = self.accelerator.unwrap_model(self.model)
        return SoftTokenEncoder(model, self.processing_class, settings)

    def _prompt(self, key: str) -> str:
        """What comes before a text by itself; nothing where it depends on a row."""
        prompt = getattr(self.args, key)
        return "" if prompt_columns(prompt) else prompt
