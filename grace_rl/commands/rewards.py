"""grace-rl rewards list | show NAME | new FILE | check NAME"""

from __future__ import annotations

import argparse
import re
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from grace_rl.errors import UserError

HELP = "list, show, write and check rewards"
RECIPE_OVERRIDES = False

KINDS = ("contrastive", "text", "step", "remote")
PATIENCE = 30  # seconds before `check` says that it still waits
STEPS_TRIED = 2  # of a run's stored steps: the first and the last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="the installed rewards: name, what it pays for, needs, source")
    show = verbs.add_parser("show", help="what a reward does, its arguments and an example")
    show.add_argument("name", metavar="NAME", help="a name, package.module:Name or file.py:Name")
    new = verbs.add_parser("new", help="write a small working reward, with a test beside it")
    new.add_argument("file", metavar="FILE", help="such as my_reward.py; must not exist")
    new.add_argument("--kind", choices=KINDS, default="contrastive", help="what it looks at")
    check = verbs.add_parser("check", help="run a reward on a few rollouts and say what is wrong")
    check.add_argument("name", metavar="NAME", help="as for show; file.py alone lists what it has")
    check.add_argument("--arguments", metavar="YAML", default="{}", help="'{temperature: 0.1}'")
    check.add_argument("--timeout", metavar="SECONDS", type=float, help="limit of one call")
    check.add_argument("--rollouts", metavar="RUN", help="also on the rollouts of this run")
    check.add_argument(
        "--columns", metavar="YAML", default="{}", help="columns of the canned rows: '{answer: 7}'"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    verb: Any = {"list": _list, "show": _show, "new": _new, "check": _check}[options.verb]
    return int(verb(options))


def _list(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from grace_rl.plugins import REWARDS, docstring, installed
    from grace_rl.run.printing import say
    from grace_rl.run.screen import Screen

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "what it pays for", "requirements", "source"):
        table.add_column(title, overflow="fold")
    problems = []
    for name, place in sorted(installed(REWARDS).items()):
        try:
            summary, requirements = _summary(docstring(place))
        except UserError as error:
            problems += [f"{name} ({place}): {problem}" for problem in error.problems]
            continue
        table.add_row(name, *map(Text, (summary, requirements, place)))
    Screen().print(table)
    for problem in problems:
        say(problem, error=True)
    return 0


def _show(options: argparse.Namespace) -> int:
    import inspect

    from grace_rl.plugins import REWARDS, find
    from grace_rl.run.printing import say

    target = find(options.name, Path.cwd(), REWARDS)
    try:
        signature = inspect.signature(target, eval_str=True)
    except NameError:  # an annotation of something that is not there
        signature = inspect.signature(target)
    say(f"{options.name}{signature}\n{inspect.getsourcefile(inspect.unwrap(target))}\n")
    say(inspect.getdoc(target) or "It has no docstring.")
    return 0


def _new(options: argparse.Namespace) -> int:
    from grace_rl.run.files import write_text
    from grace_rl.run.printing import say

    path = Path(options.file)
    test = path.with_name(f"test_{path.name}")
    problems = []
    name = "".join(word.capitalize() for word in path.stem.split("_") if word)
    if path.suffix != ".py" or not path.stem.isidentifier() or not name.isidentifier():
        problems.append(f"{path}: give a Python file with a plain name, such as my_reward.py")
    problems += [
        f"{p}: exists already; remove it or choose another name" for p in (path, test) if p.exists()
    ]
    if not path.parent.is_dir():
        problems.append(f"{path}: there is no folder {path.parent}")
    if problems:
        raise UserError(problems)
    templates = Path(__file__).parents[1] / "reward" / "templates"
    for target, template in ((path, f"{options.kind}.py"), (test, f"test_{options.kind}.txt")):
        text = (templates / template).read_text(encoding="utf-8")
        write_text(target, text.replace("MyReward", name).replace("my_reward", path.stem))
    say(f"wrote {path} and {test}")
    say(f"edit it, then: grace-rl rewards check {path}:{name}")
    say(f"in a recipe beside it: rewards: [{{name: {path.name}:{name}}}]")
    return 0


def _check(options: argparse.Namespace) -> int:
    import dataclasses

    from rich.table import Table

    from grace_rl.reward import RewardSpec, build_rewards, load_rewards
    from grace_rl.reward.stored import stored_batch, stored_steps
    from grace_rl.reward.trial import canned_batches, try_reward
    from grace_rl.rollout.store import rollout_files
    from grace_rl.run.screen import Screen, add_findings

    arguments, columns = (_mapping(options, name) for name in ("arguments", "columns"))
    spec = RewardSpec(options.name, keywords=arguments, timeout=options.timeout)
    rewards = load_rewards([spec], Path.cwd())
    build_rewards(rewards)
    batches = {
        name: dataclasses.replace(
            batch, columns={key: [value] * len(batch) for key, value in columns.items()}
        )
        for name, batch in canned_batches().items()
    }
    if options.rollouts:
        steps = sorted(rollout_files(options.rollouts))
        chosen = sorted({steps[0], steps[-1]})[:STEPS_TRIED] if steps else None
        for stored in stored_steps(options.rollouts, chosen):
            batches[f"step {stored.step} of {options.rollouts}"] = stored_batch(
                stored, options.rollouts
            )
    about = (
        f"{options.name}: no answer for {PATIENCE} s; a call that waits needs a time limit (Ctrl-C)"
    )
    note = threading.Timer(PATIENCE, lambda: print(about, file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    findings = try_reward(rewards[0], batches)
    note.cancel()
    table = Table(box=None, pad_edge=False, show_header=False)
    add_findings(table, findings)
    console = Screen()
    console.print(table)
    errors = sum(finding.level == "problem" for finding in findings)
    rollouts = sum(map(len, batches.values()))
    console.print(
        f"{rollouts} rollouts of {', '.join(batches)}: {errors or 'no'} error{'s' * (errors != 1)}"
    )
    return 2 if errors else 0


def _mapping(options: argparse.Namespace, name: str) -> dict[str, Any]:
    text = getattr(options, name)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name}: {text!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"--{name}: must be a mapping such as '{{key: value}}', not {text!r}")
    return value


def _summary(text: str) -> tuple[str, str]:
    """First line of a docstring, and its `Requirements:` paragraph."""
    found = re.search(r"Requirements: (.*?)(?:\n\n|\Z)", text, re.DOTALL)
    requirements = " ".join(found[1].split()) if found else "not stated"
    return text.partition("\n")[0] or "has no docstring", requirements
