"""What we write is data: every artifact of a run loads without running code."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from transformers.trainer import safe_globals

from grace_rl.cli import main

SETTINGS = (
    "--dataset_rows 8 --per_device_train_batch_size 16 --max_steps 2 "
    "--save_steps 1 --max_completion_length 8 --evaluation null --print_rollouts_steps 0"
)
DATA = {".safetensors", ".json", ".jsonl", ".yaml", ".parquet", ".jinja", ".txt", ".lock"}
TORCH = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trust") / "run"
    recipe = str(root / "recipes" / "quickstart.yaml")
    assert main(["train", recipe, *SETTINGS.split(), "--output_dir", str(run)]) == 0
    return run


def test_every_file_of_a_run_is_data(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    others = {path.name for path in files if (path.suffix or path.name) not in DATA}
    assert others - TORCH == {"COMPLETE"}
    loaded = [path for path in files if path.name in TORCH]
    assert loaded
    for path in loaded:
        with safe_globals():  # numpy's arrays of numbers, as transformers allows them
            torch.load(path, weights_only=True)


def test_no_other_file_hides_a_pickle(finished: Path) -> None:
    for path in finished.rglob("*"):
        if not path.is_file() or path.name in TORCH:
            continue
        content = path.read_bytes()
        assert not zipfile.is_zipfile(io.BytesIO(content)), path
        with pytest.raises((ValueError, pickle.UnpicklingError, IndexError)):
            list(pickletools.genops(content))
