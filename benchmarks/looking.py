"""How fast questions about a large run are answered, and how fast the page shows it.

    python benchmarks/looking.py                        # 1,000,000 rollouts, DuckDB against pandas
    python benchmarks/looking.py --page                 # the page on two runs of 50,000 rollouts

The peer is pandas on the same columns, read once with `read_rollouts` (pyarrow): what one would
write in a notebook. Questions are asked three times (once before, unmeasured) and the median is
printed. `--page` drives headless Chromium through every view; one is there once its content is on
the screen. Beside the seconds stand those that the server computed, which other work on the machine
does not change.
Results go to benchmarks/results/looking.json (looking-page.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import psutil

from grace_rl.data import scenes
from grace_rl.inspect import Run
from grace_rl.rollout.store import read_rollouts, write_rollouts

RESULTS = Path(__file__).parent / "results"
PER_STEP, GROUP, TOKENS, DIMENSIONS = 1000, 8, 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, help="default 1,000,000; with --page 50,000")
    parser.add_argument("--page", action="store_true", help="time the page instead of the queries")
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here, and use them if they exist"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = options.rollouts or (50_000 if options.page else 1_000_000)
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        runs = [
            made_run(folder / f"run-{count}-{seed}", count, seed)
            for seed in range(options.seed, options.seed + (2 if options.page else 1))
        ]
        found = time_page(runs) if options.page else time_queries(runs[0])
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    result = {"rollouts": count, "runs": len(runs), "machine": machine(), **found}
    name = "looking-page.json" if options.page else "looking.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def made_run(path: Path, count: int, seed: int) -> Path:
    """A run of so many rollouts, `PER_STEP` in each step's file; every seed has the same texts."""
    if (path / "metrics.jsonl").exists():
        return path
    rng = random.Random(seed)
    texts = [row[role] for row in scenes.rows(count=2000) for role in ("query", "positive")]
    words = sorted({word for text in texts for word in text.split()})
    print(f"writing {count:,} rollouts to {path}", flush=True)
    path.mkdir(parents=True)
    (path / "status.json").write_text('{"grace_rl": "0", "status": "running"}')
    lines = []
    for step in range(1, count // PER_STEP + 1):
        chosen = [rng.randrange(len(texts)) for _ in range(PER_STEP // GROUP)]
        groups = [group for group in range(len(chosen)) for _ in range(GROUP)]
        numbers = [rng.gauss(0, 1) for _ in groups]
        write_rollouts(
            path,
            step,
            {
                "example": [chosen[group] // 2 for group in groups],
                "group": groups,
                "role": [("query", "positive")[chosen[group] % 2] for group in groups],
                "text": [texts[chosen[group]] for group in groups],
                "rationale": [" ".join(rng.choices(words, k=8)) for _ in groups],
                "token_ids": [[step % 97] * TOKENS for _ in groups],
                "truncated": [rng.random() < 0.01 for _ in groups],
                "advantage": numbers,
                "embedding": [vector(rng) for _ in groups],
                "total": [number + abs(number) for number in numbers],
                "reward/contrastive": numbers,
                "reward/length": [abs(number) for number in numbers],
            },
        )
        metrics = {"step": step, "seconds": step, "reward": step / 100, "entropy": 1 / step}
        lines.append(
            json.dumps(metrics | {f"time/{p}": rng.random() for p in ("rollout", "train")})
        )
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def vector(rng: random.Random) -> list[float]:
    """A unit vector that is nearly that of one of its numbers."""
    made = [0.01] * DIMENSIONS
    made[rng.randrange(DIMENSIONS)] = 1.0
    return made


def time_queries(path: Path) -> dict[str, Any]:
    """Seconds of each question, ours and the peer's."""
    start = time.perf_counter()
    run = Run(path)
    run.refresh()
    load = time.perf_counter() - start
    start = time.perf_counter()
    columns = ["step", "example", "group", "role", "text", "rationale", "truncated", "advantage"]
    columns += ["reward/contrastive", "reward/length"]
    frame = read_rollouts(path, columns=columns).to_pandas()
    peer_load = time.perf_counter() - start
    text, step = str(frame["text"].iloc[0]), int(frame["step"].iloc[-1]) // 2

    def contains(word: str) -> Any:
        low = [
            frame[name].str.lower().str.contains(word, regex=False)
            for name in ("text", "rationale")
        ]
        return frame[low[0] | low[1]]

    def pandas_groups() -> Any:
        spread = frame.groupby(["step", "group"], as_index=False)["advantage"].std(ddof=0)
        return spread.sort_values("advantage", ascending=False).head(50)

    def pandas_through() -> Any:
        same = frame[frame["text"] == text]
        return same.loc[same.groupby("step")["advantage"].idxmax()]

    questions: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "one step": (lambda: run.rollouts(step=step), lambda: frame[frame["step"] == step]),
        "a word in text or rationale, first 50": (
            lambda: run.rollouts(text="hostel", limit=50),
            lambda: contains("hostel").head(50),
        ),
        "how many have the word": (
            lambda: run.count(text="hostel"),
            lambda: len(contains("hostel")),
        ),
        "two conditions on rewards, best 50": (
            lambda: run.rollouts(
                score="contrastive > 1, length < 2", sort="advantage", descending=True, limit=50
            ),
            lambda: (
                frame[(frame["reward/contrastive"] > 1) & (frame["reward/length"] < 2)]
                .sort_values("advantage", ascending=False)
                .head(50)
            ),
        ),
        "groups of the widest spread": (
            lambda: run.groups(sort="spread", descending=True, limit=50),
            pandas_groups,
        ),
        "one text through training": (lambda: run.through_training(text), pandas_through),
        "advantages at each step": (
            run.advantages,
            lambda: frame.groupby("step")["advantage"].quantile([0.1, 0.9]),
        ),
    }
    found = {"load": {"ours": load, "pandas": peer_load, "ratio": peer_load / load}}
    for name, (ours, peer) in questions.items():
        mine, other = seconds(ours), seconds(peer)
        found[name] = {"ours": mine, "pandas": other, "ratio": other / mine}
    for name, row in found.items():
        ours, peer = f"{row['ours']:8.3f} s", f"{row['pandas']:8.3f} s"
        print(f"{name:40} {ours}   pandas {peer}   {row['ratio']:6.1f} x")
    return {"seconds": {name: rounded(row) for name, row in found.items()}}


def seconds(ask: Callable[[], Any]) -> float:
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def time_page(runs: list[Path]) -> dict[str, Any]:
    """Seconds until each view is on the screen, and until a filter has acted."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "grace_rl", "inspect", *map(str, runs), "--port", "0"]
    started = time.perf_counter()
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "500"}
    )
    assert server.stdout is not None
    address = server.stdout.readline().split(": ", 1)[1].split()[0]
    process = psutil.Process(server.pid)
    found = {"server": {"seconds": time.perf_counter() - started, "computed": busy(process)}}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page()
            page.set_default_timeout(60_000)

            def timed(name: str, act: Callable[[], Any], there: Callable[[], Any]) -> None:
                start, before = time.perf_counter(), busy(process)
                act()
                there()
                seconds, computed = time.perf_counter() - start, busy(process) - before
                found[name] = {"seconds": seconds, "computed": computed}
                print(f"{name:32} {seconds:7.2f} s, computed {computed:.2f} s", flush=True)

            for name, (path, shown) in views_of(Run(runs[0])).items():
                timed(name, partial(page.goto, address + path), page.locator(shown).first.wait_for)
            page.goto(f"{address}/rollouts")
            total = page.locator(".count").inner_text()
            for label, value in FIELDS.items():
                before = page.locator(".count").inner_text()
                acted = "before => document.querySelector('.count').innerText !== before"
                there = partial(page.wait_for_function, acted, arg=before)
                fill = partial(page.get_by_label(label, exact=True).fill, value)
                timed(f"filter: {value}", fill, there)
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return {"list": total, "page": {name: rounded(values) for name, values in found.items()}}


FIELDS = {
    "Text or rationale contains": "hostel",
    "Scores": "contrastive > 1, length < 2",
    "Step": "20-40",
}


def views_of(run: Run) -> dict[str, tuple[str, str]]:
    """Each view's address, and what is there once it is; first those right after the start, when
    the store is still being read."""
    groups = run.groups(step=run.steps()[-1], limit=1)
    step, group, text = (groups[name][0] for name in ("step", "group", "text"))
    query = urlencode({"text": text})
    return {
        "overview, right after the start": ("/", "text=Spread of advantages over rol"),
        "what it learned, first": ("/learned", "text=Words that changed most"),
        "what it learned": ("/learned", "text=Words that changed most"),
        "rollouts": ("/rollouts", "tbody a"),
        "rollouts, best first": ("/rollouts?sort=total&order=down", "tbody a"),
        "rollouts with a pattern": ("/rollouts?pattern=unsupported", "tbody a"),
        "groups": ("/rollouts?show=groups", "tbody a"),
        "groups by spread": ("/rollouts?show=groups&sort=spread&order=down", "tbody a"),
        "a group": (f"/group?step={step}&group={group}", "article >> nth=7"),
        "a rollout": (f"/rollout?step={step}&row=0", "text=After: by the rationale"),
        "texts through training": ("/training", "tbody a"),
        "one text through training": (f"/training?{query}", "text=best rollout"),
        "map": ("/map", ".map .frame.shown a"),
        "compare": ("/compare", "text=The same texts"),
        "replays": ("/replays", "text=No replay is kept"),
        "notes": ("/notes", ".count"),
    }


def busy(process: psutil.Process) -> float:
    """Seconds that a process has computed, on all cores together."""
    times = process.cpu_times()
    return times.user + times.system


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
