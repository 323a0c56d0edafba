"""Running a chain of stages: one run directory, resumable at any stage.

runs/x/stages/1-reconstruction/...    a run directory of its own
runs/x/stages/2-grpo/...
runs/x/model/                         that of the last stage
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from grace_rl.errors import UserError
from grace_rl.launch.preflight import check_stages
from grace_rl.recipe import Recipe
from grace_rl.recipe.stages import Chain, Stage
from grace_rl.run.directory import RunDirectory
from grace_rl.run.identity import input_digests
from grace_rl.run.processes import join_processes
from grace_rl.run.recipe_differences import may_change
from grace_rl.run.records import read_recipe, read_status
from grace_rl.run.screen import Screen
from grace_rl.train.run import DONE, train


def _joined(recipe: Recipe) -> Any:
    return recipe.training_arguments(**join_processes(recipe.training))


def train_chain(chain: Chain, *, overwrite: bool = False) -> int:
    """Run the stages that are not finished yet, one after the other.

    Returns:
        Exit code: that of the first stage that did not finish, else 0.

    Raises:
        UserError: See `check_stages` and `grace_rl.train.run.train`.
    """
    check_stages(chain, _joined, processes=PartialState().num_processes)
    console = Screen()
    run = RunDirectory(chain.output_dir, PartialState())
    if not overwrite:
        run.on_main(partial(_check_finished, chain))
    told = chain.resolved()
    run.open(told, inputs=lambda: input_digests(told, may_change), overwrite=overwrite)
    try:
        for number, stage in enumerate(chain.stages, start=1):
            finished = run.on_main(partial(is_finished, stage))
            if run.is_main_process:
                done = "finished already" if finished else str(stage.folder)
                title = f"stage {number} of {len(chain.stages)}, {stage.name}: {done}"
                console.print(title, style="bold")
            if finished:
                continue
            code = run_stage(stage, run)
            if code != DONE:
                return code
            gc.collect()  # the stage's model, before the next one loads
        last = next((s for s in reversed(chain.stages) if s.recipe is not None), None)
        if last is not None:
            run.publish_model(lambda folder: link_model(last.folder / "model", folder, run))
            if run.is_main_process:
                console.print(f"The policy is in {run.model}")
    finally:
        run.close()
    return DONE


def is_finished(stage: Stage) -> bool:
    """Whether a stage's run, or its curated rows, are complete."""
    if stage.curation is not None:
        return (stage.folder / "rows.jsonl").is_file()
    return (read_status(stage.folder) or {}).get("status") == "finished"


def _check_finished(chain: Chain) -> None:
    """A finished stage is skipped, so it must be as long as the recipe says by now."""
    problems = []
    for number, stage in enumerate(chain.stages, start=1):
        if stage.recipe is None or not is_finished(stage):
            continue
        before, now = read_recipe(stage.folder), stage.recipe.training
        problems += [
            f"stage {number} ({stage.name}): {key}: is finished with {before.get(key)}, now "
            f"{now.get(key)}; set it back, choose another --output_dir, or give --overwrite"
            for key in ("max_steps", "num_train_epochs")
            if before.get(key) != now.get(key)
        ]
    if problems:
        raise UserError(problems)


def run_stage(stage: Stage, run: RunDirectory) -> int:
    """Start or resume one stage; returns its exit code."""
    if stage.recipe is not None:
        return train(stage.recipe)
    if stage.curation is not None:
        from grace_rl.curate.run import curate

        run.on_main(partial(_curate, curate, stage.curation))
    return DONE


def _curate(curate: Callable[..., Any], recipe: Any) -> None:
    curate(recipe)  # its report is no answer for the other processes


def link_model(model: Path, folder: Path, run: RunDirectory) -> None:
    """The last stage's model once more, without a second copy on the disk where links work."""
    if not run.is_main_process:
        return

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return target

    shutil.copytree(model, folder, copy_function=link, dirs_exist_ok=True)
