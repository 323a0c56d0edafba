"""Reading rollouts in training: while they are written, along with a forward that TRL makes anyway,
else in a pass of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grace_rl.embed.reader import Reader, Written
from grace_rl.rollout.prompts import Prompt
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.run.zero import is_split
from grace_rl.train.writing import SeenStates, group_writing


class RolloutReader:
    """A reader beside TRL's forwards over prompts and completions.

    Args:
        reader: What to read.
        policy: The unwrapped policy.
        render: The prompt of a text and its role.
        unwritten: Roles whose texts have no rationale.

    Attributes:
        shares_forwards: The reader sees prompt and rationale together with the policy's own
            weights, so what writes them, and TRL's forward over them, has the states that it needs.
        places: Which rollouts were written for, in order; some twice, to fill up.
    """

    def __init__(
        self,
        reader: Reader,
        policy: nn.Module,
        render: Callable[[str, str], Prompt],
        unwritten: frozenset[str] = frozenset(),
    ) -> None:
        self.reader = reader
        self.policy = policy
        self.render = render
        self.unwritten = unwritten
        self.shares_forwards = reader.config.in_context and reader.config.weights == "policy"
        self.places: list[int] = []
        self._seen: list[SeenStates | None] = []  # of each call of `generate` for this batch
        self._overheard: Tensor | None = None  # raw vectors of the trained ones

    @property
    def needs_a_forward(self) -> bool:
        """Whether no forward has shown yet what the rollouts under way are read from."""
        return self._overheard is None and (not self._seen or None in self._seen)

    @contextmanager
    def while_writing(self) -> Iterator[None]:
        """Within it, transformers' `generate` computes a group's prompt once, and in-context
        readers look on. Not under ZeRO-3, whose processes must make the same forwards."""
        if is_split(self.policy):
            yield
            return
        layers = self.reader.config.layers if self.shares_forwards else None
        with group_writing(self.policy, layers, self._seen):
            yield

    def written(self, rollouts: Rollouts) -> list[Written]:
        """The rows of a table as a reader takes them."""
        items = []
        for i, role in enumerate(rollouts.roles):
            prompt = self.render(rollouts.texts[i], role)
            if role in self.unwritten:
                items.append(self.reader.plain(prompt))
            else:
                items.append(Written(prompt, rollouts.token_ids[i], rollouts.rationales[i]))
        return items

    @contextmanager
    def overhearing(
        self, rollouts: Rollouts, input_ids: Tensor, logits_to_keep: int, chunk: int | None
    ) -> Iterator[None]:
        """Within it, TRL's forward over the trained rollouts reads them for `read`."""
        own = rollouts.trained_rows
        with self.during_forward(
            self.written(own), input_ids, logits_to_keep, own.prefix_ends, chunk
        ) as vectors:
            yield
        self._overheard = torch.cat(vectors)

    def read(self, rollouts: Rollouts) -> Rollouts:
        """The table with raw vectors, neither centred nor normalised, in its vector columns.

        Those that a forward has shown are taken from there, the others read in one of our own.
        """
        written, ends = self.written(rollouts), rollouts.prefix_ends
        if ends is not None and self.unwritten:  # whatever is read of them is read whole
            lengths = torch.tensor([len(item.token_ids) for item in written])
            anchors = ~rollouts.trained[:, None]
            ends = torch.where(anchors, lengths.to(ends.device)[:, None], ends)
        raw, places = self._shown(written, ends)
        if rest := sorted(set(range(len(written))).difference(places)):
            prefixes = None if ends is None else ends[rest]
            more = self.reader.read([written[i] for i in rest], prefixes)
            raw = more if raw is None else torch.cat([raw, more])
        if raw is None:
            raise RuntimeError("there is nothing to read")
        raw = raw[torch.tensor(places + rest, device=raw.device).argsort()]
        if ends is None:
            return dataclasses.replace(rollouts, embeddings=raw)
        return dataclasses.replace(rollouts, embeddings=raw[:, -1], prefix_embeddings=raw)

    def _shown(
        self, written: Sequence[Written], ends: Tensor | None
    ) -> tuple[Tensor | None, list[int]]:
        """Raw vectors that a forward has shown, and whose they are."""
        overheard, self._overheard = self._overheard, None
        calls, self._seen = self._seen, []
        if overheard is not None:
            return overheard, list(range(len(overheard)))
        seen = [part for part in calls if part is not None]
        if not seen or len(seen) < len(calls):
            return None, []
        prefixes = None if ends is None else ends[self.places]
        raw = self._read_seen(seen, [written[i] for i in self.places], prefixes)
        places = list(dict.fromkeys(self.places))  # fillers come last
        return raw[: len(places)], places

    def _read_seen(
        self, seen: Sequence[SeenStates], written: Sequence[Written], ends: Tensor | None
    ) -> Tensor:
        """Raw vectors of what was written, in the order in which it was asked for."""
        spans = [
            (len(item.prompt.token_ids), self.reader.tokens_to_read(item)[1], len(item.token_ids))
            for item in written
        ]
        vectors, start = [], 0
        for part in seen:
            rows = slice(start, start := start + len(part.prompt_of))
            places = None if ends is None else ends[rows]
            vectors.append(part.pooled(self.reader.pool, spans[rows], places))
        return torch.cat(vectors)

    def read_for_loss(
        self,
        written: Sequence[Written],
        inputs: dict[str, Any],
        loss: Callable[[], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Any, Tensor]:
        """The policy's loss, and (b, H) raw vectors with a gradient.

        An in-context reader takes the hidden states from the forward that TRL makes for the loss;
        the bottleneck needs one more, over the rationales alone.
        """
        if not self.shares_forwards:
            value = loss()
            with autocast():
                return value, self.reader.read(written, gradient=True)
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        with self.during_forward(written, tokens, inputs["completion_ids"].size(1)) as vectors:
            value = loss()
        return value, torch.cat(vectors)

    @contextmanager
    def during_forward(
        self,
        written: Sequence[Written],
        input_ids: Tensor,
        logits_to_keep: int,
        ends: Tensor | None = None,
        chunk: int | None = None,
    ) -> Iterator[list[Tensor]]:
        """Within it, TRL's forward over these rows also yields their raw vectors.

        Args:
            written: B rollouts; only their prompts and token ids are looked at.
            input_ids: (B, T). Prompts, padded left, end where the last `logits_to_keep` tokens
                begin; completions, padded right, start there.
            logits_to_keep: Longest completion.
            ends: (B, K+1) ends of prefixes, in tokens of the completion.
            chunk: Rows of each of its passes over the decoder stack; all by default.

        Yields:
            One tensor per pass, (b, H), or (b, K+1, H) with ends.
        """
        seam = input_ids.size(1) - logits_to_keep
        mask = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        for i, item in enumerate(written):
            _, first = self.reader.tokens_to_read(item)
            mask[i, seam - len(item.prompt.token_ids) + first : seam + len(item.token_ids)] = True
        places = None if ends is None else seam + ends.to(input_ids.device)
        size = chunk or len(mask)

        def span(number: int) -> tuple[Tensor, Tensor | None]:
            rows = slice(number * size, (number + 1) * size)
            return mask[rows], None if places is None else places[rows]

        vectors: list[Tensor] = []
        with self.reader.tap(self.policy, span, vectors):
            yield vectors
