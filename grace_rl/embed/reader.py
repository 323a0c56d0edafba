"""How a rationale becomes a vector: the same reader in training, encoding and evaluation.

Four spans (`ReaderConfig.span`):

- `context`: the mean over the user's text, the chat glue and the rationale up to and including its
  end token, as in GRACE (arXiv 2510.04506, eq. 9-11).
- `rationale`: the rationale's tokens only; the model still sees the text.
- `bottleneck`: the rationale is read again alone, the text hidden. The vector is a function of the
  words that were written and of nothing else. Costs one more backbone pass over the short
  rationale.
- `joint`: text and rationale are each read alone, and their unit vectors are added, the
  rationale's times `weight`. Without a rationale it is the text's vector.

Raw vectors of mean-pooled states share one large common direction; `centre` subtracts its running
mean, which is stored with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
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
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.errors import UserError, first_line
from grace_rl.rollout.prompts import Prompt
from grace_rl.run.files import whole_file
from grace_rl.run.zero import outside_zero3, plain_copy

CENTRE_FILE = "reader/centre.safetensors"
FROZEN_FOLDER = "reader/frozen"
CENTRE_MOMENTUM = 0.9  # a mean over about ten batches: steady, yet it follows a policy that moves


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

    Attributes:
        centre: What `finish` subtracts, as wide as a raw vector; None before there is one.
        weight: Of `joint`, as given or as it was learned.

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
        self.weight = config.weight
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

    def plain(self, prompt: Prompt) -> Written:
        """A text for which nothing is written: `joint` reads no rationale beside it, the others
        read the text in the rationale's place."""
        if self.config.span == "joint":
            return Written(prompt, [], "")
        return Written(prompt, prompt.token_ids[slice(*prompt.span)], prompt.text)

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
            (N, R); with `ends` (N, K+1, R). R is the width H of the states; of `joint` it is 2H,
            the text's half and the rationale's. What has no token to pool is zero.

        Raises:
            ValueError: `ends` with a sentence encoder, which would read every prefix anew.
        """
        if not self.config.reads_with_language_model:
            if ends is not None:
                raise ValueError("a sentence encoder reads no prefixes")
            return self._read_strings(written)
        rows = [self.tokens_to_read(item) for item in written]
        places = None if ends is None else self._prefix_places(written, rows, ends)
        words = self._read_tokens(rows, places, gradient)
        if self.config.span != "joint":
            return words
        spans = [item.prompt.token_ids[slice(*item.prompt.span)] for item in written]
        texts = [(ids, 0) if ids else ([self._padding], 1) for ids in spans]
        alone = self._read_tokens(texts, None, gradient)
        if ends is not None:
            alone = alone[:, None].expand_as(words)
        return torch.cat([alone, words], dim=-1)

    def _read_tokens(
        self, rows: Sequence[tuple[list[int], int]], places: Tensor | None, gradient: bool
    ) -> Tensor:
        """(N, H), or (N, K+1, H) with places, of rows of tokens and the first that is pooled.

        Rows that are the same are read once. The number of forwards depends on N alone, as
        processes that share weights need it.
        """
        ends = [()] * len(rows) if places is None else [tuple(row) for row in places.tolist()]
        keys = [(tuple(ids), first, end) for (ids, first), end in zip(rows, ends, strict=True)]
        distinct = sorted(set(keys), key=lambda key: (len(key[0]), key))  # little padding
        place = {key: i for i, key in enumerate(distinct)}
        forwards = -(-len(rows) // self.batch_size)
        distinct += distinct[:1] * (forwards - len(distinct))
        cuts = [len(distinct) * number // forwards for number in range(forwards + 1)]
        was_training = self._policy.training
        self._policy.train(was_training and gradient)
        vectors = [self._forward(distinct[start:end], gradient) for start, end in pairwise(cuts)]
        self._policy.train(was_training)
        return torch.cat(vectors)[[place[key] for key in keys]]

    def _forward(
        self, rows: Sequence[tuple[tuple[int, ...], int, tuple[int, ...]]], gradient: bool
    ) -> Tensor:
        """One pass over rows: tokens, the first that is pooled, ends of prefixes or none."""
        stack, vectors = decoder_stack(self._policy), list[Tensor]()
        device = next(stack.parameters()).device
        width = max(len(tokens) for tokens, _, _ in rows)
        ids = torch.full((len(rows), width), self._padding, dtype=torch.long)
        attention = torch.zeros_like(ids)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, (tokens, first, _) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            attention[i, : len(tokens)] = 1
            mask[i, first : len(tokens)] = True
        places = torch.tensor([ends for _, _, ends in rows]) if rows[0][2] else None

        def receive(states: Tensor) -> None:
            vectors.append(self.pool(states, mask.to(device), places))

        with torch.set_grad_enabled(gradient), tap_layers(stack, self.config.layers, receive):
            stack(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
        return vectors[0]

    def tokens_to_read(self, item: Written) -> tuple[list[int], int]:
        """The tokens one forward sees, and the first of them that is pooled.

        Where there is neither a prompt nor a rationale, none is, and the raw vector is zero; nor is
        any of a rationale without words by `joint`, whose vector is then the text's.
        """
        if not item.prompt.token_ids and not item.token_ids:
            return [self._padding], 1
        if self.config.reads_alone:
            words = [token for token in item.token_ids if token not in self.end_ids]
            return words or [self._padding], int(not words and self.config.span == "joint")
        first = item.prompt.span[0] if self.config.span == "context" else len(item.prompt.token_ids)
        return item.prompt.token_ids + item.token_ids, first

    def _prefix_places(
        self, written: Sequence[Written], rows: Sequence[tuple[list[int], int]], ends: Tensor
    ) -> Tensor:
        """(N, K+1) ends as positions in the rows that are read, which may lack the end token."""
        alone = self.config.reads_alone
        before = torch.tensor([0 if alone else len(item.prompt.token_ids) for item in written])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        return (ends.cpu() + before.unsqueeze(1)).minimum(lengths.unsqueeze(1))

    def pool(self, states: Tensor, mask: Tensor, ends: Tensor | None) -> Tensor:
        """Raw vectors (b, H), or (b, K+1, H) with the ends (b, K+1) of prefixes, from mixed states
        (b, T, H) and the mask (b, T) of what to pool."""
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
            vectors.append(self.pool(states, *spans(len(vectors))))

        return tap_layers(decoder_stack(model), self.config.layers, receive)

    def _read_strings(self, written: Sequence[Written]) -> Tensor:
        words = [item.rationale for item in written]
        if self.config.span == "bottleneck":
            return self._embed(words)
        texts = [item.prompt.text for item in written]
        if self.config.span == "context":
            return self._embed([f"{text}\n{said}" for text, said in zip(texts, words, strict=True)])
        there = torch.tensor([[bool(part.strip())] for part in texts + words], device=self.device)
        return torch.cat((self._embed(texts + words) * there).chunk(2), dim=1)

    def _embed(self, strings: Sequence[str]) -> Tensor:
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

    def parts_of(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Raw vectors (..., R) as those that each was read by itself, (..., H)."""
        return raw.chunk(self.config.parts, dim=-1)

    def mean(self, raw: Tensor) -> Tensor:
        """(R,) mean of raw vectors (N, R), each part over the rows in which it was read."""
        parts = self.parts_of(raw)
        if len(parts) == 1:
            return raw.mean(0)
        counts = [part.any(-1).sum().clamp(min=1) for part in parts]
        return torch.cat([part.sum(0) / n for part, n in zip(parts, counts, strict=True)])

    def update_centre(self, raw: Tensor) -> None:
        """Move the running mean towards that of a raw batch, (N, R); the first batch sets it."""
        if self.config.centre:
            mean = self.mean(raw)
            momentum = 0.0 if self.centre is None else CENTRE_MOMENTUM
            old = mean if self.centre is None else self.centre.to(mean.device)
            self.centre = momentum * old + (1 - momentum) * mean

    def finish(self, raw: Tensor, centre: Tensor | None = None) -> Tensor:
        """Unit vectors from raw ones, (..., R) -> (..., H): each part centred and L2-normalised,
        parts added up and normalised again.

        A reader without a centre only normalises.
        A raw vector of zero (nothing was read) stays zero: it is equally far from every text.

        Args:
            raw: (..., R).
            centre: (R,) in place of the reader's own, as `mean` gives it.
        """
        parts = self.parts_of(raw)
        centre = self.centre if centre is None else centre
        if self.config.centre and centre is not None:
            centres = self.parts_of(centre.to(raw.device))
        else:
            centres = (raw.new_zeros(()),) * len(parts)
        units = [
            normalize(part - centre, dim=-1) * part.any(-1, keepdim=True)
            for part, centre in zip(parts, centres, strict=True)
        ]
        if len(units) == 1:
            return units[0]
        text, words = units
        both = normalize(text + self.weight * words, dim=-1)
        return torch.where(words.any(-1, keepdim=True), both, text)

    def save(self, folder: Path) -> None:
        """Write centre and learned weight, if there are any, to `folder/reader/centre.safetensors`.

        Frozen weights go to `folder/reader/frozen`. Both have a folder of their own since vLLM
        takes every safetensors file beside a model's config for weights of the model.
        """
        kept = {} if self.centre is None else {"centre": self.centre.cpu()}
        if self.config.learn_weight:
            kept["weight"] = torch.tensor(self.weight)
        if kept:
            (folder / "reader").mkdir(exist_ok=True)
            with whole_file(folder / CENTRE_FILE) as unfinished:
                save_file(kept, str(unfinished))
        if self.config.weights == "frozen":
            frozen: Any = self._policy
            if hasattr(frozen, "merge_and_unload"):  # an adapter that had learned nothing yet
                frozen = copy.deepcopy(frozen).merge_and_unload()
            frozen.save_pretrained(folder / FROZEN_FOLDER)

    def load(self, folder: Path) -> None:
        """Read centre and learned weight back, if the folder has them."""
        if (folder / CENTRE_FILE).exists():
            kept = load_file(str(folder / CENTRE_FILE))
            if "centre" in kept:
                self.centre = kept["centre"].to(self.device)
            if self.config.learn_weight and "weight" in kept:
                self.weight = float(kept["weight"])


def _load_encoder(name: str, device: torch.device) -> Any:
    """A sentence-transformers model; its library is imported only where one is asked for."""
    from sentence_transformers import SentenceTransformer

    try:
        with outside_zero3():
            return SentenceTransformer(name, device=str(device))
    except (OSError, ValueError) as error:
        raise UserError(f"reader.weights: cannot load {name!r}: {first_line(error)}") from error
