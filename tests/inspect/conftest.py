"""Runs to look at: a small written one with hostile rationales, and real ones of a few steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_rl.rollout.store import write_rollouts

pytest.importorskip("duckdb", reason="needs duckdb: pip install 'grace-rl[inspect]'")

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    "`${window.pwned = 3}` </script><svg onload=window.pwned=4>",
    "\u202egnirts desrever\u202c \x1b[31mred\x1b[0m \x00 \x07",
    "{{ constructor.constructor('window.pwned = 5')() }}",
    "w" * 3000,
    "مرحبا بالعالم",
    '=HYPERLINK("http://evil.example")\'";--',
]
TEXTS = ["a red fox runs", "a grey wolf <b>sleeps</b>", "the sea at noon", "nothing at all"]


def write_step(run: Path, step: int, rationales: list[str] | None = None) -> None:
    """Four texts with two rollouts each, and an anchor."""
    said = rationales or [f"step {step}, rollout {i}" for i in range(8)]
    texts = [TEXTS[i // 2] for i in range(8)]
    values = [(-1.0) ** i * (1 + i / 10) for i in range(8)]
    write_rollouts(
        run,
        step,
        {
            "example": [i // 2 for i in range(8)] + [0],
            "group": [i // 2 for i in range(8)] + [9],
            "side": [0] * 8 + [1],
            "role": ["query", "positive"] * 4 + ["negative"],
            "text": [*texts, "an anchor"],
            "rationale": [*said, "of an anchor"],
            "token_ids": [[1, 2, 3 + i] for i in range(9)],
            "truncated": [i == 7 for i in range(9)],
            "advantage": [*values, None],
            "step_scores": [*[[0.0, 0.5, v] for v in values], None],
            "step_ends": [*[[0, 1, 3]] * 8, None],
            "embedding": [[0.6, 0.8] if i % 2 else [0.8, -0.6] for i in range(9)],
            "total": [*values, None],
            "reward/contrastive": [*values, None],
            "reward/length": [*[0.0] * 8, None],
        },
    )


def write_run(folder: Path, steps: int = 3) -> Path:
    """A run directory as training leaves it, without a model; the last step is hostile."""
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"grace_rl": "0", "status": "running"}))
    (folder / "recipe.yaml").write_text("method: grpo\nmodel_name_or_path: nowhere\nmax_steps: 9\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {"step": step, "seconds": 2.0 * step, "reward": step / 10}
            line |= {"entropy": 0.5 if step < steps else 0.01, "completions/clipped_ratio": 0.0}
            line |= {"alarms/stale_engine": float(step == 2)}
            file.write(json.dumps(line) + "\n")
    for step in range(1, steps):
        write_step(folder, step)
    write_step(folder, steps, HOSTILE)
    words = [{"words": [["fox", 0.5], ["<i>red</i>", 0.25]], "entropy": 1.0, "cosine": None}]
    lines = [{"step": step, "text": "a <b>text</b>", "steps": words} for step in (0, steps)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "soft_tokens.jsonl").write_text(text)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A written run of its own for each test."""
    return write_run(tmp_path / "written")


@pytest.fixture
def add_step() -> Callable[..., None]:
    """Writes one more step into a written run."""
    return write_step


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> list[Path]:
    """Two short real runs of the quickstart recipe; its rows come back, so texts recur."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "dataset_rows": 8,
        "per_device_train_batch_size": 64,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "print_rollouts_steps": 0,
        "evaluation": "{dataset_splits: [test], rows: 20}",
    }
    started = []
    for name, recipe, seed in (("first", "quickstart", 0), ("second", "quickstart-stepwise", 1)):
        settings = {**changes, "seed": seed, "output_dir": folder / name}
        overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        command = ["train", str(root / "recipes" / f"{recipe}.yaml"), *overrides]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "grace_rl", *command],
                cwd=root,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    return [folder / "first", folder / "second"]


class Server:
    """`grace-rl inspect` in a process of its own."""

    def __init__(self, *runs: Path) -> None:
        command = [sys.executable, "-m", "grace_rl", "inspect", *map(str, runs), "--port", "0"]
        environment = os.environ | {"COLUMNS": "300", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            raise AssertionError(self.stop())
        self.address = line.split(": ", 1)[1].split()[0]

    def stop(self) -> str:
        """End it and return what it said on stderr."""
        self.process.terminate()
        return self.process.communicate()[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. While it is there, an event loop runs in the main thread."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make dev")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a browser: make browser, or apt-get install chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written run, for tests that leave it as it is."""
    return write_run(tmp_path_factory.mktemp("hostile") / "written")


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written run that goes on while it is looked at."""
    return write_run(tmp_path_factory.mktemp("going on") / "live")


@pytest.fixture(scope="session")
def site(trained: list[Path], written: Path, live: Path) -> Iterator[str]:
    """Address of the one page server of all tests, on the runs first, second, written and live; it
    must have had nothing to complain about."""
    pytest.importorskip("starlette", reason="needs starlette: pip install 'grace-rl[inspect]'")
    server = Server(*trained, written, live)
    yield server.address
    said = server.stop()
    assert "Traceback" not in said, said
