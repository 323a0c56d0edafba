"""What a run leaves behind, also when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from grace_rl.cli import main
from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.run.checkpoints import is_complete, last_complete_checkpoint
from grace_rl.run.records import read_metrics
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


SMALL = """\
method: grpo
model_name_or_path: scenes
dataset_name: rows.jsonl
instruction: null
rewards: [{name: length}, {name: "mine.py:mine", weight: 0}]
num_generations: 2
per_device_train_batch_size: 4
max_completion_length: 8
max_steps: 4
bf16: false
gradient_checkpointing: false
use_cpu: true
logging_steps: 1
save_steps: 1
print_rollouts_steps: 1
report_to: none
output_dir: run
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of four steps; its second reward does what `mine.py` says."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({k: row[k] for k in ("query", "positive", "negative")}) + "\n"
            for row in scenes.rows("train", "triplet", 8)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "mine.py").write_text("def mine(batch):\n    return [0.0] * len(batch)\n")
    return tmp_path


def test_a_run_goes_on_with_the_rows_and_weights_it_began_with_or_not_at_all(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = small / "policy"
    shutil.copytree(scenes.COLD_START, policy)
    (small / "mine.py").write_text(
        "import os, signal\n"
        "def mine(batch):\n"
        "    if batch.step == 2 and not os.path.exists('stopped'):\n"
        "        open('stopped', 'w').close(); os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [0.0] * len(batch)\n"
    )
    command = ["train", "small.yaml", "--model_name_or_path", "policy"]
    assert main(command) == 130
    lines = (small / "rows.jsonl").read_text().splitlines(True)
    config = (policy / "generation_config.json").read_text()

    (small / "rows.jsonl").write_text("".join(lines[::-1]))
    (policy / "generation_config.json").write_text(config + " ")
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()[1:]
    assert [line.split(":")[0] for line in told] == ["model_name_or_path", "dataset_name"]

    (small / "rows.jsonl").write_text("".join(lines))
    (policy / "generation_config.json").write_text(config)
    assert main(command) == 0
    assert [line["step"] for line in read_metrics(small / "run")] == [1, 2, 3, 4]


def test_a_bug_of_ours_leaves_its_traceback_and_says_what_is_saved(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = GraceGRPOTrainer.training_step

    def break_down(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("a bug of ours")
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GraceGRPOTrainer, "training_step", break_down)
        assert main(["train", "small.yaml"]) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "a bug of ours" in one]
    (file,) = (small / "run").glob("traceback-*.txt")
    assert str(file.relative_to(small)) in line and "checkpoint-2 is saved" in line
    assert "break_down" in file.read_text()
    assert main(["train", "small.yaml"]) == 0


def test_a_damaged_run_directory_is_one_line(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "mine.py").write_text("def mine(batch):\n    raise KeyError('x')\n")
    command = ["train", "small.yaml", "--dataset_name", "scenes", "--dataset_rows", "8"]
    command += ["--evaluation", "{rows: 2, dataset_splits: [test]}"]
    assert main(command) == 2
    names = ("environment.json", "inputs.json", "prompt.json", "evaluation.json")
    for name in ("metrics.jsonl", *names):
        file = small / "run" / name
        whole = file.read_bytes()
        file.write_bytes(b'{"rows": 7\n')
        capsys.readouterr()
        assert main(command) == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if name in one]
        assert line.startswith(str(file.relative_to(small)))
        file.write_bytes(whole)


HANGS = {
    "sleeps": "import time\ndef hang():\n    time.sleep(10000)\n",
    "swallows": """
def hang():
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
""",
    # Python's lock is held: no handler of a signal runs, and no thread.
    "never lets go": "import ctypes\ndef hang():\n    ctypes.PyDLL(None).sleep(10000)\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HANGS)
def test_one_sigterm_ends_a_run_whatever_a_reward_does(
    small: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "mine.py").write_text(
        HANGS[kind] + "def mine(batch):\n"
        "    if batch.step == 2:\n"
        "        open('hanging', 'w').close(); hang()\n"
        "    return [0.0] * len(batch)\n"
    )
    quick = "StopOnSignal.patience, StopOnSignal.last = 1.0, 8.0"
    code = f"from grace_rl.train.stop import StopOnSignal; {quick}; import sys\n"
    code += "from grace_rl.cli import main; sys.exit(main(['train', 'small.yaml']))"
    (small / "impatient.py").write_text(code)
    with subprocess.Popen([sys.executable, "impatient.py"], stderr=subprocess.PIPE) as process:
        while not (small / "hanging").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        said = process.communicate()[1].decode()
    assert process.returncode == (-signal.SIGKILL if kind == "never lets go" else 130), said
    assert kind != "never lets go" or "in hang" in said
    assert last_complete_checkpoint(small / "run" / "checkpoints") is not None
    (small / "mine.py").write_text("def mine(batch):\n    return [0.0] * len(batch)\n")
    assert main(["train", "small.yaml"]) == 0


def test_sigterm_before_the_first_step_is_130(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "grace_rl.train.start.Start.load_policy",
            lambda self: os.kill(os.getpid(), signal.SIGTERM),
        )
        assert main(["train", "small.yaml"]) == 130
    assert main(["train", "small.yaml", "--max_steps", "1"]) == 0


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
