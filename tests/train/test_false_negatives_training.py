"""The mask in real GRPO runs, on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Rows 0 and 2, 1 and 3, ... are the same scene in other words; the guide knows.
SCRIPT = """
import os, random, sys
from pathlib import Path
from accelerate import PartialState
processes = int(os.environ.get("WORLD_SIZE", "1"))
if processes > 1:
    PartialState(cpu=True, backend="gloo")
from grace_rl.data import scenes
from grace_rl.data.scenes.texts import paraphrase, render, with_facts
from grace_rl.data.scenes.world import VALUES, change_facts, random_scene
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

rng, rows = random.Random(0), []
for number in range(6):
    scene = random_scene("train", rng)
    for _ in range(2):
        query = render(scene, rng)
        negative = with_facts(query, change_facts(scene, 1, rng), rng)
        rows.append({"query": query.text, "positive": paraphrase(query, rng).text,
                     "negative": [negative.text]})
folder = Path(sys.argv[1])
args = GraceGRPOConfig(
    output_dir=str(folder), num_generations=2, per_device_train_batch_size=48 // processes,
    max_completion_length=8, max_steps=2, instruction=None, use_cpu=True, bf16=False,
    gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none",
    print_rollouts_steps=0, disable_tqdm=True,
    roles={"query": {}, "positive": {}, "negative": {"train": False}},
    false_negatives=None if sys.argv[2] == "off" else
    {"guide": sys.argv[2], "sigma": 0.95, "own_negatives": False},
)
trainer = GraceGRPOTrainer(str(scenes.COLD_START), args, rows, ["contrastive", "hard_negative"],
                           run_folder=folder)
trainer.train()
if PartialState().is_main_process:
    for log in trainer.state.log_history[:2]:
        print("SHARE", log.get("false_negatives/masked_share"))
"""
FACTS = """
def encode(texts):
    from grace_rl.data.scenes import VALUES, read_facts
    facts = [(a, v) for a in VALUES for v in VALUES[a]]
    return [[float(f in read_facts(text).facts) for f in facts] for text in texts]
"""


def shares(tmp_path: Path, processes: int, guide: str) -> list[str]:
    (tmp_path / "run.py").write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(tmp_path / "run.py"), str(tmp_path / f"out{processes}"), guide]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SHARE")]


@pytest.mark.slow
def test_one_and_two_processes_mask_the_same(tmp_path):
    (tmp_path / "facts.py").write_text(FACTS)
    guide = f"{tmp_path}/facts.py:encode"
    alone = shares(tmp_path, 1, guide)
    # All 12 rows are in the batch. A text's candidates are its row's negative (one anchor) and the
    # 5 rollouts of each of 11 rows; its scene's other row gives 4 rollouts that are masked.
    assert [float(share) for share in alone] == pytest.approx([4 / 56] * 2)
    together = shares(tmp_path, 2, guide)
    assert [float(s) for s in together] == pytest.approx([float(s) for s in alone], abs=1e-6)
    assert (tmp_path / "out2/guide/vectors.npy").exists()
    assert shares(tmp_path, 1, "off") == ["None", "None"]
