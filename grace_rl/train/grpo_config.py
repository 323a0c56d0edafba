"""Arguments of `GraceGRPOTrainer`: those of TRL's `GRPOConfig`, ours, and what must fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from trl import GRPOConfig

from grace_rl.credit.segments import ShapingConfig, shaping_problems
from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.data.false_negatives import FalseNegativeConfig
from grace_rl.embed.reading_config import ReadingConfig
from grace_rl.errors import UserError
from grace_rl.recipe.fields import Rule
from grace_rl.recipe.methods import named
from grace_rl.recipe.roles import Roles, batch_problems, default_roles, row_problems, trained_roles
from grace_rl.reward.loading import LoadedReward, build_rewards, load_rewards
from grace_rl.train.held import PROMPT, Held
from grace_rl.train.reader_loss import ReaderLossConfig, reader_loss_problems

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe
    from grace_rl.train.start import Build


def rollout_problems(config: GraceGRPOConfig) -> Iterator[str]:
    """What TRL would take, and rollouts cannot use."""
    if config.remove_unused_columns:
        yield "remove_unused_columns: would take the texts away from the rewards; leave it out"
    if config.auto_find_batch_size:
        yield "auto_find_batch_size: whole rows fill a batch, so it has one size; leave it out"
    if config.max_completion_length is None:
        yield "max_completion_length: must be at least 1, not None"
    if config.anchor_steps and all(role.train for role in config.roles.values()):
        yield "anchor_steps: has no effect without an anchor; give a role train: false"
    if config.sync_ref_model and config.beta == 0:
        yield "sync_ref_model: without a KL penalty there is no reference model; set beta above 0"


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
        anchor_steps: How many optimizer steps an anchor's rationale serves before it is written
            anew, where its row comes back; 0 writes anchors for every batch. Metric: `anchors/age`.
        segments: How many segments a rationale is cut into for rewards that return steps
            (`stepwise`), at least 1; 3 to 5 is usual. They are near-equal in tokens, and cut at a
            sentence end where one is near.
        segment_min_tokens: Shortest segment in tokens, at least 1; a rationale too short for
            `segments` of them is one segment.
        shaping: How the scores after each segment become advantages, see `ShapingConfig`.
        false_negatives: A guide that says which texts of other rows mean the same and must not
            count as negatives, see `FalseNegativeConfig`. `None` compares words only.
        reader_loss: A loss beside the rewards, by which the policy learns to read what it writes,
            see `ReaderLossConfig`. `None` has none.
        print_rollouts_steps: Print one group of rationales every so many steps; 0 never prints.
        panel_texts: About how many texts of the first rows are written for greedily before training
            and at every logged step, for `grace-rl inspect` to follow; never more than a step has
            rollouts. 0 writes none. `time/panel` says what it costs.
        stale_engine_threshold: Alarm level of `sampling/sampling_logp_difference/mean`, in nats.
        vllm_server_retry_timeout: Seconds to try again when the server of `vllm_mode: server` is
            lost; after that a checkpoint is saved and the run ends with exit code 75. Also how long
            one request may take. Above 0.
    """

    trainer: ClassVar[str] = "grace_rl.train.grpo:GraceGRPOTrainer"

    roles: Roles = field(default_factory=default_roles)
    anchor_temperature: Annotated[float, Field(gt=0)] | None = None
    anchor_steps: Annotated[int, Field(ge=0)] = 0
    segments: Annotated[int, Field(ge=1)] = 4
    segment_min_tokens: Annotated[int, Field(ge=1)] = 16
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    false_negatives: FalseNegativeConfig | None = None
    reader_loss: ReaderLossConfig | None = None
    print_rollouts_steps: Annotated[int, Field(ge=0)] = 10
    panel_texts: Annotated[int, Field(ge=0)] = 48
    stale_engine_threshold: Annotated[float, Field(gt=0)] = 0.1
    vllm_server_retry_timeout: Annotated[float, Field(gt=0)] = 600.0

    rules: ClassVar[tuple[Rule, ...]] = (batch_problems, rollout_problems, reader_loss_problems)

    @property
    def steps_between_generations(self) -> int:
        """Optimizer steps that one generation batch serves."""
        batches = (self.steps_per_generation or 1) * self.num_iterations
        return max(1, batches // self.gradient_accumulation_steps)

    def held(self, batch: int, text: int, rows: Sequence[Mapping[str, Any]]) -> Held:
        """See `TrainerConfig.held`."""
        tokens = text + PROMPT + (self.max_completion_length or 0)
        if self.reader_loss and self.reader.reads_alone:
            tokens += self.max_completion_length or 0  # read again
            tokens += text if self.reader.span == "joint" else 0
        return Held(batch, tokens)


def plan(recipe: Recipe, args: GraceGRPOConfig, rows: list[dict[str, Any]]) -> Build:
    """See `grace_rl.recipe.methods.Method`. The trainer is imported when it is built."""
    rewards = load_rewards(recipe.rewards, recipe.path.parent)
    check_rollouts(args, rows, rewards)
    build_rewards(rewards)
    return lambda start: start.trainer(
        named(args.trainer),
        rows,
        rewards=rewards,
        run_folder=start.run_folder,
        console=start.console,
    )


def check_rollouts(
    args: GraceGRPOConfig, rows: list[dict[str, Any]], rewards: Sequence[LoadedReward]
) -> Bundles:
    """The bundles of rows that fill a generation batch, for rewards that fit the config.

    Raises:
        UserError: There are too few rows, or the rewards cannot be used.
    """
    bundles = Bundles(rows, parse_roles(args.roles, args.num_generations or 0))
    problems = reward_problems(args, rewards)
    problems += row_problems(args, len(rows), "per_device_train_batch_size")
    if problems:
        raise UserError(problems)
    return bundles


def reward_problems(args: Any, rewards: Sequence[LoadedReward]) -> list[str]:
    """What keeps rewards from having an effect, each as `key: what to do`."""
    problems = shaping_problems(args, rewards)
    trained = trained_roles(args.roles)
    for i, reward in enumerate(rewards):
        if reward.trained_roles and set(trained) not in map(set, reward.trained_roles):
            ways = " or ".join(" and ".join(roles) for roles in reward.trained_roles)
            problems.append(
                f"rewards[{i}]: {reward.label} scores rollouts of {ways} alone, but the trained "
                f"roles are {', '.join(trained)}; give the others train: false"
            )
    gates = [reward.label for reward in rewards if reward.gates and reward.weight]
    if gates and args.multi_objective_aggregation == "normalize_then_sum":
        problems.append(
            f"multi_objective_aggregation: normalize_then_sum forms no totals for the gate "
            f"{', '.join(gates)} to act on; use sum_then_normalize"
        )
    weights = args.reward_weights
    weights = [reward.weight for reward in rewards] if weights is None else weights
    if len(weights) != len(rewards):
        problems.append(
            f"reward_weights: has {len(weights)} numbers for {len(rewards)} rewards; "
            "better give each reward its weight"
        )
    if not any(weights) and args.reader_loss is None:
        problems.append("rewards: all weights are 0, so nothing is trained; give one a weight")
    return problems
