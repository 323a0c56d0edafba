"""Who gets credit, and does it help? Step-wise shaping against one advantage per rationale.

    python benchmarks/credit.py tabular                       # exact gradients on a small tree
    python benchmarks/credit.py scenes --seeds 0 1 2 --jobs 3 # the table of docs/results.md, hours
    python benchmarks/credit.py noise --after 0               # of gradients, on the same rollouts
    python benchmarks/credit.py overhead                      # seconds per step, with and without

`tabular` samples groups of 8 from a policy over 3 actions and 5 steps whose gradient is known by
enumeration. `noise` gives several kinds of credit to the same rollouts of
one policy. `scenes` trains every row of ROWS with every seed on the same number of rollouts, each
in a process with one thread, and keeps what it has finished: started again it goes on. `overhead`
alternates two trainers in one process and prints the ratio of their steps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grace_rl.credit.by_segment import prefix_columns
from grace_rl.credit.calibration import Calibration
from grace_rl.credit.segments import shape_advantages, to_tokens
from grace_rl.data.rows import read_rows
from grace_rl.errors import UserError
from grace_rl.evaluate.scenes import score_policy
from grace_rl.recipe import load_recipe
from grace_rl.reward.loading import load_rewards
from grace_rl.rollout.policy import load_policy, resolve_model
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.ppo import GracePPOTrainer

PLAIN = "recipes/quickstart.yaml"
STEPS = "recipes/quickstart-stepwise.yaml"
PPO = "recipes/quickstart-ppo.yaml"
POTENTIAL = "{name: stepwise, potential: {name: contrastive, temperature: 0.1}"
LENGTH = "{name: length, weight: 1.0}"
CONTRASTIVE = "{name: contrastive, temperature: 0.1}"
CUTS = ["--segments", "4", "--segment_min_tokens", "2"]
WATCHED = ["--rewards", f"[{CONTRASTIVE}, {LENGTH}, {POTENTIAL}, weight: 0}}]", *CUTS]
STEPWISE = ["--rewards", f"[{POTENTIAL}}}, {LENGTH}]", *CUTS]

# name -> recipe, overrides. A row that is not step-wise only logs the scores of prefixes.
ROWS: dict[str, tuple[str, list[str]]] = {
    "GRPO": (PLAIN, WATCHED),
    "lambda 1": (STEPS, ["--shaping", "{gae_lambda: 1.0, calibrate: false}"]),
    "lambda 1 calibrated": (STEPS, ["--shaping", "{gae_lambda: 1.0}"]),
    "lambda 0.9 calibrated": (STEPS, ["--shaping", "{gae_lambda: 0.9}"]),
    "lambda 0.5": (STEPS, ["--shaping", "{gae_lambda: 0.5, calibrate: false}"]),
    "lambda 0": (STEPS, ["--shaping", "{gae_lambda: 0.0, calibrate: false}"]),
    "penalty 0.2": (STEPS, ["--shaping", "{gae_lambda: 0.9, penalty: 0.2}"]),
    "PPO": (PPO, WATCHED),
    "PPO step-wise": (PPO, STEPWISE),
}
SCORES = ("recall_at_1", "triplet_accuracy", "spearman", "coverage")
TARGET = "triplet_accuracy"


# -- (a) exact gradients on a tree ---------------------------------

DEPTH, ACTIONS, GROUP = 5, 3, 8
BAD = 1.5  # noise that makes a potential a bad one: the final score's own deviation is about 1


class Tree:
    """A policy with a table of logits, and a score for every prefix of actions.

    A score is its parent's plus a step of its own, so that a prefix says something about the end.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [ACTIONS**k for k in range(DEPTH + 1)]
        self.first = [
            sum(counts[:k]) for k in range(DEPTH + 1)
        ]  # number of each level's first node
        self.logits = torch.randn(sum(counts[:-1]), ACTIONS, generator=generator).double()
        scores = [torch.zeros(1).double()]
        for count in counts[1:]:
            step = 0.5 * torch.randn(count, generator=generator).double()
            scores.append(scores[-1].repeat_interleave(ACTIONS) + step)
        self.scores = torch.cat(scores)

    def nodes(self, actions: Tensor) -> Tensor:
        """(N, DEPTH) actions -> (N, DEPTH + 1) numbers of the nodes that they pass."""
        place = torch.zeros(len(actions), 1, dtype=torch.long)
        for k in range(DEPTH):
            place = torch.cat([place, place[:, -1:] * ACTIONS + actions[:, k : k + 1]], dim=1)
        return place + torch.tensor(self.first)

    def gradient(self, nodes: Tensor, actions: Tensor, credit: Tensor) -> Tensor:
        """(G, nodes * ACTIONS) gradients of the mean of log-probability times credit, one for each
        of G equally large blocks of rows."""
        direction = -self.logits.softmax(1)[nodes[:, :-1]]  # (N, DEPTH, ACTIONS)
        direction.scatter_add_(2, actions[:, :, None], torch.ones_like(direction[..., :1]))
        direction = direction * credit[:, :, None]
        blocks = len(nodes) // GROUP
        flat = torch.zeros(blocks, self.logits.numel(), dtype=torch.double)
        where = nodes[:, :-1, None] * ACTIONS + torch.arange(ACTIONS)
        flat.scatter_add_(1, where.reshape(blocks, -1), direction.reshape(blocks, -1))
        return flat / GROUP

    def exact(self) -> Tensor:
        """The gradient of the expected final score, by enumeration."""
        actions = torch.tensor(list(itertools.product(range(ACTIONS), repeat=DEPTH)))
        nodes = self.nodes(actions)
        logits = self.logits.clone().requires_grad_()
        chance = logits.log_softmax(1)[nodes[:, :-1], actions].sum(1).exp()
        (chance * self.scores[nodes[:, -1]]).sum().backward()
        assert logits.grad is not None
        return logits.grad.flatten()

    def sample(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Nodes and actions of so many rows."""
        generator = torch.Generator().manual_seed(seed)
        place = torch.zeros(count, dtype=torch.long)
        actions = []
        for k in range(DEPTH):
            chance = self.logits.softmax(1)[place + self.first[k]]
            actions.append(chance.multinomial(1, generator=generator)[:, 0])
            place = place * ACTIONS + actions[-1]
        stacked = torch.stack(actions, dim=1)
        return self.nodes(stacked), stacked


def tabular(options: argparse.Namespace, console: Console) -> int:
    """Cosine and error of the mean gradient, and the variance of one group's, by estimator."""
    tree, rows = Tree(options.seed), options.groups * GROUP
    exact = tree.exact()
    nodes, actions = tree.sample(rows, options.seed + 1)
    group = torch.arange(options.groups).repeat_interleave(GROUP)
    ends = torch.arange(DEPTH + 1).expand(rows, -1)
    uncut = torch.cat([ends[:, :1], ends[:, -1:].expand(-1, DEPTH)], dim=1)
    found: dict[str, list[tuple[float, float, float]]] = {}
    betas = []
    past, _ = tree.sample(rows, options.seed + 2)
    for on_prefixes, on_final in ((0.0, 0.0), (options.noise, options.noise), (BAD, 0.0)):
        noise = torch.full((DEPTH + 1,), on_prefixes).double()
        noise[0], noise[-1] = 0.0, on_final
        generator = torch.Generator().manual_seed(options.seed + 3)
        scores, other = (
            tree.scores[n] + noise * torch.randn(n.shape, generator=generator)
            for n in (nodes, past)
        )
        calibration = Calibration()
        calibration.update(other, ends, group)
        betas.append(", ".join(f"{slope:.2f}" for slope in calibration.slopes.tolist()))
        fitted = {"slopes": calibration.slopes, "intercepts": calibration.intercepts}
        for name, cuts, decay, keywords in (
            ("GRPO", uncut, 1.0, {}),
            ("lambda 1", ends, 1.0, {}),
            ("lambda 1, calibrated", ends, 1.0, fitted),
            ("lambda 0.9, calibrated", ends, 0.9, fitted),
            ("lambda 0.5", ends, 0.5, {}),
            ("lambda 0.5, calibrated", ends, 0.5, fitted),
            ("lambda 0", ends, 0.0, {}),
            ("lambda 0, calibrated", ends, 0.0, fitted),
        ):
            credit = shape_advantages(
                scores, cuts, scores[:, -1], group, gae_lambda=decay, scale="none", **keywords
            )
            credit = credit * GROUP / (GROUP - 1)  # the mean of the others, not of all
            gradients = tree.gradient(nodes, actions, credit)
            mean = gradients.mean(0)
            cosine = float(torch.nn.functional.cosine_similarity(mean, exact, dim=0))
            error = float((mean - exact).norm() / exact.norm())
            variance = float(((gradients - mean) ** 2).sum(1).mean())
            found.setdefault(name, []).append((cosine, error, variance))

    table = Table(
        title=f"{options.groups} groups of {GROUP}, {DEPTH} steps of {ACTIONS} actions; "
        f"noise {options.noise} on every score, or {BAD} on those of prefixes, in the last columns",
        title_justify="left",
    )
    columns = ("cosine to exact", "relative error", "variance", "with noise", "bad potential")
    for column in ("estimator", *columns):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, ((cosine, error, variance), (_, _, noisy), (_, _, bad)) in found.items():
        numbers = (f"{cosine:.3f}", f"{error:.2f}", *(f"{v:.3f}" for v in (variance, noisy, bad)))
        table.add_row(name, *numbers)
    console.print(table)
    console.print(f"beta_2 ... beta_{DEPTH}: {'; '.join(betas)}", highlight=False)
    plain, shaped = found["GRPO"], found["lambda 1"]
    fit, short = found["lambda 1, calibrated"], found["lambda 0.5"]
    console.print(
        verdicts(
            {
                "lambda 1 is unbiased (cosine and error as GRPO's)": (
                    abs(shaped[0][0] - plain[0][0]) < 0.005 and shaped[0][1] < 2 * plain[0][1]
                ),
                "lambda 1 has less variance than GRPO": shaped[0][2] < plain[0][2],
                "calibrated it has no more than without": fit[0][2] <= 1.01 * shaped[0][2],
                "with noise too": fit[1][2] <= 1.01 * min(shaped[1][2], plain[1][2]),
                "a bad potential (beta below 0.5) makes lambda 1 noisier than GRPO": (
                    shaped[2][2] > plain[2][2]
                ),
                "and calibrated it does not": fit[2][2] <= 1.01 * plain[2][2],
                "lambda 0.5 trades bias for less variance": (
                    short[0][1] > shaped[0][1] and short[0][2] < 0.7 * shaped[0][2]
                ),
            }
        )
    )
    return 0


# -- (b) training on scenes ---------------------------------


@dataclass(frozen=True)
class Probe:
    """What a run writes down.

    Attributes:
        batches: How many batches of rollouts it trains on.
        every: Score and probe gradients every so many batches.
        rows: Held-out rows that are scored.
    """

    batches: int
    every: int
    rows: int


def build_trainer(name: str, seed: int, folder: str, **settings: Any) -> Any:
    """The trainer of a row, that writes nothing but its log."""
    path, overrides = ROWS[name]
    fixed = ["--seed", str(seed), "--save_strategy", "no", "--logging_steps", "1"]
    fixed += ["--print_rollouts_steps", "0", "--evaluation", "null", "--report_to", "none"]
    more = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    output = ["--output_dir", folder, "--disable_tqdm", "true"]
    recipe = load_recipe(path, [*overrides, *fixed, *more, *output])
    args = recipe.training_arguments()
    model, tokenizer = load_policy(
        resolve_model(str(recipe.model["model_name_or_path"]), Path(folder)), dtype=torch.float32
    )
    kind = GracePPOTrainer if recipe.method == "ppo" else GraceGRPOTrainer
    rewards = load_rewards(recipe.rewards, recipe.path.parent)
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
    return kind(
        model, args, read_rows(recipe.data), rewards, processing_class=tokenizer, console=quiet
    )


def run_row(name: str, seed: int, probe: Probe) -> dict[str, Any]:
    """Train one row with one seed; returns its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(name, seed, folder)
        per_batch = trainer.args.steps_per_generation * trainer.args.num_iterations
        per_batch //= trainer.args.gradient_accumulation_steps
        trainer.args.max_steps = probe.batches * per_batch
        curve: list[dict[str, float]] = []
        cosines: list[float] = []
        seconds: list[float] = []

        def score(batch: int) -> None:
            curve.append({"batch": batch} | score_policy(trainer.encoder(), ["test"], probe.rows))

        compute, step = trainer._compute_loss, trainer.training_step
        probing = False

        def probed_loss(model: Any, inputs: dict[str, Any]) -> Tensor:
            if probing:
                pair = half_batch_gradients(trainer, compute, model, inputs)
                cosines.append(float(torch.nn.functional.cosine_similarity(*pair, dim=0)))
            return compute(model, inputs)

        def timed_step(*given: Any, **keywords: Any) -> Tensor:
            nonlocal probing
            done = trainer.state.global_step
            probing = done % (probe.every * per_batch) == 0
            if probing:
                score(done // per_batch)
            start = time.perf_counter()
            loss = step(*given, **keywords)
            if not probing:
                seconds.append(time.perf_counter() - start)
            return loss

        trainer._compute_loss, trainer.training_step = probed_loss, timed_step
        trainer.train()
        score(probe.batches)
    log = [entry for entry in trainer.state.log_history if "shaping/gain" in entry]
    watched = [key for key in log[-1] if key.startswith("shaping/")] + ["completions/mean_length"]
    last = log[-len(log) // 3 :]
    return {
        "curve": curve,
        "noise": cosines,
        "seconds_per_batch": statistics.mean(seconds) * per_batch,
        "watched": {
            key: statistics.mean(entry[key] for entry in last if key in entry) for key in watched
        },
    }


def half_batch_gradients(
    trainer: Any, compute: Callable[..., Tensor], model: Any, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The policy gradients of two halves of a batch; a group is never split."""
    _, text = torch.unique(inputs["prompt_ids"], dim=0, return_inverse=True)
    metrics = copy.deepcopy(trainer._metrics)
    value_weight = getattr(trainer.args, "vf_coef", None)
    if value_weight is not None:
        trainer.args.vf_coef = 0.0
    halves = []
    for half in (0, 1):
        rows = text % 2 == half
        part = {
            key: value[rows] if value.dim() and len(value) == len(rows) else value
            for key, value in inputs.items()
        }
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(compute(model, part), parameters, allow_unused=True)
        halves.append(torch.cat([g.flatten() for g in found if g is not None]))
    trainer._metrics = metrics
    if value_weight is not None:
        trainer.args.vf_coef = value_weight
    return halves[0], halves[1]


KINDS: dict[str, tuple[float, bool] | None] = {  # name -> lambda, calibrated; None: TRL's own
    "GRPO": None,
    "lambda 1": (1.0, False),
    "lambda 1 calibrated": (1.0, True),
    "lambda 0.9 calibrated": (0.9, True),
    "lambda 0.5 calibrated": (0.5, True),
    "lambda 0.5": (0.5, False),
    "lambda 0": (0.0, False),
}


def noise(options: argparse.Namespace, console: Console) -> int:
    """How much of a half batch's gradient is signal, and where it points.

    With g and h the gradients of two halves of a batch, the signal is E[g h] / E[g g]; the
    direction is the cosine of two expected gradients, E[g h'] / sqrt(E[g h] E[g' h']) against
    GRPO's, which needs no expected gradient itself.
    """
    torch.set_num_threads(1)
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer("lambda 1 calibrated", options.seed, folder, max_steps=10_000)
        step = stepper(trainer)
        for _ in range(max(options.after, 1)):  # at least one batch to calibrate with
            step(learn=options.after > 0)
        tables = []
        trainer.give_credit = lambda rollouts, _: tables.append(rollouts.trained_rows) or rollouts
        batches = iter(trainer.get_train_dataloader())
        for _ in range(options.batches):
            output = trainer._generate_and_score_completions(next(batches))
            (scores, ends, group), totals = prefix_columns(tables[-1]), tables[-1].totals.cpu()
            width = output["completion_mask"].size(1)
            for name, kind in KINDS.items():
                if kind is not None:
                    fitted = trainer.credit.calibration if kind[1] else Calibration()
                    credit = shape_advantages(
                        scores, ends, totals, group,
                        gae_lambda=kind[0], slopes=fitted.slopes, intercepts=fitted.intercepts,
                    )  # fmt: skip
                    output = output | {"advantages": to_tokens(credit, ends, width)}
                halves[name].append(
                    half_batch_gradients(trainer, trainer._compute_loss, trainer.model, output)
                )
            trainer.credit.learn(tables[-1])
    table = Table(
        title=f"{options.batches} batches of rollouts of the policy after {options.after} steps, "
        "halves of 96; mean and standard error",
        title_justify="left",
    )
    for column in ("credit", "signal share", "ratio to GRPO's", "direction, cosine to GRPO's"):
        table.add_column(column, justify="left" if column == "credit" else "right")
    dot = {name: torch.stack([g @ h for g, h in pairs]) for name, pairs in halves.items()}
    own = {n: torch.stack([(g @ g + h @ h) / 2 for g, h in pairs]) for n, pairs in halves.items()}
    plain = halves["GRPO"]
    shares = {}
    for name, pairs in halves.items():
        cross = [(g @ b + h @ a) / 2 for (g, h), (a, b) in zip(pairs, plain, strict=True)]
        direction = torch.stack(cross).mean() / (dot[name].mean() * dot["GRPO"].mean()).sqrt()
        share = shares[name] = float(dot[name].mean() / own[name].mean())
        error = float(dot[name].std() / own[name].mean()) / options.batches**0.5
        ratio = f"{share / shares['GRPO']:.2f}"
        table.add_row(name, f"{share:.4f} +- {error:.4f}", ratio, f"{float(direction):.3f}")
    console.print(table)
    betas = ", ".join(f"{slope:.2f}" for slope in trainer.credit.calibration.slopes.tolist())
    console.print(f"beta_2 ...: {betas}", highlight=False)
    return 0


def scenes(options: argparse.Namespace, console: Console) -> int:
    """Train what is not there yet, then print the table."""
    probe = Probe(options.batches, options.every, options.rows)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in options.seeds for name in options.only or ROWS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda task: ensure_run(*task, probe, options.output), wanted)
        failed = [name for (name, seed), ok in zip(wanted, done, strict=True) if not ok]
    results = {
        name: runs
        for name in options.only or ROWS
        if (runs := [r for s in options.seeds if (r := kept(options.output, name, s, probe))])
    }
    if results:
        report(results, probe, console)
    if failed:
        console.print(f"failed, see the logs in {options.output}: {', '.join(failed)}")
    return 1 if failed else 0


