"""What a run leaves behind as its policy."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
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
