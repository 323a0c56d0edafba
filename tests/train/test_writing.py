"""Reading while writing, against the plain way: `generate` of transformers, then a forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from grace_rl.data import scenes
from grace_rl.embed.hidden_states import decoder_stack, tap_layers
from grace_rl.rollout.policy import load_policy
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.writing import SeenStates, group_writing

PAD, END = 0, 1


@pytest.fixture(scope="module")
def cold_start() -> Any:
    """A policy that ends some of its rationales."""
    return load_policy(str(scenes.COLD_START))[0].train()


@pytest.fixture(scope="module")
def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different length, four times each, padded left; and their mask."""
    lengths = [3, 9, 6]
    ids = torch.randint(10, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    ids, mask = ids.where(mask, PAD), mask.long()
    return ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)


def write(policy: Any, prompts: tuple[Tensor, Tensor], tokens: int, **config: Any) -> Tensor:
    how = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, eos_token_id=END, pad_token_id=PAD, **config
    )
    torch.manual_seed(3)
    with torch.no_grad():
        ids: Tensor = policy.generate(
            input_ids=prompts[0], attention_mask=prompts[1], generation_config=how
        )
    return ids


@pytest.mark.parametrize(("tokens", "lora"), [(12, False), (1, False), (400, True)])
def test_states_and_tokens_are_those_of_the_plain_way(
    cold_start: Any, prompts: tuple[Tensor, Tensor], tokens: int, lora: bool
) -> None:
    """All end, one may be cut off, one token is enough; an adapter changes nothing."""
    policy = get_peft_model(cold_start, LoraConfig(r=2)) if lora else cold_start
    usual = write(policy, prompts, tokens)
    seen: list[SeenStates | None] = []
    with group_writing(policy, (0, -1), seen):
        written = write(policy, prompts, tokens)
    assert torch.equal(written, usual)
    assert "generate" not in vars(policy)
    (part,) = seen
    assert part is not None
    states = torch.cat([part.prompts[part.prompt_of], part.written], dim=1)
    after = torch.ones_like(written[:, prompts[0].size(1) :])
    plain: list[Tensor] = []
    with torch.no_grad(), tap_layers(decoder_stack(policy), (0, -1), plain.append):
        policy(input_ids=written, attention_mask=torch.cat([prompts[1], after], dim=1))
    ended = (written == END).cumsum(1) - (written == END).long()
    real = torch.cat([prompts[1], after], dim=1).bool() & (ended == 0)
    assert states.shape == plain[0].shape
    assert float((states - plain[0]).abs().amax(-1)[real].max()) < 1e-4
    if lora:
        policy.unload()


def test_other_ways_to_write_are_left_alone(
    cold_start: Any, prompts: tuple[Tensor, Tensor]
) -> None:
    for config in ({"cache_implementation": "static"}, {"use_cache": False}):
        seen: list[SeenStates | None] = []
        with group_writing(cold_start, (-1,), seen):
            written = write(cold_start, prompts, 4, **config)
        assert seen == [None]
        assert torch.equal(written, write(cold_start, prompts, 4, **config))


@pytest.mark.parametrize("span", ["context", "rationale", "bottleneck"])
def test_what_goes_through_the_policy_in_a_step(
    tiny_trainer: Any, tmp_path: Path, span: str
) -> None:
    """The speed that does not depend on the machine: tokens through the decoder stack. A prompt is
    computed once, in-context readers and their loss add nothing, the bottleneck one pass."""
    tokens, samples = 6, 4
    settings = {"generation_kwargs": {"min_new_tokens": tokens}, "max_completion_length": tokens}
    trainer = tiny_trainer(
        GraceGRPOTrainer,
        GraceGRPOConfig,
        tmp_path,
        rows=scenes.rows("train", "triplet", 4),
        roles={"query": {}, "positive": {}, "negative": {"train": False}},
        max_steps=1,
        num_generations=samples,
        reader={"span": span},
        reader_loss={} if span == "rationale" else None,
        **settings,
    )
    shapes: list[tuple[int, int]] = []
    read, compared = trainer.rollout_reader.read, []

    def compare(rollouts: Any) -> Any:
        table = read(rollouts)
        count = len(shapes)
        own = trainer.reader.read(trainer.rollout_reader.written(rollouts))
        compared.append(float((table.embeddings - own).abs().max()))
        del shapes[count:]
        return table

    def count(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    decoder_stack(trainer.model).register_forward_pre_hook(count, with_kwargs=True)
    trainer.rollout_reader.read = compare
    trainer.train()
    trained, anchors = 8, 1
    rows, width = trained + anchors, shapes[-1][1] - tokens
    last = span != "bottleneck"  # one step more, for the state of the last token
    writing = [(3, shapes[0][1])] + [(rows, 1)] * (tokens + last)
    reading = [(rows, tokens)] if span == "bottleneck" else []
    assert shapes[0][1] >= width - 1  # an anchor's prompt may be the longest
    assert shapes == writing + reading + [(trained, width + tokens)]
    assert compared and max(compared) < 1e-4
