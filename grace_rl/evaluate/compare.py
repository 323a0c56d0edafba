"""Running a comparison's cells, some at once, each in a process of its own; then table and picture.

A finished cell (`cell.json` with the same settings) is never run again; an unfinished run goes on
from its last checkpoint. Ctrl-C (or SIGTERM) lets every run save one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from grace_rl.evaluate.comparison import Cell, ComparedRow, Comparison, cells_of
from grace_rl.evaluate.comparison_table import write_tables
from grace_rl.run.files import held, write_text
from grace_rl.run.screen import Screen

Result = dict[str, Any]
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def compare(comparison: Comparison, *, only_table: bool = False) -> int:
    """Run what is not finished, then write `comparison.{md,csv,json,png}` to the output directory.

    Args:
        comparison: From `load_comparison`.
        only_table: Run nothing; the tables show what is finished.

    Returns:
        Exit code: 0 done, 130 interrupted and saved; where runs failed (their logs are named) 2 if
        each ended with a mistake of the user's, else 1.
    """
    console = Screen()
    runner = _Runner(comparison, console)
    code = DONE
    if not only_table:
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        comparison.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            with held(comparison.output_dir):
                code = runner.run()
        finally:
            signal.signal(signal.SIGTERM, handler)
        if code == INTERRUPTED:
            return code
    results = [(cell, result) for cell, result in runner.cells() if result is not None]
    if not results:
        console.print(f"{comparison.output_dir}: no cell is finished yet")
    else:
        chosen = runner.chosen_by_name
        kept = [
            (cell, result)
            for cell, result in results
            if cell.choice in (None, chosen[cell.row].get(cell.labels or 0))
        ]
        for path in write_tables(comparison, kept, results):
            console.print(f"wrote {path}")
    return code


class _Runner:
    def __init__(self, comparison: Comparison, console: Console) -> None:
        self.comparison = comparison
        self.console = console
        self.running: dict[str, tuple[Cell, subprocess.Popen[bytes]]] = {}
        self.failed: dict[str, int] = {}  # name of a cell -> its exit code
        self.chosen_by_name: dict[str, dict[int, int]] = {row.name: {} for row in comparison.rows}

    def folder(self, cell: Cell) -> Path:
        return self.comparison.output_dir / "cells" / cell.name

    def result(self, cell: Cell) -> Result | None:
        """What a finished cell found; None where it is not finished, or was of other settings."""
        try:
            result = json.loads((self.folder(cell) / "cell.json").read_text(encoding="utf-8"))
            same = result["spec"] == json.loads(json.dumps(cell.spec))
        except (OSError, ValueError, KeyError, TypeError):  # damaged is not finished
            return None
        return result if same else None

    def chosen(self, row: ComparedRow) -> Mapping[int, int]:
        """Number of labels -> the grid's best setting on validation rows, where all have run."""
        found = self.chosen_by_name[row.name]
        if not row.grid:
            return found
        tried: dict[int, list[Cell]] = {}
        for cell in cells_of(self.comparison, row, {}):
            tried.setdefault(cell.labels or 0, []).append(cell)
        for labels, cells in tried.items():
            results = [self.result(cell) for cell in cells]
            if all(results):
                worth = [_validation(result or {}, row.choose) for result in results]
                found[labels] = max(range(len(worth)), key=lambda i: worth[i])
        return found

    def cells(self) -> list[tuple[Cell, Result | None]]:
        """The cells that are known by now, and what they found."""
        return [
            (cell, self.result(cell))
            for row in self.comparison.rows
            for cell in cells_of(self.comparison, row, self.chosen(row))
        ]

    def waiting(self) -> list[Cell]:
        begun = {*self.running, *self.failed}
        return [cell for cell, result in self.cells() if result is None and cell.name not in begun]

    def expected(self) -> int:
        """Cells in all, those too whose setting is still to be chosen."""
        rows = self.comparison.rows
        counts = self.comparison.file.labels
        every = dict.fromkeys([0, *counts], 0)
        return sum(len(cells_of(self.comparison, row, every)) for row in rows)

    def run(self) -> int:
        try:
            return self._run()
        except KeyboardInterrupt:
            self.stop()
            self.console.print("Interrupted; finished cells are kept. The same command goes on.")
            return INTERRUPTED

    def _run(self) -> int:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        ) as progress:
            total = self.expected()
            bar = progress.add_task("cells", total=total, left="")
            began, before = time.monotonic(), total - len(self.waiting())
            while True:
                waiting = self.waiting()
                while waiting and len(self.running) < self.comparison.file.jobs:
                    self.start(waiting.pop(0))
                if not self.running:
                    break
                time.sleep(0.5)
                for cell, process in list(self.running.values()):
                    if process.poll() is not None:
                        self.finish(cell, progress.console)
                done = sum(result is not None for _, result in self.cells())
                if done > before:
                    seconds = (time.monotonic() - began) / (done - before) * (total - done)
                    progress.update(bar, left=f"about {seconds / 60:.0f} min left")
                progress.update(bar, completed=done)
        return self.verdict()

    def verdict(self) -> int:
        """Say which runs failed, and give the exit code."""
        for name, code in self.failed.items():
            log = self.comparison.output_dir / "cells" / name / "log.txt"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            reason = lines[-1] if code == MISTAKE else f"exit code {code}"
            self.console.print(f"{name} failed, see {log}: {reason}", style="bold red")
        codes = frozenset(self.failed.values())
        return DONE if not codes else MISTAKE if codes == {MISTAKE} else FAILED

    def start(self, cell: Cell) -> None:
        folder = self.folder(cell)
        spec = folder / "spec.json"
        text = json.dumps(cell.spec, indent=1) + "\n"
        if spec.exists() and spec.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder)  # of other settings
        folder.mkdir(parents=True, exist_ok=True)
        write_text(spec, text)
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", str(_threads(self.comparison.file.jobs)))
        command = [sys.executable, "-m", "grace_rl", "compare", "--cell", str(folder)]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.running[cell.name] = (cell, process)

    def finish(self, cell: Cell, console: Console) -> None:
        code = self.running.pop(cell.name)[1].returncode
        result = self.result(cell)
        if result is None:
            self.failed[cell.name] = code
            return
        shown = "  ".join(
            f"{name} {value:.3f}" for name, value in list(result["scores"].items())[:2]
        )
        seconds = result.get("training", {}).get("seconds", 0)
        console.print(f"{cell.name}: {shown}  ({seconds:.0f} s)")

    def stop(self) -> None:
        """Tell every run to save a checkpoint and end, and wait for them."""
        for _, process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in self.running.values():
            process.wait()


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs) if jobs == 1 else 1


def _validation(result: Result, metric: str) -> tuple[float, float]:
    """Best value of the metric on validation rows, and minus the lowest loss among its best."""
    lines = [line for line in result["training"]["validation"] if metric in line]
    if not lines:
        return -float("inf"), 0.0
    best = max(line[metric] for line in lines)
    return best, -min(line.get("eval_loss", 0.0) for line in lines if line[metric] == best)
