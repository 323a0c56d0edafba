"""What a run leaves behind, also when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from grace_rl.cli import main
from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.run.checkpoints import is_complete
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.run import save_policy


def test_an_adapter_is_merged_into_the_saved_policy(tmp_path: Path) -> None:
    args = GraceGRPOConfig(
        output_dir=str(tmp_path / "checkpoints"),
        num_generations=2,
        per_device_train_batch_size=8,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-2,
        instruction=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        print_rollouts_steps=0,
        disable_tqdm=True,
    )
    rows = scenes.rows("train", "triplet", 8)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = GraceGRPOTrainer(
        str(scenes.COLD_START), args, rows, ["contrastive"], peft_config=lora
    )
    trainer.train()
    ids = torch.tensor([trainer.prompt_template.render(rows[0]["query"]).token_ids])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
    folder = tmp_path / "model"
    save_policy(trainer, folder)

    assert not list(folder.glob("adapter_*")) and not list(folder.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(scenes.COLD_START).eval()
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-3)
    assert RationaleEncoder.from_pretrained(folder).encode([rows[0]["query"]]).rationales[0]


def test_a_reward_that_fails_late_costs_no_finished_step(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "def late(batch):\n    if batch.step >= 3:\n        raise RuntimeError('no more money')\n"
    )
    code += "    return [float(len(ids)) for ids in batch.token_ids]\n"
    (tmp_path / "late.py").write_text(code)
    recipe = (root / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "late.yaml").write_text(recipe.replace("name: length", "name: late.py:late"))
    settings = "--dataset_rows 8 --per_device_train_batch_size 16 --max_steps 4 --evaluation null"
    command = [
        "train",
        str(tmp_path / "late.yaml"),
        *settings.split(),
        "--print_rollouts_steps",
        "0",
    ]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "a checkpoint of step 2 is saved" and "no more money" in lines[-2]
    assert is_complete(tmp_path / "run" / "checkpoints" / "checkpoint-2")
