"""What runs endure, one command for each line of docs/reliability.md.

    python benchmarks/reliability.py kills --what train --processes 1 --count 100
    python benchmarks/reliability.py kills --what curate --count 20      (embed, compare)
    python benchmarks/reliability.py inputs --count 100000
    python benchmarks/reliability.py values
    python benchmarks/reliability.py long --steps 5000

Each prints a line of JSON and exits with 1 if anything did not hold. The tests in
tests/test_reliability.py run the same code in small.

kills: the work is started again and again until it is done, each time killed (SIGKILL) at a moment
drawn at random: after some seconds, or at one of the changes to the file system, which come thick
in checkpoints, in the store and in the final save. The result must be that of an uninterrupted run:
weights to the last bit, each metric and each rollout once, nothing half written.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_rl.cli import main as command

TRAIN = """\
method: grpo
model_name_or_path: scenes
dataset_name: scenes
dataset_rows: 16
instruction: null
rewards: [{name: contrastive, temperature: 0.1}]
num_generations: 4
per_device_train_batch_size: %d
max_completion_length: 12
max_steps: %d
learning_rate: 1.0e-4
bf16: false
gradient_checkpointing: false
use_cpu: true
ddp_timeout: 900
logging_steps: 1
save_steps: 2
save_total_limit: 2
print_rollouts_steps: 0
report_to: none
"""
CURATE = ["--dataset_rows", "24", "--chunk_rows", "4", "--generate.candidates", "2"]
COMPARE = """\
output_dir: %s
seeds: [0]
labels: [16]
budget_seconds: 2
score: {dataset_splits: [test], rows: 8}
rows:
  - {name: InfoNCE, recipe: %s}
