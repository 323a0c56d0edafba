"""The head computes what counts and no more, with the values and gradients of TRL's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from grace_rl.data import scenes
from grace_rl.train.head import spare_head

OUTPUTS = ("log_probs", "entropy")


def models(adapter: bool) -> tuple[Any, Any]:
    """The same policy with TRL's head, and with it spared."""
    policy = AutoModelForCausalLM.from_pretrained(scenes.COLD_START, dtype=torch.float32)
    pair = [policy, copy.deepcopy(policy)]
    for i, model in enumerate(pair):
        add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
        if adapter:
            torch.manual_seed(0)
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
            pair[i] = get_peft_model(model, config)
    spare_head(pair[1])
    return pair[0], pair[1]


def batch() -> dict[str, Tensor]:
    """Four rows of 11 tokens: prompts padded on the left, the last 5 are scored, some are not."""
    torch.manual_seed(1)
    ids = torch.randint(5, 90, (4, 11))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("adapter", [False, True])
def test_values_and_gradients_are_those_of_trls_head(
    adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = utils._ChunkedLogProbFunction

    def apply(states: Tensor, *rest: Any) -> Any:
        rows.append(len(states))
        return real.apply(states, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
    given = batch()
    found = []
    for model in models(adapter):
        output = model(**given, fused_lm_head=True)
        (output.log_probs.exp().sum() + output.entropy.sum()).backward()
        gradient = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(({n: getattr(output, n) for n in (*OUTPUTS, "loss", "label_mask")}, gradient))
    (plain, gradient), (spared, other) = found
    assert rows == [4 * 10, 4 * 5 - 2]
    for name, value in plain.items():
        torch.testing.assert_close(spared[name], value)
    assert len(gradient) == len(other) > 0
    for one, two in zip(gradient, other, strict=True):
        torch.testing.assert_close(two, one)


def test_rows_without_anything_to_score_are_zero() -> None:
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    for model in models(False):
        output = model(**given, fused_lm_head=True)
        assert not output.log_probs.any() and output.log_probs.shape == (4, 10)


def test_what_is_generated_stays_the_same() -> None:
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    plain, spared = (
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for model in models(False)
    )
    assert torch.equal(plain, spared)