def result_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '-')}-seed-{seed}.json"


def settings_of(name: str, probe: Probe) -> list[Any]:
    return [*ROWS[name], probe.batches, probe.every, probe.rows]


def kept(folder: Path, name: str, seed: int, probe: Probe) -> dict[str, Any] | None:
    """A finished run, if it was made with these settings."""
    path = result_file(folder, name, seed)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == settings_of(name, probe) else None


def ensure_run(name: str, seed: int, probe: Probe, folder: Path) -> bool:
    """Make a run in a process of its own unless it is there; returns whether it is now."""
    if kept(folder, name, seed, probe):
        return True
    command = [sys.executable, __file__, "one", "--name", name, "--seed", str(seed)]
    command += ["--batches", str(probe.batches), "--every", str(probe.every)]
    command += ["--rows", str(probe.rows), "--output", str(folder)]
    print(f"training {name}, seed {seed}", flush=True)
    with (folder / f"{name.replace(' ', '-')}-seed-{seed}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    return kept(folder, name, seed, probe) is not None


def one(options: argparse.Namespace, console: Console) -> int:
    """The process of one run."""
    torch.set_num_threads(1)
    probe = Probe(options.batches, options.every, options.rows)
    result = run_row(options.name, options.seed, probe)
    result["settings"] = settings_of(options.name, probe)
    path = result_file(options.output, options.name, options.seed)
    path.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
    path.with_suffix(".part").replace(path)
    return 0


def report(results: dict[str, list[dict[str, Any]]], probe: Probe, console: Console) -> None:
    best = max(final(run, TARGET) for runs in results.values() for run in runs)
    seeds = max(map(len, results.values()))
    table = Table(
        title=f"{seeds} seeds, {probe.batches} batches of rollouts, {probe.rows} held-out rows; "
        f"mean (lowest to highest); 90% is of the best {TARGET}, {best:.3f}",
        title_justify="left",
    )
    table.add_column("row")
    columns = (*SCORES, "batches to 90%", "half-batch cosine", "P(r >= 0)", "length", "s / batch")
    for column in columns:
        table.add_column(column, justify="right")
    for name, runs in results.items():
        cells = [spread([final(run, score) for run in runs]) for score in SCORES]
        reached = [batches_to(run, 0.9 * best) for run in runs]
        cells.append(", ".join("-" if b is None else str(b) for b in reached))
        cells.append(spread([statistics.mean(run["noise"]) for run in runs]))
        cells.append(spread([run["watched"]["shaping/share_not_worse"] for run in runs]))
        cells.append(spread([run["watched"]["completions/mean_length"] for run in runs], 1))
        cells.append(spread([run["seconds_per_batch"] for run in runs], 2))
        table.add_row(name, *cells)
    console.print(table)
    betas = {
        name: {
            key: statistics.mean(run["watched"][key] for run in runs)
            for key in runs[0]["watched"]
            if "beta" in key and all(key in run["watched"] for run in runs)
        }
        for name, runs in results.items()
    }
    for name, found in betas.items():
        listed = ", ".join(f"{key.partition('/')[2]} {value:.2f}" for key, value in found.items())
        console.print(f"{name}, last third: {listed}", highlight=False)
    console.print(verdicts(predictions(results)))


def predictions(results: dict[str, list[dict[str, Any]]]) -> dict[str, bool | None]:
    """What was predicted before anything was run; None where a row is missing."""

    def mean(name: str, of: Callable[[dict[str, Any]], float]) -> float | None:
        return statistics.mean(map(of, results[name])) if name in results else None

    def holds(check: Callable[..., bool], *numbers: float | None) -> bool | None:
        return None if None in numbers else check(*numbers)

    names = ("GRPO", "lambda 1", "lambda 0.9 calibrated", "lambda 0.5", "penalty 0.2")
    end = [mean(name, lambda run: final(run, TARGET)) for name in names]
    cosine = [mean(name, lambda run: statistics.mean(run["noise"])) for name in names]
    early = [mean(name, lambda run: area(run, 1 / 3)) for name in names]
    better = [mean(name, lambda run: run["watched"]["shaping/share_not_worse"]) for name in names]
    return {
        "lambda 1 ends where GRPO does (within 0.03)": holds(
            lambda a, b: abs(a - b) < 0.03, end[0], end[1]
        ),
        "and its gradient is less noisy": holds(lambda a, b: b > a, cosine[0], cosine[1]),
        "lambda 0.9 calibrated is faster early": holds(lambda a, b: b > a, early[0], early[2]),
        "lambda 0.5 is faster early": holds(lambda a, b: b > a, early[0], early[3]),
        "the penalty makes fewer segments worse": holds(lambda a, b: b > a, better[2], better[4]),
        "at a cost below 0.5%": holds(lambda a, b: b > 0.995 * a, end[2], end[4]),
    }


def final(run: dict[str, Any], score: str) -> float:
    """The mean of the last two scorings."""
    return statistics.mean(point[f"scenes/{score}"] for point in run["curve"][-2:])


def area(run: dict[str, Any], share: float) -> float:
    """Mean of the target score over the first part of training."""
    points = [
        point for point in run["curve"] if point["batch"] <= share * run["curve"][-1]["batch"]
    ]
    return statistics.mean(point[f"scenes/{TARGET}"] for point in points)


def batches_to(run: dict[str, Any], target: float) -> int | None:
    reached = (p["batch"] for p in run["curve"] if p[f"scenes/{TARGET}"] >= target)
    return next(reached, None)


def spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdicts(checks: dict[str, bool | None]) -> str:
    words = {True: "held", False: "did not hold", None: "not measured"}
    return "\n".join(f"{words[result]}: {name}" for name, result in checks.items())


# -- (c) what it costs ---------------------------------


def overhead(options: argparse.Namespace, console: Console) -> int:
    """Seconds per step with segments' credit over without, steps alternated in one process.

    Both see the same rows, start from the same policy, and are at a learning rate of 0, so that
    rationales stay equally long.
    """
    torch.set_num_threads(1)
    names = {"plain": "GRPO", "step-wise": "lambda 0.9 calibrated"}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"learning_rate": 1e-30, "max_steps": 10_000}
        plain = ["--rewards", f"[{CONTRASTIVE}, {LENGTH}]"]
        ROWS["GRPO"] = (PLAIN, plain)  # without watching prefixes
        trainers = {
            kind: build_trainer(name, 0, folder, **settings) for kind, name in names.items()
        }
        steps = {kind: stepper(trainer) for kind, trainer in trainers.items()}
        times: dict[str, list[float]] = {kind: [] for kind in names}
        for number in range(options.steps + 2):
            order = list(names) if number % 2 else list(names)[::-1]
            for kind in order:
                torch.manual_seed(number)  # the same rationales
                start = time.process_time()
                steps[kind]()
                if number >= 2:  # warm
                    times[kind].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(times["plain"], times["step-wise"], strict=True)]
    ratio = statistics.median(ratios)
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
    for kind, found in times.items():
        console.print(f"{kind}: {statistics.median(found):.4f} s of CPU time per step")
    console.print(
        f"step-wise / plain, median of {len(ratios)} pairs: {ratio:.4f} +- {error:.4f} "
        f"({'within' if ratio < 1.02 else 'above'} 2%)"
    )
    return 0 if ratio < 1.02 else 1