"""
PHASES = {  # a function on the stack -> what is being done, the innermost first
    "publish_model": "final save",
    "save_policy": "final save",
    "_save_checkpoint": "checkpoint",
    "write_rollouts": "store",
    "_generate_single_turn": "rollout",
    "generate": "rollout",
    "score": "scoring",
    "_calculate_rewards": "scoring",
    "training_step": "optimizer",
    "step": "optimizer",
    "curate": "curate",
    "embed_corpus": "embed",
    "compare": "compare",
}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "open")


@dataclass(frozen=True)
class Moment:
    """When a process kills itself: after so many seconds, or at its n-th change to the files."""

    seconds: float | None = None
    change: int | None = None


# -- one attempt ---------------------------------


def attempt(arguments: list[str], processes: int, moment: Moment | None, log: Path) -> int | None:
    """Run a command in forked processes; its exit code, or None if the moment came."""
    port = _free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if processes > 1:
                os.environ.update({name: str(value) for name, value in (ranks | place).items()})
            _child(arguments, moment if rank == 0 else None, log)
        children.append(child)
    _, status = os.waitpid(children[0], 0)
    for child in children[1:]:
        if os.WIFSIGNALED(status):
            os.kill(child, signal.SIGKILL)  # as a launcher does
        os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    return os.waitstatus_to_exitcode(status)


def _child(arguments: list[str], moment: Moment | None, log: Path) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if moment is not None:
            _arm(moment, log.with_suffix(".phases"))
        code = command(arguments)
        if "torch" in sys.modules:
            from grace_rl.run.processes import part_processes

            part_processes()
    finally:
        os._exit(code)


def _arm(moment: Moment, phases: Path) -> None:
    main = threading.get_ident()
    written = os.open(phases, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    left = [-1 if moment.change is None else moment.change]

    def die() -> None:
        names = [f.name for f in traceback.extract_stack(sys._current_frames()[main])]
        phase = next((PHASES[name] for name in reversed(names) if name in PHASES), "start")
        os.write(written, f"{phase}\n".encode())
        os.killpg(0, signal.SIGKILL)

    def look(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not _writes(given)):
            return
        left[0] -= 1
        if left[0] == 0:
            die()

    if moment.change is not None:
        sys.addaudithook(look)
    else:
        timer = threading.Timer(moment.seconds or 0.0, die)
        timer.daemon = True
        timer.start()


def _writes(given: tuple[Any, ...]) -> bool:
    _, mode, flags = given
    return bool(mode and set(str(mode)) & set("wax")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- kills ---------------------------------


@dataclass(frozen=True)
class Work:
    """Something to be killed.

    Attributes:
        line: Output folder -> the arguments of the command.
        look: Output folder -> raises if anything there is unreadable; called after each kill.
        result: Output folder -> what must be equal to that of an uninterrupted run.
        changes: About so many changes to the file system, of which one is drawn.
    """

    line: Callable[[Path], list[str]]
    look: Callable[[Path], Any]
    result: Callable[[Path], Any]
    changes: int


def kills(work: Work, folder: Path, count: int, processes: int, seed: int) -> dict[str, Any]:
    """Kill the work `count` times, over as many runs as that takes."""
    log = folder / "output.log"
    began = time.monotonic()
    whole = folder / "whole"
    code = attempt(work.line(whole), processes, None, log)
    if code != 0:
        raise RuntimeError(f"the uninterrupted run ended with {code}; see {log}")
    took, expected = time.monotonic() - began, work.result(whole)
    draw, killed, runs = random.Random(seed), 0, 0
    wrong: list[str] = []
    while killed < count and not wrong:
        runs += 1
        cut = folder / f"cut-{runs}"
        for _ in range(6):  # so often in one run, then it may end
            timed = draw.random() < 0.5
            moment = (
                Moment(seconds=draw.uniform(0.0, took))
                if timed
                else Moment(change=draw.randint(1, work.changes))
            )
            if killed >= count:
                break
            code = attempt(work.line(cut), processes, moment, log)
            if code in (0, 2):  # done; or it had been, and was killed after that
                break
            if code is not None:
                wrong.append(f"run {runs} ended with {code}; see {log}")
                break
            killed += 1
            try:
                work.look(cut)
            except Exception as error:
                wrong.append(f"after kill {killed}: {error}")
        if wrong:
            break
        if attempt(work.line(cut), processes, None, log) not in (0, 2):  # 2: it was finished
            wrong.append(f"run {runs} could not be finished; see {log}")
        elif work.result(cut) != expected:
            wrong.append(f"run {runs} has another result than the uninterrupted one")
    phases = folder / "output.phases"
    where = collections.Counter(phases.read_text().split("\n")[:-1] if phases.exists() else [])
    return {"kills": killed, "runs": runs, "wrong": wrong, "where": dict(sorted(where.items()))}


def training(folder: Path, processes: int, steps: int = 6) -> Work:
    """GRPO on scenes."""
    recipe = folder / "train.yaml"
    recipe.write_text(TRAIN % (16 // processes, steps), encoding="utf-8")
    return Work(
        lambda out: ["train", str(recipe), "--output_dir", str(out)], look_at_run, run_result, 150
    )


def look_at_run(run: Path) -> None:
    """Raises if a complete checkpoint, a metric, a rollout or the model cannot be read."""
    import torch
    from safetensors.torch import load_file

    from grace_rl.rollout.store import read_rollouts
    from grace_rl.run.checkpoints import is_complete, list_checkpoints
    from grace_rl.run.records import read_metrics

    if not run.is_dir():
        return
    for checkpoint in filter(is_complete, list_checkpoints(run / "checkpoints")):
        load_file(checkpoint / "model.safetensors")
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        json.loads((checkpoint / "trainer_state.json").read_text())
    if (run / "metrics.jsonl").is_file():
        read_metrics(run)
    read_rollouts(run)
    if (run / "model").is_dir():
        load_file(run / "model" / "model.safetensors")


def run_result(run: Path) -> Any:
    """Weights to the last bit, metrics without times, rollouts, and the names of all files."""
    from grace_rl.rollout.store import read_rollouts
    from grace_rl.run.identity import file_digest
    from grace_rl.run.records import read_metrics

    timed = ("seconds", "time/", "step_time", "train_", "rollout/tokens_per_second")
    metrics = [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in read_metrics(run)
    ]
    names = sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.name != ".lock" and not path.name.startswith("traceback-")
    )
    weights = file_digest(run / "model" / "model.safetensors")
    return weights, metrics, read_rollouts(run).to_pylist(), names


def curation(folder: Path) -> Work:
    """The four steps of curation on scenes."""
    recipe = Path(__file__).parents[1] / "recipes" / "curate" / "scenes.yaml"

    def result(out: Path) -> Any:
        left = [path.name for path in out.rglob("*.writing")]
        return (out / "rows.jsonl").read_text(encoding="utf-8"), left

    def look(out: Path) -> None:
        for path in out.rglob("*.jsonl"):
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def line(out: Path) -> list[str]:
        return ["curate", str(recipe), *CURATE, "--output_dir", str(out)]

    return Work(line, look, result, 40)


def embedding(folder: Path) -> Work:
    """A file of texts with the cold start."""
    import pyarrow.parquet as pq

    from grace_rl.data import scenes

    texts = folder / "texts.jsonl"
    rows = scenes.rows("train", "triplet", 60)
    lines = (json.dumps({"text": row["query"]}) + "\n" for row in rows)
    texts.write_text("".join(lines), encoding="utf-8")

    def line(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        output = ["--output", str(out / "v.parquet"), "--chunk", "10", "--rationales"]
        return ["embed", str(scenes.COLD_START), "--input", str(texts), *output]

    def look(out: Path) -> None:
        for path in out.rglob("*.parquet"):
            if not path.name.startswith("."):
                pq.read_table(path)

    def result(out: Path) -> Any:
        return pq.read_table(out / "v.parquet").to_pylist(), sorted(p.name for p in out.iterdir())

    return Work(line, look, result, 40)


def comparing(folder: Path) -> Work:
    """A comparison of one cell; its own processes die with it."""
    root = Path(__file__).parents[1]

    def line(out: Path) -> list[str]:
        file = folder / f"{out.name}.yaml"
        recipe = root / "recipes" / "scenes" / "infonce.yaml"
        file.write_text(COMPARE % (out, recipe), encoding="utf-8")
        return ["compare", str(file)]

    def look(out: Path) -> None:
        for path in out.rglob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))

    def result(out: Path) -> Any:
        table = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
        return len(table), [path.name for path in out.rglob("*.writing")]

    return Work(line, look, result, 60)


WORKS: dict[str, Callable[[Path], Work]] = {
    "curate": curation,
    "embed": embedding,
    "compare": comparing,
}


# -- generated inputs ---------------------------------


def inputs(folder: Path, count: int, seed: int, limit: float = 10) -> dict[str, Any]:
    """Damaged and invented inputs: each is read, or refused by a `UserError` within the limit.

    The limit is of this process's own seconds, so that a busy machine makes nothing wrong; thirty
    times as long on the clock is a hang whatever it waits for.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    from reliability_inputs import KINDS, SLOW_KINDS

    from grace_rl.errors import UserError

    preload()  # not while the clock runs
    draw, wrong, outcomes = random.Random(seed), [], collections.Counter[str]()
    number = 0
    alarms = {signal.ITIMER_PROF: (signal.SIGPROF, limit)}
    alarms[signal.ITIMER_REAL] = (signal.SIGALRM, 30 * limit)
    before = {one: signal.signal(one, _too_slow) for one, _ in alarms.values()}
    try:
        for number in range(count):
            kind = draw.choice(list(SLOW_KINDS if draw.random() < 0.01 else KINDS))
            make, must_refuse = (KINDS | SLOW_KINDS)[kind](draw, folder)
            for timer, (_, seconds) in alarms.items():
                signal.setitimer(timer, seconds)
            try:
                make()
                outcomes[f"{kind}: read"] += 1
                if must_refuse:
                    wrong.append(f"{number} {kind}: accepted {must_refuse}")
            except UserError:
                outcomes[f"{kind}: refused"] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                wrong.append(f"{number} {kind}: {type(error).__name__} at {where}: {error}"[:300])
            finally:
                for timer in alarms:
                    signal.setitimer(timer, 0)
    except KeyboardInterrupt:  # what was done until now counts
        count = number
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return {"inputs": count, "wrong": wrong[:20], "wrongs": len(wrong), "outcomes": dict(outcomes)}


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError("over the limit")


