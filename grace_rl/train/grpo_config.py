"""Arguments of `GraceGRPOTrainer`: those of TRL's `GRPOConfig`, ours, and what must fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl import GRPOConfig

from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.errors import UserError
from grace_rl.recipe.methods import named
from grace_rl.reward.loading import LoadedReward, build_rewards, load_rewards
from grace_rl.train.reading_config import ReadingConfig

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe
    from grace_rl.train.start import Build, Start


def _default_roles() -> dict[str, dict[str, Any]]:
    return {"query": {}, "positive": {}, "negative": {"train": False}}


@dataclass
class GraceGRPOConfig(ReadingConfig, GRPOConfig):  # type: ignore[misc]  # TRL takes JSON text too
    """TRL's `GRPOConfig` and `ReadingConfig`; every TRL field keeps its name and meaning.

    Args:
        roles: Which texts of a row get rationales, `{role: {samples: int, train: bool}}`. Roles are
            `query`, `positive`, `negative`, `negative_positive` (supervised rows) or `text`,
            `anchor` (unsupervised rows). `train: true` (default) rolls the text out
            `num_generations` times and updates the policy on it. `train: false` makes an anchor:
            `samples` rationales (default 1) are written once per row and batch, scored against and
            never updated.
        anchor_temperature: Sampling temperature of anchors, above 0; `None` is the rollouts' own.
            GRACE uses 0.5.
        segments: How many segments a rationale is cut into for rewards that return steps
            (`stepwise`), at least 1; 3 to 5 is usual. They are near-equal in tokens, and cut at a
            sentence end where one is near.
        segment_min_tokens: Shortest segment in tokens, at least 1; a rationale too short for
            `segments` of them is one segment.
        shaping: Keywords of `grace_rl.credit.segments.ShapingConfig`: how the scores after each
            segment become advantages.
        false_negatives: Keywords of `grace_rl.data.false_negatives.FalseNegativeConfig`: a guide
            that says which texts of other rows mean the same and must not count as negatives.
            `None` compares words only.
        reader_loss: Keywords of `grace_rl.train.reader_loss.ReaderLossConfig`: a
            loss beside the rewards, by which the policy learns to read what it writes. `None` has
            none.
        print_rollouts_steps: Print one group of rationales every so many steps; 0 never prints.
        stale_engine_threshold: Alarm level of `sampling/sampling_logp_difference/mean`, in nats.
        vllm_server_retry_timeout: Seconds to try again when the server of `vllm_mode: server` is
            lost; after that a checkpoint is saved and the run ends with exit code 75. Also how long
            one request may take. Above 0.
    """

    trainer: ClassVar[str] = "grace_rl.train.grpo:GraceGRPOTrainer"

    roles: dict[str, Any] = field(default_factory=_default_roles)
    anchor_temperature: float | None = None
    segments: int = 4
    segment_min_tokens: int = 16
    shaping: dict[str, Any] = field(default_factory=dict)
    false_negatives: dict[str, Any] | None = None
    reader_loss: dict[str, Any] | None = None
    print_rollouts_steps: int = 10
    stale_engine_threshold: float = 0.1
    vllm_server_retry_timeout: float = 600.0

    @property
    def steps_between_generations(self) -> int:
        """Optimizer steps that one generation batch serves."""
        if self.steps_per_generation is None:  # TRL's config fills it in
            raise RuntimeError("steps_per_generation must be there")
        batches = self.steps_per_generation * self.num_iterations
        return max(1, batches // self.gradient_accumulation_steps)


def plan(recipe: Recipe, args: GraceGRPOConfig, rows: list[dict[str, Any]]) -> Build:
    """See `grace_rl.recipe.methods.Method`. The trainer is imported when it is built."""
    rewards = load_rewards(recipe.rewards, recipe.path.parent)
    if args.num_generations is None:  # TRL's config compares it with 2
        raise RuntimeError("args.num_generations must be there")
    check_batches(args, Bundles(rows, parse_roles(args.roles, args.num_generations)), rewards)
    build_rewards(rewards)

    def build(start: Start) -> Any:
        model, tokenizer = start.load_policy()
        return named(args.trainer)(
            model,
            args,
            rows,
            rewards,
            processing_class=tokenizer,
            peft_config=start.peft_config,
            run_folder=start.run_folder,
            console=start.console,
        )

    return build


def check_batches(args: GraceGRPOConfig, bundles: Bundles, rewards: Sequence[LoadedReward]) -> None:
    """Whole bundles must fill a generation batch, and there must be rows for one.

    Raises:
        UserError: With the arithmetic that does not work out.
    """
    # TRL's config compares the one with 2, and has worked the other out.
    if args.num_generations is None or args.generation_batch_size is None:
        raise RuntimeError("args.num_generations and args.generation_batch_size must be there")
    problems = []
    bundle = len(bundles.trained) * args.num_generations
    rows, rest = divmod(args.generation_batch_size, bundle)
    if rest:
        problems.append(
            f"generation_batch_size = {args.generation_batch_size} must be a multiple of "
            "trained roles x "
            f"num_generations = {len(bundles.trained)} x {args.num_generations} = {bundle}"
        )
    elif rows > len(bundles.rows):
        problems.append(
            f"a generation batch takes {rows} rows "
            f"(generation_batch_size {args.generation_batch_size} / {bundle}), "
            f"but there are only {len(bundles.rows)}; "
            "lower per_device_train_batch_size or give more rows"
        )
    for key in ("temperature", "anchor_temperature"):
        value = getattr(args, key)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"{key} = {value} must be a number above 0")
    between = args.steps_between_generations
    if args.save_strategy == "steps" and args.save_steps >= 1 and args.save_steps % between:
        problems.append(
            f"save_steps = {args.save_steps:g} must be a multiple of the {between} optimizer steps "
            "that one generation batch serves: a checkpoint between them would lose its rest"
        )
    gates = [reward.label for reward in rewards if reward.gates]
    if gates and args.multi_objective_aggregation == "normalize_then_sum":
        problems.append(
            f"rewards {', '.join(gates)} are gates: they place a rollout below the totals of its "
            "group, which multi_objective_aggregation: normalize_then_sum does not form; "
            "use sum_then_normalize"
        )
    if problems:
        raise UserError(problems)
