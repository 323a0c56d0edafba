"""Texts that are not written for, prompts of roles, and a weight that is learned, in real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

ROLES = {
    "query": {"samples": 2, "instruction": {"user": "Q: {text}"}},
    "positive": {"write": False},
    "negative": {"train": False},
}


@pytest.mark.parametrize("span", ["joint", "bottleneck"])
@pytest.mark.parametrize("reward", ["contrastive", "stepwise"])
def test_a_role_without_rationales_is_read_as_it_is(
    tiny_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: str, reward: str
) -> None:
    seen: list[Any] = []
    score = GraceGRPOTrainer.score

    def watched(self: Any, rollouts: Any) -> Any:
        seen.append((rollouts, self.encoder(), self.reader.weight))
        return score(self, rollouts)

    monkeypatch.setattr(GraceGRPOTrainer, "score", watched)
    joint = {"learn_weight": True} if span == "joint" else {}
    trainer = tiny_trainer(
        GraceGRPOTrainer,
        GraceGRPOConfig,
        tmp_path,
        rewards=[reward],
        roles=ROLES,
        reader={"span": span, **joint},
        reader_loss={"weight": 0.1},
        max_steps=1,
        segment_min_tokens=1,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    ((rollouts, encoder, weight),) = seen
    silent = [i for i, role in enumerate(rollouts.roles) if role == "positive"]
    spoken = [i for i, role in enumerate(rollouts.roles) if role != "positive"]
    assert len(silent) == 4 and not any(rollouts.token_ids[i] for i in silent)
    assert all(rollouts.token_ids[i] for i in spoken)
    assert not rollouts.truncated[silent].any()
    for prompt, role in zip(rollouts.prompts, rollouts.roles, strict=True):
        assert ("Q: " in prompt) == (role == "query")

    for old, new in zip(before, trainer.model.parameters(), strict=True):
        new.data.copy_(old)  # as when the rollouts were read
    encoder.reader.weight = weight
    texts = [rollouts.texts[i] for i in silent]
    alone = encoder.encode(texts, role="document")
    torch.testing.assert_close(alone.vectors, rollouts.embeddings[silent], atol=1e-4, rtol=0)
    if span == "joint":
        assert trainer.reader.weight in (pytest.approx(1 / 1.05), 1.0, pytest.approx(1.05))
        assert alone.rationales == [""] * len(texts)
