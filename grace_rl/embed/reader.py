"""How a rationale becomes a vector: the same reader in training, encoding and evaluation.

Three spans (`ReaderConfig.span`):

- `context`: the mean over the user's text, the chat glue and the rationale up to and including its
  end token, as in GRACE (arXiv 2510.04506, eq. 9-11).
- `rationale`: the rationale's tokens only; the model still sees the text.
- `bottleneck`: the rationale is read again alone, the text hidden. The vector is a function of the
  words that were written and of nothing else. Costs one more backbone pass over the short
  rationale.

Raw vectors of mean-pooled states share one large common direction; `centre` subtracts its running
mean, which is stored with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from grace_rl.embed.hidden_states import (
    decoder_blocks,
    decoder_stack,
    layer_numbers,
    pool_prefixes,
    pool_states,
    tap_layers,
)
from grace_rl.errors import UserError
from grace_rl.recipe.schema import Items, Section
from grace_rl.rollout.prompts import Prompt
from grace_rl.run.files import whole_file
from grace_rl.run.zero import outside_zero3, plain_copy

Span = Literal["context", "rationale", "bottleneck"]
Pool = Literal["mean", "last"]

CENTRE_FILE = "reader/centre.safetensors"
FROZEN_FOLDER = "reader/frozen"
CENTRE_MOMENTUM = 0.9  # a mean over about ten batches: steady, yet it follows a policy that moves


class ReaderConfig(Section):
    """What to read, and with which weights.

    Args:
        span: `context`, `rationale` or `bottleneck`.
        layers: Hidden layers, 0 (input embeddings) to -1 (after the final norm). Left out they are
            `(0, -1)` for the bottleneck, else `(-1,)`. Several are normalised and added.
        centre: Subtract the running mean.
        pool: `mean` over the span's tokens, or its `last` token.
        weights: `policy` (the current weights), `frozen` (a copy from before training), or the name
            or path of a sentence-transformers model that embeds the written strings.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "reader"

    span: Span = "bottleneck"
    layers: Items[int] = Field(default=(), min_length=1)
    centre: bool = True
    pool: Pool = "mean"
    weights: str = Field(default="policy", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("layers", ()) is None:
            return {key: value for key, value in values.items() if key != "layers"}
        return values

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.reads_with_language_model and self.span == "rationale":
            raise UserError(
                "span: a sentence encoder cannot read the rationale's tokens with the text in "
                "view; use bottleneck (the rationale alone) or context (text and rationale)"
            )
        if not self.layers:  # and stays a key that was not given
            object.__setattr__(self, "layers", (0, -1) if self.span == "bottleneck" else (-1,))
        return self

    @property
    def reads_with_language_model(self) -> bool:
        return self.weights in ("policy", "frozen")

    @property
    def in_context(self) -> bool:
        """Whether the vector comes from a forward over prompt and rationale together."""
        return self.reads_with_language_model and self.span != "bottleneck"


@dataclass(frozen=True)
class Written:
    """A rationale as written: its prompt, its token ids with the end token, and its text."""

    prompt: Prompt
    token_ids: list[int]
    rationale: str


class Reader:
    """Turns written rationales into vectors.

    Args:
        config: What to read.
        tokenizer: The policy's.
        end_ids: Token ids that end a rationale; the bottleneck leaves them out, as they are no
            words.
        model: The policy as it is now; `weights: frozen` copies it here, `policy` reads with
            whatever backbone the caller passes later.
        device: Where frozen weights and sentence encoders live.
        batch_size: Rationales per forward.

    Raises:
        UserError: The model has no such layer, or the sentence encoder that `weights` names cannot
            be loaded.
    """

    def __init__(
        self,
        config: ReaderConfig,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        model: nn.Module,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.centre: Tensor | None = None
        if config.reads_with_language_model:
            layer_numbers(config.layers, len(decoder_blocks(decoder_stack(model))))
        self._policy = model
        if config.weights == "frozen":
            self._policy = plain_copy(model).to(self.device).requires_grad_(False).eval()
        self._sentence_encoder = (
            None if config.reads_with_language_model else _load_encoder(config.weights, self.device)
        )

    @property
    def frozen_policy(self) -> nn.Module | None:
        """The copy that reads, with `weights: frozen`."""
        return self._policy if self.config.weights == "frozen" else None

    @property
    def sentence_encoder(self) -> Any:
        """The sentence-transformers model that reads, if one does."""
        return self._sentence_encoder

    # -- raw vectors ---------------------------------

    def read(
        self, written: Sequence[Written], ends: Tensor | None = None, gradient: bool = False
    ) -> Tensor:
        """Raw vectors, float32, neither centred nor normalised, with a forward pass of its own.

        Args:
            written: N rationales.
            ends: (N, K+1) long, how many of a rationale's tokens each of its prefixes has. All
                prefixes come from the one pass that reads the whole.
            gradient: Keep the graph, and leave the weights in training mode if they are.

        Returns:
            (N, H); with `ends` (N, K+1, H). A prefix without any token to pool is zero.

        Raises:
            ValueError: `ends` with a sentence encoder, which would read every prefix anew.
        """
        if not self.config.reads_with_language_model:
            if ends is not None:
                raise ValueError("a sentence encoder reads no prefixes")
            return self._read_strings(written)
        rows = [self.tokens_to_read(item) for item in written]
        places = None if ends is None else self._prefix_places(written, rows, ends)
        vectors: list[Tensor] = []
        was_training = self._policy.training
        self._policy.train(was_training and gradient)
        stack = decoder_stack(self._policy)
        device = next(stack.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
        for start in range(0, len(rows), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = [rows[i] for i in chosen]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.full((len(batch), width), self._padding, dtype=torch.long)
            attention = torch.zeros_like(ids)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for i, (row, first) in enumerate(batch):
                ids[i, : len(row)] = torch.tensor(row)
                attention[i, : len(row)] = 1
                mask[i, first : len(row)] = True
            span = (mask.to(device), None if places is None else places[chosen])

            def receive(states: Tensor, span: tuple[Tensor, Tensor | None] = span) -> None:
                vectors.append(self._pool(states, *span))

            with torch.set_grad_enabled(gradient), tap_layers(stack, self.config.layers, receive):
                stack(
                    input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False
                )
        self._policy.train(was_training)
        back = torch.tensor(order, device=vectors[0].device).argsort()
        return torch.cat(vectors)[back]

    def tokens_to_read(self, item: Written) -> tuple[list[int], int]:
        """The tokens one forward sees, and the first of them that is pooled.

        Where there is neither a prompt nor a rationale, none is, and the raw vector is zero.
        """
        if not item.prompt.token_ids and not item.token_ids:
            return [self._padding], 1
        if self.config.span == "bottleneck":
            words = [token for token in item.token_ids if token not in self.end_ids]
            return words or [self._padding], 0
        first = item.prompt.span[0] if self.config.span == "context" else len(item.prompt.token_ids)
        return item.prompt.token_ids + item.token_ids, first

    def _prefix_places(
        self, written: Sequence[Written], rows: Sequence[tuple[list[int], int]], ends: Tensor
    ) -> Tensor:
        """(N, K+1) ends as positions in the rows that are read, which may lack the end token."""
        alone = self.config.span == "bottleneck"
        before = torch.tensor([0 if alone else len(item.prompt.token_ids) for item in written])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        return (ends.cpu() + before.unsqueeze(1)).minimum(lengths.unsqueeze(1))

    def _pool(self, states: Tensor, mask: Tensor, ends: Tensor | None) -> Tensor:
        if ends is None:
            return pool_states(states, mask, self.config.pool)
        return pool_prefixes(states, mask, ends.to(states.device), self.config.pool)

    def tap(
        self,
        model: nn.Module,
        spans: Callable[[int], tuple[Tensor, Tensor | None]],
        vectors: list[Tensor],
    ) -> Any:
        """Within it, the policy's own forwards over prompt and rationale also yield raw vectors.

        Args:
            model: The unwrapped policy.
            spans: Gives for the forward with the given number, counted from 0, the (B, T) pooling
                mask, and the (B, K+1) ends of prefixes as positions, or None.
            vectors: Receives one tensor per forward, (B, H), or (B, K+1, H) with ends.
        """

        def receive(states: Tensor) -> None:
            vectors.append(self._pool(states, *spans(len(vectors))))

        return tap_layers(decoder_stack(model), self.config.layers, receive)

    def _read_strings(self, written: Sequence[Written]) -> Tensor:
        if self.config.span == "bottleneck":
            strings = [item.rationale for item in written]
        else:
            strings = [f"{item.prompt.text}\n{item.rationale}" for item in written]
        if self._sentence_encoder is None:
            raise RuntimeError("_sentence_encoder must be there")
        vectors = self._sentence_encoder.encode(
            strings, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return torch.as_tensor(vectors, dtype=torch.float32)

    @property
    def _padding(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    # -- centring ---------------------------------

    def update_centre(self, mean: Tensor) -> None:
        """Move the running mean towards a raw batch's mean (H,); the first batch sets it."""
        if self.config.centre:
            momentum = 0.0 if self.centre is None else CENTRE_MOMENTUM
            old = mean if self.centre is None else self.centre.to(mean.device)
            self.centre = momentum * old + (1 - momentum) * mean

    def finish(self, raw: Tensor) -> Tensor:
        """Unit vectors from raw ones, (..., H) -> (..., H): centred, then L2-normalised.

        A reader without a centre only normalises.
        A raw vector of zero (nothing was read) stays zero: it is equally far from every text.
        """
        read = raw.any(-1, keepdim=True)
        if self.config.centre and self.centre is not None:
            raw = raw - self.centre.to(raw.device)
        return normalize(raw, dim=-1) * read

    def save(self, folder: Path) -> None:
        """Write the centre, if there is one, to `folder/reader/centre.safetensors`.

        Frozen weights go to `folder/reader/frozen`. Both have a folder of their own since vLLM
        takes every safetensors file beside a model's config for weights of the model.
        """
        if self.centre is not None:
            (folder / "reader").mkdir(exist_ok=True)
            with whole_file(folder / CENTRE_FILE) as unfinished:
                save_file({"centre": self.centre.cpu()}, str(unfinished))
        if self.config.weights == "frozen":
            frozen: Any = self._policy
            if hasattr(frozen, "merge_and_unload"):  # an adapter that had learned nothing yet
                frozen = copy.deepcopy(frozen).merge_and_unload()
            frozen.save_pretrained(folder / FROZEN_FOLDER)

    def load(self, folder: Path) -> None:
        """Read the centre back, if the folder has one."""
        if (folder / CENTRE_FILE).exists():
            self.centre = load_file(str(folder / CENTRE_FILE))["centre"].to(self.device)


def _load_encoder(name: str, device: torch.device) -> Any:
    """A sentence-transformers model; its library is imported only where one is asked for."""
    from sentence_transformers import SentenceTransformer

    try:
        with outside_zero3():
            return SentenceTransformer(name, device=str(device))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"reader.weights: cannot load {name!r}: {reason}") from error