def values(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every value of every key: it trains a step, or is refused by its key."""
    sys.path.insert(0, str(Path(__file__).parent))
    from reliability_values import values as every

    return every(folder, options.only, options.one_of, options.seed)


# -- a long run ---------------------------------


def long(folder: Path, steps: int) -> dict[str, Any]:
    """Train for many steps; memory, files and step time of the first and the last quarter."""
    import psutil

    recipe = folder / "long.yaml"
    text = TRAIN.replace("save_steps: 2\n", "save_steps: 200\n") % (16, steps)
    recipe.write_text(text.replace("logging_steps: 1\n", "logging_steps: 50\n"), encoding="utf-8")
    run, log = folder / "run", folder / "output.log"
    seen: list[tuple[float, int, int, int]] = []  # seconds, MiB, open files, checkpoints
    child = os.fork()
    if child == 0:
        _child(["train", str(recipe), "--output_dir", str(run)], None, log)
    process, began = psutil.Process(child), time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        mib, files = process.memory_info().rss >> 20, process.num_fds()
        folders = len(list((run / "checkpoints").glob("checkpoint-*")))
        seen.append((time.monotonic() - began, mib, files, folders))
        time.sleep(1)
    from grace_rl.run.records import read_metrics

    lines = read_metrics(run)
    quarter = max(1, len(lines) // 4)

    def pace(some: list[dict[str, Any]]) -> float:
        passed = some[-1]["seconds"] - some[0]["seconds"]
        return 1000 * passed / max(1, some[-1]["step"] - some[0]["step"])

    # Without what loads first.
    after = [one for one in seen if one[0] > seen[-1][0] / 10] or seen
    parts = after[: max(1, len(after) // 4)], after[-max(1, len(after) // 4) :]
    most = [[max(one[column] for one in part) for part in parts] for column in (1, 2, 3)]
    result = {
        "steps": lines[-1]["step"],
        "memory_mib": most[0],
        "open_files": most[1],
        "checkpoints": most[2],
        "ms_per_step": [round(pace(lines[:quarter]), 1), round(pace(lines[-quarter:]), 1)],
    }
    # In a run of seconds the first quarter is loading: its memory says nothing about the rest.
    fatter = steps >= 500 and most[0][1] > 1.05 * most[0][0] + 16
    grew = fatter or most[1][1] > most[1][0] + 4 or most[2][1] > 3
    result["wrong"] = ["memory or files grow"] if grew or lines[-1]["step"] != steps else []
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("kills", "inputs", "values", "long"))
    parser.add_argument("--what", choices=("train", *WORKS), default="train")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--only", default="", help="values: of keys that begin so")
    parser.add_argument("--one_of", type=int, default=1, help="values: of so many only one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    if options.part == "kills":
        preload()
        train = options.what == "train"
        work = training(folder, options.processes) if train else WORKS[options.what](folder)
        result = kills(work, folder, options.count, options.processes, options.seed)
    elif options.part == "inputs":
        result = inputs(folder, options.count, options.seed)
    elif options.part == "values":
        preload()
        result = values(folder, options)
    else:
        preload()
        result = long(folder, options.steps)
    print(json.dumps({"part": options.part, "folder": str(folder), **result}))
    return 1 if result["wrong"] else 0


def preload() -> None:
    """Import once what every forked attempt needs; one thread, since forks take none along."""
    import torch

    torch.set_num_threads(1)
    import grace_rl.train.grpo
    import grace_rl.train.run  # noqa: F401


if __name__ == "__main__":
    raise SystemExit(main())
