"""grace-rl replay RUN --rewards FILE"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_rl.errors import UserError

if TYPE_CHECKING:
    from grace_rl.reward.replay import ReplayedGroup

HELP = "score the rollouts of a run again with other rewards, and show what would have changed"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--rewards",
        metavar="FILE",
        help="a recipe, or YAML with its `rewards`; what it names is run. The default: the run's "
        "own rewards, where they are installed ones by name",
    )
    parser.add_argument("--steps", metavar="N", type=int, nargs="+", help="only these steps")
    parser.add_argument(
        "--show", metavar="N", type=int, default=3, help="groups to show whole (default: 3)"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from rich.progress import track

    from grace_rl.recipe import read_rewards
    from grace_rl.reward import load_rewards
    from grace_rl.reward.consent import run_rewards
    from grace_rl.reward.replay import replay, replay_table, replayed_groups, write_replay
    from grace_rl.rollout.store import rollout_files
    from grace_rl.run.screen import Screen

    folder = Path(options.run)
    steps = sorted(set(options.steps or rollout_files(folder)))
    if options.show < 0:
        raise UserError("--show: must be at least 0")
    if options.rewards is None:
        rewards, name = load_rewards(run_rewards(folder), folder), "own"
    else:
        path = Path(options.rewards)
        rewards, name = load_rewards(read_rewards(path), path.parent), path.stem
    console = Screen()
    tables, groups = [], []
    replayed = replay(folder, rewards, steps)
    for before, after in track(replayed, "replaying", total=len(steps), console=console):
        tables.append(replay_table(before, after))
        groups += replayed_groups(before, after)
    if not groups:
        raise UserError(f"{folder}: no rollouts are stored there yet")
    kept = write_replay(folder, name, tables)
    _show(console, groups, options.show)
    console.print(f"every rollout is in {kept}", highlight=False, soft_wrap=True)
    return 0


def _show(console: Any, groups: list[ReplayedGroup], count: int) -> None:
    from rich.table import Table
    from rich.text import Text

    ranked = [group for group in groups if group.order_kept == group.order_kept]
    changed = sum(group.best_changed for group in ranked)
    mean = sum(group.order_kept for group in ranked) / max(1, len(ranked))
    console.print(
        f"{len(ranked)} groups; in {changed} another rollout would have been the best; "
        f"{mean:.0%} of the pairs keep their order"
    )
    for group in sorted(ranked, key=lambda group: group.order_kept)[:count]:
        title = Text(f"step {group.step}, {group.role}: {group.text}")
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("was", justify="right")
        table.add_column("would be", justify="right")
        table.add_column("rationale", overflow="fold")
        order = sorted(range(len(group.after)), key=lambda i: -group.after[i])
        for i in order:
            table.add_row(
                f"{group.before[i]:+.2f}", f"{group.after[i]:+.2f}", Text(group.rationales[i])
            )
        console.print(table)
