"""From a recipe to a finished run directory, the same steps for every method:

    rows, rewards -> run directory -> policy -> scores before -> training -> scores after -> model/

What can be wrong with the user's input is found before the policy is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig, get_peft_config, get_quantization_config

from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.data.rows import read_rows
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import ReaderConfig
from grace_rl.evaluate.scenes import example_rationales, score_policy
from grace_rl.evaluate.tables import rationale_table, score_table
from grace_rl.recipe_keys import RL_METHODS
from grace_rl.reward.loading import load_rewards
from grace_rl.rollout.policy import load_policy, resolve_model
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train.callbacks import follow
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import check_batches
from grace_rl.train.ppo import GracePPOTrainer
from grace_rl.train.run_directory import RunDirectory
from grace_rl.train.sft import GraceSFTTrainer
from grace_rl.train.value_model import without_value_model

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

DONE, INTERRUPTED = 0, 130


def train(recipe: Recipe, *, overwrite: bool = False) -> int:
    """Run a recipe in its output directory, resuming what an earlier attempt left there.

    Returns:
        Exit code: 0 done, 130 interrupted with a checkpoint saved.

    Raises:
        UserError: The recipe, its rows, its rewards, its model or the output directory is wrong.
    """
    console = Console()
    args, model_config = recipe.training_arguments(), recipe.model_config()
    rows = read_rows(recipe.data)
    if recipe.method in RL_METHODS:
        rewards = load_rewards(recipe.rewards, recipe.path.parent)
        check_batches(args, Bundles(rows, parse_roles(args.roles, args.num_generations)), rewards)

    run = RunDirectory(args.output_dir, PartialState())
    opened = run.open(recipe.resolved(), overwrite=overwrite, seed=args.seed)
    args.output_dir = str(run.checkpoints)
    try:
        model, tokenizer = _load(model_config, args, run.path)
        common = {"processing_class": tokenizer, "peft_config": get_peft_config(model_config)}
        trainer: Any
        if recipe.method in RL_METHODS:
            trainer = (GracePPOTrainer if recipe.method == "ppo" else GraceGRPOTrainer)(
                model, args, rows, rewards, run_folder=run.path, console=console, **common
            )
        else:
            settings = recipe.training
            template = PromptTemplate(
                tokenizer,
                settings["instruction"],
                settings["max_text_tokens"],
                settings.get("chat_template_kwargs"),
            )
            trainer = GraceSFTTrainer(
                model, args, rows, template, reader=ReaderConfig(**settings["reader"]), **common
            )
        report = Report(recipe, run, trainer.encoder())
        report.before()
        with follow(
            trainer,
            run,
            console=console,
            steps_between_generations=getattr(args, "steps_between_generations", 1),
            stale_engine_threshold=getattr(args, "stale_engine_threshold", 0.1),
        ) as stop:
            trainer.train(resume_from_checkpoint=opened.checkpoint)
        if stop.interrupted:
            return INTERRUPTED
        report.after()
        run.publish_model(lambda folder: save_policy(trainer, folder))
        if run.is_main_process:
            report.show(console)
            console.print(f"The policy is in {run.model}", highlight=False, soft_wrap=True)
    finally:
        run.close()
    return DONE


def _load(model_config: ModelConfig, args: Any, folder: Path) -> Any:
    """Model and tokenizer, with what the recipe says about loading them."""
    keywords = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        "quantization_config": get_quantization_config(model_config),
    }
    if args.world_size > 1:
        keywords["device_map"] = None
    keywords |= args.model_init_kwargs or {}
    args.model_init_kwargs = None  # they have been used; TRL would warn that it ignores them
    path = resolve_model(str(model_config.model_name_or_path), folder, args.seed)
    return load_policy(path, **keywords)


def save_policy(trainer: Any, folder: Path) -> None:
    """Write a policy that transformers and vLLM load: an adapter is merged into its base model."""
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says it all
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload") and trainer.args.should_save:
        for file in folder.glob("adapter_*"):
            file.unlink()
        with without_value_model(model):
            model.merge_and_unload().save_pretrained(folder)


class Report:
    """Scores of the policy before and after training, in evaluation.json and on the screen.

    Without `evaluation` in the recipe it does nothing. The scores from before are kept when a run
    is resumed.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, encoder: RationaleEncoder) -> None:
        self.recipe = recipe
        self.run = run
        self.encoder = encoder
        self.content: dict[str, Any] = {}

    def before(self) -> None:
        if self.recipe.evaluation is None:
            return
        if self.run.evaluation.exists():
            self.content = json.loads(self.run.evaluation.read_text(encoding="utf-8"))
            return
        self.content = {"model": str(self.run.model), "rows": [], "examples": {}}
        rl = self.recipe.method in RL_METHODS
        self._add("cold_start" if rl else "untrained", "none")
        if rl:
            self._add("cold_start", "greedy")
        self.run.write_evaluation(self.content)

    def after(self) -> None:
        if self.recipe.evaluation is not None:
            self._add(self.recipe.method, "greedy")
            self.run.write_evaluation(self.content)

    def _add(self, name: str, rationale: Any) -> None:
        evaluation = self.recipe.evaluation
        assert evaluation is not None
        scores = score_policy(self.encoder, evaluation.dataset_splits, evaluation.rows, rationale)
        row = {"name": name, "rationale": rationale, "scores": scores}
        same = [r for r in self.content["rows"] if (r["name"], r["rationale"]) != (name, rationale)]
        self.content["rows"] = [*same, row]
        if rationale != "none":
            self.content["examples"][name] = example_rationales(self.encoder)

    def show(self, console: Console) -> None:
        """Print the table of scores and three rationales before and after."""
        if self.content:
            console.print(score_table(self.content["rows"]))
            console.print(rationale_table(self.content["examples"]))
