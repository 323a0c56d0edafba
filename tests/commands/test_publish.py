"""`new`, `env`, `push` and the card of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from grace_rl import __version__
from grace_rl.cli import main
from grace_rl.run.card import model_card
from tests.commands.hub import hub

RECIPE = {
    "method": "grpo",
    "model_name_or_path": "acme/tiny",
    "dataset_name": "/home/somebody/rows.jsonl",
    "rewards": [{"name": "contrastive"}],
    "seed": 3,
    "output_dir": "runs/mine",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run directory, as far as it is shared."""
    folder = tmp_path / "runs" / "mine"
    (folder / "model" / "reader").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "metrics.jsonl").write_text('{"step": 20, "seconds": 9.0, "reward": 0.5}\n')
    rows = [
        {"name": "cold_start", "rationale": "none", "scores": {"scenes/spearman": 0.4}},
        {"name": "trained", "rationale": "greedy", "scores": {"scenes/spearman": 0.8125}},
    ]
    (folder / "evaluation.json").write_text(json.dumps({"model": "mine", "rows": rows}))
    for name in ("config.json", "grace.json", "tokenizer.json", "reader/centre.safetensors"):
        (folder / "model" / name).write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "model" / ".lock").touch()
    (folder / "rollouts").mkdir()
    table = pa.table({"text": ["a cat sleeps", "```\n# a trap"], "rationale": ["cat", "<b>"]})
    pq.write_table(table, folder / "rollouts" / "step-000020.parquet")
    return folder


def test_the_card_says_what_the_run_says(run: Path) -> None:
    card = model_card(run, "acme/mine")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "acme/tiny" and front["library_name"] == "sentence-transformers"
    for told in (
        "| base model | acme/tiny |",
        "| data | rows.jsonl |",
        "| steps | 20 |",
        "| cold_start | none | 0.400 |",
        "| trained | greedy | 0.812 |",
        "rationale: cat",
        'SentenceTransformer("acme/mine", trust_remote_code=True)',
        "## Limits",
        f"grace-rl {__version__}",
    ):
        assert told in card, told
    assert "/home/somebody" not in card
    assert "````text\ntext:      ```" in card  # what was written opens no fence


def test_a_run_is_pushed_whole_or_as_its_adapter(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub() as (address, repositories):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        assert main(["push", str(run), "--repo", "acme/mine"]) == 0, capsys.readouterr().err
        assert main(["push", str(run), "--repo", "acme/adapter", "--adapter"]) == 2
        assert "no checkpoint has an adapter" in capsys.readouterr().err
        for step in (9, 10):
            checkpoint = run / "checkpoints" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "adapter_config.json").write_text("{}")
            (checkpoint / "adapter_model.safetensors").write_text(str(step))
        assert main(["push", str(run), "--repo", "acme/adapter", "--adapter"]) == 0
    whole, adapter = repositories["acme/mine"], repositories["acme/adapter"]
    assert whole["model.safetensors"] == b"weights" and whole["README.md"].startswith(b"---\n")
    assert "reader/centre.safetensors" in whole and ".lock" not in whole
    assert adapter["adapter_model.safetensors"] == b"10" and "model.safetensors" not in adapter
    assert "grace.json" in adapter


def test_a_dry_run_sends_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "--repo", "acme/mine", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "model.safetensors: 7 bytes" in told and "## Scores" in told
    (run / "model").rename(run / "elsewhere")
    assert main(["push", str(run), "--repo", "acme/mine", "--dry-run"]) == 2
    assert "has no model/" in capsys.readouterr().err


def test_env_has_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}: " in told for name in ("grace-rl", "torch", "trl", "python", "gpus"))


@pytest.mark.slow
def test_the_test_of_a_new_project_passes(tmp_path: Path) -> None:
    """That its recipe trains is tested with the wheel."""
    assert main(["new", str(tmp_path / "mine")]) == 0
    assert main(["new", str(tmp_path / "mine")]) == 2  # it is there
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reward.py"]
    done = subprocess.run(command, cwd=tmp_path / "mine", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
