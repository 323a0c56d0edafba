"""grace-rl evaluate MODEL --tasks FILE --output FILE"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from grace_rl.run.workers import Cluster

HELP = "score a model on tasks of mteb and on local files"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run's model/, or any sentence encoder")
    parser.add_argument("--tasks", required=True, metavar="FILE", help="a YAML list of tasks")
    parser.add_argument("--output", metavar="FILE", default="evaluation.json")
    parser.add_argument(
        "--rationale", choices=("greedy", "sample", "none"), default="greedy", help="how to write"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm", "ray"),
        default="auto",
        help="what writes; ray: many workers, where a task has more than --chunk texts",
    )
    Cluster.add_arguments(parser)
    parser.add_argument("--chunk", type=int, default=4096, metavar="ROWS", help="that go together")
    parser.add_argument("--cache", metavar="FILE", help="keep what is written in this sqlite file")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--only-scores", action="store_true", help="leave out diagnostics and the row without"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.embed.loading import load_encoder, usable_device
    from grace_rl.errors import UserError
    from grace_rl.evaluate.tasks import load_tasks
    from grace_rl.run.screen import Screen

    try:
        from grace_rl.evaluate.mteb_encoder import MtebEncoder
    except ImportError as error:
        raise UserError("evaluate needs the package mteb; install 'grace-rl[mteb]'") from error
    from grace_rl.evaluate.evaluation import evaluate_model, result_table

    output = Path(options.output).expanduser()
    problems: list[str] = []
    cluster = Cluster.told(options, problems)
    if options.chunk < 1:
        problems.append(f"--chunk: must be at least 1, not {options.chunk}")
    if output.is_dir() or any(folder.is_file() for folder in output.parents):
        problems.append(f"--output: {output} is, or lies in, something else; give a file's name")
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed: must be from 0 to 2^32 - 1, not {options.seed}")
    if problems:
        raise UserError(problems)
    tasks = load_tasks(options.tasks)
    console = Screen()
    encoder = MtebEncoder.load(
        options.model,
        options.rationale,
        device=usable_device(options.device),
        engine="auto" if cluster else options.engine,
        cache=options.cache,
    )
    if cluster is not None:
        model = Path(options.model).absolute()
        load = partial(load_encoder, model, options.device, "auto", options.cache)
        output.parent.mkdir(parents=True, exist_ok=True)
        encoder.share(cluster, load, model, output.parent, options.chunk)
    content = evaluate_model(
        encoder,
        options.model,
        tasks,
        output,
        seed=options.seed,
        without_rationale=not options.only_scores,
        diagnostics=not options.only_scores,
        console=console,
    )
    console.print(result_table(content))
    console.print(f"The scores are in {options.output}", highlight=False, soft_wrap=True)
    return 0
