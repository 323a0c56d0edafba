"""The generator: what is written depends on prompt, number and seed, and on nothing beside them."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor

from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.rollout.generator import (
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
    end_token_ids,
    prompt_seed,
    vllm_is_installed,
)
from grace_rl.rollout.policy import load_policy
from grace_rl.rollout.prompts import PromptTemplate


@pytest.fixture(scope="module")
def generator() -> TransformersGenerator:
    model, tokenizer = load_policy(str(scenes.COLD_START))
    ends = end_token_ids(model.generation_config, tokenizer)
    return TransformersGenerator(model, tokenizer.pad_token_id, ends)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    _, tokenizer = load_policy(str(scenes.COLD_START))
    template = PromptTemplate(tokenizer, None)
    texts = [row["query"] for row in scenes.rows("test", "triplet", 6)]
    return [template.render(text).token_ids for text in texts]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(12),
        Sampling(12, temperature=1.0, seed=3, samples=3),
        Sampling(12, temperature=1.5, top_p=0.8, seed=3, samples=2),
    ],
)
def test_batch_and_order_change_nothing(
    generator: TransformersGenerator, prompts: list[list[int]], how: Sampling
) -> None:
    together = generator.generate(prompts, how)
    assert [len(row) for row in together] == [how.samples] * len(prompts)
    assert generator.generate(prompts[::-1], how) == together[::-1]
    assert [generator.generate([prompt], how)[0] for prompt in prompts] == together


def test_samples_of_a_prompt_differ_and_follow_the_seed(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    how = Sampling(12, temperature=2.0, seed=1, samples=4)
    (four,) = generator.generate(prompts[:1], how)
    assert len({tuple(one.token_ids) for one in four}) > 1
    (first,) = generator.generate(prompts[:1], Sampling(12, temperature=2.0, seed=1))
    assert first[0] == four[0]  # more samples change none of those before
    assert len({prompt_seed(0, [1, 2]), prompt_seed(1, [1, 2]), prompt_seed(0, [1, 3])}) == 3


def test_an_end_is_kept_and_told(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    (whole,) = generator.generate(prompts[:1], Sampling(64))
    assert whole[0].ended and whole[0].token_ids[-1] in generator.end_ids
    third = whole[0].token_ids[2]
    (stopped,) = generator.generate(prompts[:1], Sampling(64, stop_ids=(third,)))
    assert stopped[0].ended and stopped[0].token_ids[-1] == third
    (cut,) = generator.generate(prompts[:1], Sampling(2))
    assert not cut[0].ended and cut[0].token_ids == whole[0].token_ids[:2]


class Only(LogitsProcessor):
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        changed = torch.full_like(scores, -torch.inf)
        for row, token in enumerate(self.tokens):
            changed[row, token] = 0
        return changed


def test_processors_see_the_rows_of_their_batch(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    tokens = [40 + i for i in range(len(prompts))]
    for how in (Sampling(3), Sampling(3, temperature=1.0, samples=2)):
        written = generator.generate(prompts, how, lambda rows: [Only([tokens[i] for i in rows])])
        for row, token in zip(written, tokens, strict=True):
            assert {tuple(one.token_ids) for one in row} == {(token, token, token)}


def test_threads_write_what_one_writes(
    generator: TransformersGenerator, prompts: list[list[int]]
) -> None:
    how = Sampling(12, temperature=1.0, seed=2)
    alone = generator.generate(prompts, how)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(generator.generate(prompts, how)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 4


@pytest.mark.skipif(vllm_is_installed(), reason="vLLM is there")
def test_vllm_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="vllm is not installed"):
        VLLMGenerator("model", [1])
