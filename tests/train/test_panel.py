"""The panel: the same texts at every logged step, without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerControl, TrainerState

from grace_rl.data import scenes
from grace_rl.data.bundles import Bundles, Role
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.settings import EncoderSettings
from grace_rl.inspect import Run
from grace_rl.run.directory import RunDirectory
from grace_rl.run.records import cut_rollouts
from grace_rl.train import panel


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = EncoderSettings(instruction=None, max_rationale_tokens=8)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    monkeypatch.setattr(panel, "whole_policy", lambda trainer: torch.no_grad())
    roles = [Role("query", 8, True), Role("positive", 8, True), Role("negative", 1, False)]
    trainer = SimpleNamespace(
        encoder=lambda: encoder,
        rollout_reader=SimpleNamespace(
            render=lambda text, role: encoder.template.render(text),
            unwritten=frozenset({"negative"}),
        ),
        args=SimpleNamespace(panel_texts=48, generation_batch_size=8),
        bundles={"train": Bundles(scenes.rows(count=5), roles)},
    )
    (tmp_path / "status.json").write_text('{"grace_rl": "0", "status": "running"}')
    return panel.panel_of(trainer, RunDirectory(tmp_path))


def test_the_same_texts_at_each_step(writer: Any, tmp_path: Path) -> None:
    state, random = TrainerState(), torch.get_rng_state()
    writer.on_train_begin(None, state, TrainerControl())
    logs: dict[str, Any] = {}
    state.global_step = 5
    writer.on_log(None, state, TrainerControl(), logs=logs)
    writer.on_log(None, state, TrainerControl(), logs={"train_runtime": 1.0})
    assert logs["time/panel"] > 0 and torch.equal(torch.get_rng_state(), random)
    assert writer.trainer.encoder().reader.centre is None
    run = Run(tmp_path)
    assert run.panel_steps() == [0, 5]
    found = run.panel([5])
    assert len(found) == 6  # two rows whole: no more texts than a step has rollouts
    assert list(found["role"]) == ["query", "positive", "negative"] * 2
    assert (found["rationale"] == "").tolist() == [False, False, True] * 2
    assert (run.panel([0])["rationale"] == found["rationale"]).all()
    cut_rollouts(tmp_path, 0)
    assert run.panel_steps() == [0]


def test_a_recipe_can_do_without(writer: Any, tmp_path: Path) -> None:
    trainer = writer.trainer
    trainer.args.panel_texts = 0
    assert panel.panel_of(trainer, RunDirectory(tmp_path)) is None
