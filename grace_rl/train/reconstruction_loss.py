"""One forward of the reconstruction stage: read both sides, rebuild each from the other's vector.

The trainer calls the wrapped model once a step with `pairs=`, so that DDP and ZeRO see one forward
and synchronise all of it. Without `pairs` the model is what it was: it writes, saves and merges.

What differs from the published code: targets are the content tokens and one end token, right
padded, so that padding changes nothing and every token learns from the vector; the mean is over a
row's tokens and then over rows, so that long texts do not outweigh short ones.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grace_rl.embed.hidden_states import pool_states, tap_layers
from grace_rl.embed.reader import Reader, Written
from grace_rl.embed.rebuild import rebuild_logps, right_padded, row_means, token_logps
from grace_rl.rollout.generator import end_token
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train.reconstruction_config import ReconstructionConfig

Example = tuple[list[int], int]
"""Token ids, and the first of them that the model must learn to write."""


def read_vectors(
    stack: nn.Module,
    ids: Tensor,
    attention: Tensor,
    pooled: Tensor,
    layers: Sequence[int],
    pool: str,
) -> Tensor:
    """The raw vectors that a `Reader` reads, (N, H) float32, with gradients."""
    states: list[Tensor] = []
    with tap_layers(stack, layers, states.append):
        stack(input_ids=ids, attention_mask=attention, use_cache=False)
    return pool_states(states[0], pooled, pool)


def add_reconstruction(policy: nn.Module, objective: ReconstructionConfig) -> None:
    """Let a policy's forward take `pairs=` and `probe=` and return the losses.

    Args:
        policy: A causal language model, or a PEFT model around one.
        objective: Its `alpha` and `writing_share` weigh the parts; `reader` says what is read.
    """
    owner: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    original = owner.forward

    def forward(
        self: Any, *args: Any, pairs: Any = None, probe: bool = False, **keywords: Any
    ) -> Any:
        if pairs is None:
            return original(*args, **keywords)
        return reconstruct(self, pairs, objective, probe)

    owner.forward = types.MethodType(forward, owner)


def reconstruct(
    model: Any,
    pairs: Mapping[str, Tensor],
    objective: ReconstructionConfig,
    probe: bool = False,
) -> dict[str, Tensor]:
    """The losses of one batch.

    Args:
        model: The causal language model, without PEFT around it.
        pairs: From `PairCollator`; the first half of the rows reads queries and rebuilds positives,
            the second half the other way round.
        objective: See `add_reconstruction`.
        probe: Also rebuild every text from another row's vector.

    Returns:
        Scalars `loss`, `loss_q2d`, `loss_d2q`, `loss_writing` where something is written,
        `gain_q2d`, `gain_d2q` and their mean `information_gain` with `probe` (nats per token), and
        `centre`, the (H,) mean vector.
    """
    vectors = read_vectors(
        model.get_decoder(),
        pairs["read_ids"],
        pairs["read_attention"],
        pairs["read_pooled"].bool(),
        objective.reader.layers,
        objective.reader.pool,
    )
    ids, mask = pairs["target_ids"], pairs["target_mask"]

    def directions(given: Tensor) -> tuple[Tensor, Tensor]:
        nll = -row_means(rebuild_logps(model, given, ids, mask), mask)
        q2d, d2q = nll.chunk(2)
        return q2d.mean(), d2q.mean()

    q2d, d2q = directions(vectors)
    loss = objective.alpha * q2d + (1 - objective.alpha) * d2q
    found = {"loss_q2d": q2d, "loss_d2q": d2q}
    if "write_ids" in pairs:
        writing = _writing_nll(model, pairs).mean()
        loss = (1 - objective.writing_share) * loss + objective.writing_share * writing
        found["loss_writing"] = writing
    if probe:
        with torch.no_grad():
            others = torch.cat([half.roll(1, 0) for half in vectors.chunk(2)])
            shuffled_q2d, shuffled_d2q = directions(others)
        gains = {"gain_q2d": shuffled_q2d - q2d, "gain_d2q": shuffled_d2q - d2q}
        found |= gains | {"information_gain": torch.stack(list(gains.values())).mean()}
    found |= {"centre": vectors.mean(0)}
    return {"loss": loss} | {name: value.detach() for name, value in found.items()}


def _writing_nll(model: Any, pairs: Mapping[str, Tensor]) -> Tensor:
    ids, mask = pairs["write_ids"], pairs["write_mask"]
    states = model.get_decoder()(
        input_ids=ids, attention_mask=pairs["write_attention"], use_cache=False
    ).last_hidden_state
    mask = mask[:, 1:]
    return -row_means(token_logps(model, states[:, :-1], ids[:, 1:], mask), mask)


class PairCollator:
    """Rows of `query` and `positive`, each with what is to be written beside it, as tensors.

    Args:
        template: Renders and cuts texts.
        reader: Says which tokens of a text are read.
        writing_share: Every so many-th row brings its `writing` example.

    Raises:
        UserError: The tokenizer has no end token.
    """

    def __init__(self, template: PromptTemplate, reader: Reader, writing_share: float) -> None:
        self.template = template
        self.reader = reader
        self.end = end_token(template.tokenizer)
        self.padding = int(template.tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.stride = round(1 / writing_share) if writing_share else None

    def written(self, text: str) -> Written:
        """A text in the rationale's place; in a prompt, an empty rationale that has ended."""
        prompt = self.template.render(text)
        alone = self.reader.config.reads_alone
        ids = prompt.token_ids[slice(*prompt.span)] if alone else [self.end]
        return Written(prompt, ids, prompt.text if alone else "")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        queries = [self.written(row["query"]) for row in rows]
        positives = [self.written(row["positive"]) for row in rows]
        read = [self.reader.tokens_to_read(item) for item in queries + positives]
        read_ids, attention = right_padded([ids for ids, _ in read], self.padding)
        first = torch.tensor([start for _, start in read])[:, None]
        targets = [
            [*item.prompt.token_ids[slice(*item.prompt.span)], self.end]
            for item in positives + queries
        ]
        target_ids, target_mask = right_padded(targets, self.padding)
        batch = {
            "read_ids": read_ids,
            "read_attention": attention,
            "read_pooled": attention * (torch.arange(read_ids.size(1)) >= first),
            "target_ids": target_ids,
            "target_mask": target_mask,
        }
        writing = [] if self.stride is None else [row["writing"] for row in rows[:: self.stride]]
        return batch | (self._to_write(writing) if writing else {})

    def _to_write(self, examples: Sequence[tuple[str | None, str]]) -> dict[str, Tensor]:
        rows = [self._example(*example) for example in examples]
        ids, attention = right_padded([row for row, _ in rows], self.padding)
        first = torch.tensor([start for _, start in rows])[:, None]
        mask = attention * (torch.arange(ids.size(1)) >= first)
        return {"write_ids": ids, "write_attention": attention, "write_mask": mask}

    def _example(self, text: str | None, written: str) -> Example:
        """(text, rationale) as the cold start sees it; (None, text) as plain text."""
        if text is None:
            prompt = self.template.render(written)
            return [*prompt.token_ids[slice(*prompt.span)], self.end], 1
        prompt_ids = self.template.render(text).token_ids
        tokenizer = self.template.tokenizer
        rationale = tokenizer(written, add_special_tokens=False)["input_ids"]
        return [*prompt_ids, *rationale[: self.template.max_text_tokens], self.end], len(prompt_ids)
