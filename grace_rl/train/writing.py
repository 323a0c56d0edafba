"""transformers' `generate` for groups of rollouts: each prompt is computed once, and all is seen.

TRL hands `generate` every prompt as often as it is sampled. Here a prompt's keys and values are
computed once and copied to its samples. Beside that a reader may look on: the states of prompts
pass by in that first forward, those of each token when the next one is drawn, and one more step
shows those of the last. An in-context reader then needs no forward of its own.

The states are those of TRL's forward over prompt and completion to within rounding
(tests/train/test_writing.py), and cost a fraction of the memory of keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grace_rl.embed.hidden_states import decoder_stack, tap_layers

ROWS_AT_ONCE = 64  # of a pooling


@dataclass
class SeenStates:
    """Mixed states (`grace_rl.embed.hidden_states.mix_layers`) of B rollouts, as they were written.

    Attributes:
        prompt_of: (B,) which of the U distinct prompts a rollout continues.
        prompts: (U, P-1, H), padded left: all tokens of the prompts but their last.
        written: (B, 1+N, H): the prompt's last token, and N written ones, padded right.
    """

    prompt_of: Tensor
    prompts: Tensor
    written: Tensor

    def pooled(
        self,
        pool: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        spans: Sequence[tuple[int, int, int]],
        ends: Tensor | None = None,
    ) -> Tensor:
        """Raw vectors.

        Args:
            pool: States (b, T, H), mask (b, T) and ends (b, K+1) -> vectors.
            spans: Of each rollout: tokens of the prompt, first token to pool (both counted from the
                prompt's first), and tokens written.
            ends: (B, K+1) ends of prefixes, in tokens written.

        Returns:
            (B, H), or (B, K+1, H) with ends.
        """
        width, device = self.prompts.size(1) + 1, self.written.device
        mask = torch.zeros(len(spans), width + self.written.size(1) - 1, dtype=torch.bool)
        for i, (prompt, first, count) in enumerate(spans):
            mask[i, width - prompt + first : width + count] = True
        cut = width - 1 if not mask[:, : width - 1].any() else 0  # prompts are not pooled
        mask, vectors = mask[:, cut:].to(device), []
        places = None if ends is None else ends.to(device) + width - cut
        for start in range(0, len(spans), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            states = self.written[rows]
            if not cut:
                states = torch.cat([self.prompts[self.prompt_of[rows]], states], dim=1)
            vectors.append(pool(states, mask[rows], None if places is None else places[rows]))
        return torch.cat(vectors)


@contextmanager
def group_writing(
    policy: Any, layers: Sequence[int] | None, seen: list[SeenStates | None]
) -> Iterator[None]:
    """Within it `policy.generate` computes each distinct prompt once, where that can be done.

    Args:
        policy: The unwrapped policy.
        layers: What a reader wants to see, as `tap_layers` takes them; None: nothing.
        seen: Receives the states of each call of `generate`; None where they could not be seen.
    """
    usual, own = policy.generate, vars(policy).get("generate")

    def generate(input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Tensor:
        cache = _empty_cache(policy, rest["generation_config"])
        if rest.keys() != {"generation_config"} or cache is None or input_ids.size(1) < 2:
            seen.append(None)
            written: Tensor = usual(input_ids=input_ids, attention_mask=attention_mask, **rest)
            return written
        states: list[Tensor] = []
        write = _Writing(policy, usual, cache, rest["generation_config"])
        if layers is None:
            seen.append(None)
            return write(input_ids, attention_mask)[0]
        with tap_layers(decoder_stack(policy), layers, states.append):
            written, prompt_of = write(input_ids, attention_mask)
            rows = write.last_token(written, attention_mask)
        count = written.size(1) - input_ids.size(1)
        last = states[1].new_zeros(states[1].shape)
        last[rows] = states[-1] if len(rows) else last[rows]
        seen.append(SeenStates(prompt_of, states[0], torch.cat([*states[1 : 1 + count], last], 1)))
        return written

    policy.generate = generate
    try:
        yield
    finally:
        del policy.generate
        if own is not None:  # somebody else had put theirs before the class's
            policy.generate = own


def _empty_cache(policy: Any, config: Any) -> DynamicCache | None:
    """For keys and values that can be copied to samples; None where the model has others."""
    plain = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
    if not plain or config.cache_implementation is not None or config.use_cache is False:
        return None
    cache = DynamicCache(config=policy.config)
    usual = (DynamicLayer, DynamicSlidingWindowLayer)
    return cache if all(type(layer) in usual for layer in cache.layers) else None


@dataclass
class _Writing:
    """One call of `generate`."""

    policy: Any
    usual: Callable[..., Tensor]
    cache: DynamicCache
    config: Any

    def __call__(self, ids: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P) prompts, padded left -> (B, P+N) with what is written; and (B,) which of the
        distinct prompts each is."""
        both = torch.stack([ids, attention.to(ids)], dim=1)
        distinct, prompt_of = both.unique(dim=0, return_inverse=True)
        self._forward(distinct[:, 0, :-1], distinct[:, 1, :-1])
        self.cache.batch_select_indices(prompt_of)
        written = self.usual(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=self.cache,
            generation_config=self.config,
        )
        return written, prompt_of

    def last_token(self, written: Tensor, attention: Tensor) -> Tensor:
        """One more step, for the token that `generate` drew last and did not look at; returns the
        rows that have one."""
        ends = self.config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []))
        before = torch.isin(written[:, attention.size(1) : -1], ends.to(written))
        rows = (~before.any(dim=1)).nonzero()[:, 0]
        if len(rows):
            if len(rows) < len(written):
                self.cache.batch_select_indices(rows)
            more = attention.new_ones(len(rows), written.size(1) - attention.size(1))
            self._forward(written[rows, -1:], torch.cat([attention[rows], more], dim=1))
        return rows

    @torch.no_grad()
    def _forward(self, ids: Tensor, attention: Tensor) -> None:
        """Through the policy as `generate` goes, mixed precision included."""
        base = (
            self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy
        )
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
        more = {"position_ids": positions, "logits_to_keep": 1}
        known = inspect.signature(base.forward).parameters
        self.policy(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in known},
        )