def stepper(trainer: Any) -> Callable[..., None]:
    """One training step of a trainer at a time: rollouts, rewards, backward, optimizer."""
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batches = iter(trainer.get_train_dataloader())

    def step(learn: bool = True) -> None:
        trainer.training_step(trainer.model, next(batches), None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        if learn:
            trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    kind = kinds.add_parser("tabular")
    kind.add_argument("--groups", type=int, default=6000)
    kind.add_argument("--noise", type=float, default=0.3)
    kind.add_argument("--seed", type=int, default=0)
    kind.set_defaults(run=tabular)
    for name, run in (("scenes", scenes), ("one", one)):
        kind = kinds.add_parser(name)
        kind.add_argument("--batches", type=int, default=120, help="batches of rollouts")
        kind.add_argument("--every", type=int, default=10, help="batches between scorings")
        kind.add_argument("--rows", type=int, default=200, help="held-out rows")
        kind.add_argument("--output", type=Path, default=Path("runs/credit"))
        if name == "scenes":
            kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            kind.add_argument("--only", nargs="+", choices=list(ROWS), help="these rows")
            kind.add_argument("--jobs", type=int, default=3)
        else:
            kind.add_argument("--name", choices=list(ROWS), required=True)
            kind.add_argument("--seed", type=int, required=True)
        kind.set_defaults(run=run)
    kind = kinds.add_parser("noise")
    kind.add_argument("--after", type=int, default=0, help="training steps before it is measured")
    kind.add_argument("--batches", type=int, default=30)
    kind.add_argument("--seed", type=int, default=0)
    kind.set_defaults(run=noise)
    kind = kinds.add_parser("overhead")
    kind.add_argument("--steps", type=int, default=40)
    kind.set_defaults(run=overhead)
    options = parser.parse_args()
    try:
        return int(options.run(options, Console(width=200)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
