"""From a recipe to a finished run directory, the same steps for every method:

    preflight -> run directory -> policy -> scores before -> training -> scores after -> model/

What can be wrong with the user's input is found by the method's plan, before the policy is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft.utils.error import NoMatchingPeftModuleError

from grace_rl.credit.value_model import without_value_model
from grace_rl.errors import Crash, UserError
from grace_rl.launch.preflight import Preflight, preflight, refuse
from grace_rl.reward import RewardError
from grace_rl.rollout.kept_server import ServerLost
from grace_rl.rollout.policy import resolve_model
from grace_rl.rollout.server import require_server
from grace_rl.run.directory import RunDirectory
from grace_rl.run.environment import command_line
from grace_rl.run.identity import input_digests, rows_digest
from grace_rl.run.processes import join_processes, left_by_others
from grace_rl.run.recipe_differences import may_change
from grace_rl.run.screen import Screen
from grace_rl.run.zero import whole_policy
from grace_rl.train.callbacks import follow
from grace_rl.train.report import Report
from grace_rl.train.start import Start
from grace_rl.train.stop import INTERRUPTED, Budget

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

DONE, SERVER_LOST = 0, 75


def train(recipe: Recipe, *, overwrite: bool = False, budget: Budget | None = None) -> int:
    """Run a recipe in its output directory, resuming what an earlier attempt left there.

    Args:
        recipe: The recipe.
        overwrite: Replace a finished run.
        budget: Ends the training in order when it is used up, whatever `max_steps` says.

    Returns:
        Exit code: 0 done, 75 the vLLM server was lost, 130 interrupted; with a checkpoint saved.

    Raises:
        UserError: The recipe, its rows, its rewards, its model or the output directory is wrong.
    """
    console = Screen()
    args = recipe.training_arguments(**join_processes(recipe.training))
    model_config = recipe.model_config()
    flight = preflight(recipe, args, processes=args.world_size)
    refuse([flight])
    if flight.build is None:
        raise UserError(f"{recipe.method}: refuses these rows or rewards")
    if getattr(args, "use_vllm", False) and args.vllm_mode == "server":
        require_server(args, resolve_model(str(model_config.model_name_or_path), Path(), args.seed))

    run = RunDirectory(args.output_dir, PartialState())
    checkpoint = _opened(run, recipe, flight, overwrite)
    args.output_dir = str(run.checkpoints)
    if flight.prompts:
        now = {name: prompt.surroundings for name, prompt in flight.prompts.items()}
        args.pin_prompts(run.keep_prompts(now))
    trainer = None
    try:
        trainer = flight.build(Start(model_config, args, run.path, console))
        return _trained(trainer, recipe, run, checkpoint, budget, console)
    except NoMatchingPeftModuleError as error:
        raise UserError(f"lora_target_modules: {error}") from error
    except ServerLost as lost:
        save_without_server(trainer, lost, console)
        return SERVER_LOST
    except RewardError as error:
        raise UserError([*error.problems, save_last_step(trainer)]) from error
    except UserError:
        raise
    except KeyboardInterrupt:
        if run.is_main_process:
            console.print(f"Ended at once: {run.saved()}.")
        raise
    except Exception as error:
        if PartialState().num_processes > 1 and left_by_others(error):
            raise UserError(
                f"process {PartialState().process_index} lost the others: one of them ended or "
                f"does not answer, and says why itself unless it was killed; {run.saved()}"
            ) from error
        raise Crash(run.path, f"What there is: {run.saved()}") from error
    finally:
        run.close()


def _opened(run: RunDirectory, recipe: Recipe, flight: Preflight, overwrite: bool) -> Path | None:
    """Open the run directory; the checkpoint to go on from, if there is one."""
    resolved = recipe.resolved()
    return run.open(
        resolved,
        inputs=lambda: (
            input_digests(resolved, may_change) | {"dataset_name": rows_digest(flight.rows)}
        ),
        overwrite=overwrite,
        seed=flight.args.seed,
    ).checkpoint


def _trained(
    trainer: Any,
    recipe: Recipe,
    run: RunDirectory,
    checkpoint: Path | None,
    budget: Budget | None,
    console: Screen,
) -> int:
    """Score, train, score and write the model; returns the exit code."""
    report = Report(recipe, run, trainer)
    report.before()
    with follow(
        trainer,
        run,
        console=console,
        steps_between_generations=getattr(trainer.args, "steps_between_generations", 1),
        stale_engine_threshold=getattr(trainer.args, "stale_engine_threshold", 0.1),
    ) as stop:
        if budget is not None:
            trainer.add_callback(budget)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.interrupted:
        return INTERRUPTED
    report.after()
    run.publish_model(lambda folder: save_policy(trainer, folder))
    if run.is_main_process:
        report.show(console)
        console.print(f"The policy is in {run.model}")
    return DONE


def save_without_server(trainer: Any, lost: ServerLost, console: Screen) -> None:
    """Save a checkpoint of the last finished step and say how to go on; all processes call it."""
    saved = save_last_step(trainer)
    if trainer.accelerator.is_main_process:
        lines = (
            f"The vLLM server did not come back ({lost}); {saved}. Start the server again with",
            f"  grace-rl serve {trainer.model.name_or_path}",
            "and go on with",
            f"  {command_line(without=('--overwrite',))}",
        )
        console.print("\n".join(lines))


def save_last_step(trainer: Any) -> str:
    """Save a checkpoint of the last finished step and say so; all processes call it."""
    step = 0 if trainer is None else trainer.state.global_step
    if not step:
        return "no step was finished"
    trainer._save_checkpoint(trainer.model_wrapped, None)
    return f"a checkpoint of step {step} is saved"


def save_policy(trainer: Any, folder: Path) -> None:
    """Write a policy that transformers and vLLM load: an adapter is merged into its base model.

    All processes call it, after training; one writes.
    """
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says it all
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        return
    with whole_policy(trainer), without_value_model(model):
        merged = model.merge_and_unload()  # everywhere: DeepSpeed numbers modules alike
        if trainer.args.should_save:
            for file in folder.glob("adapter_*"):
                file.unlink()
            merged.save_pretrained(folder)
