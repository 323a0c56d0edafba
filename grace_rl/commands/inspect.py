"""grace-rl inspect RUN ... [--terminal | --html FILE | --credit] [--host ADDRESS] [--port N]"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from grace_rl.errors import UserError

if TYPE_CHECKING:
    from grace_rl.inspect.filters import Filter
    from grace_rl.inspect.run import Run
    from grace_rl.run.screen import Screen

HELP = "look at runs: a local web page, the terminal, or one file to send to somebody"
RECIPE_OVERRIDES = False
PACKAGES = ("duckdb", "pandas", "starlette", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run directory, runs/<name>; a "
        "folder of runs; or an address such as s3://bucket/runs/<name>",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--terminal", action="store_true", help="print instead of serving a page")
    how.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained file")
    how.add_argument(
        "--credit",
        action="store_true",
        help="measure which words earned it in a step's groups (the last step, or --step), print "
        "it and keep it beside the run",
    )
    how.add_argument(
        "--export",
        metavar=("KIND", "PATH"),
        nargs=2,
        help="flagged rollouts as rows of `sft`, as preference `pairs`, or as a folder of `tests` "
        "for `rewards check --rollouts` and `replay`",
    )
    parser.add_argument(
        "--rewards",
        metavar="FILE",
        help="with --credit: a recipe, or YAML with its `rewards`; what it names is run. The "
        "default: the run's own rewards, where they are installed ones by name",
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="with --credit: all numbers")
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    page.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    chosen = parser.add_argument_group("which rollouts (--terminal and --html)")
    chosen.add_argument("--step", help="10, 10-50, 10- or -50")
    chosen.add_argument("--role", help="query, positive, ...")
    chosen.add_argument("--text", help="what text or rationale contains")
    chosen.add_argument("--score", help="such as 'contrastive >= 0.5, advantage < 0'")
    chosen.add_argument("--truncated", choices=["true", "false"], help="never ended, or ended")
    chosen.add_argument("--empty", choices=["true", "false"], help="nothing written, or something")
    chosen.add_argument("--example", help="row of the data set")
    chosen.add_argument("--group", help="one group, best to worst; with --step")
    chosen.add_argument("--word", help="a whole word of the rationale")
    chosen.add_argument("--pattern", help="repetition, copy, same, unsupported, empty or endless")
    chosen.add_argument("--row", type=int, help="one rollout; with --step")
    chosen.add_argument("--groups", action="store_true", help="list groups instead of rollouts")
    chosen.add_argument("--sort", help="a column, such as advantage or reward/length")
    chosen.add_argument("--descending", action="store_true", help="largest first")
    chosen.add_argument("--limit", type=int, default=20, help="how many (%(default)s)")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.run.screen import Screen

    # NumPy's matrices are small here: its threads would spin longer than they compute. torch has
    # its own. It is read once, when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with needs_extra():
        from grace_rl.inspect.filters import Filter
        from grace_rl.inspect.remote import open_runs

        runs = open_runs(options.runs)
    given = {field.name: getattr(options, field.name) or "" for field in fields(Filter)}
    chosen, console = Filter.from_query(given), Screen()
    if not options.credit and (options.rewards is not None or options.csv is not None):
        raise UserError("--rewards and --csv go with --credit")
    if options.limit < 1:
        raise UserError("--limit: must be at least 1")
    if options.terminal:
        from grace_rl.inspect.terminal import show

        show(runs, chosen, options, console)
    elif options.html is not None:
        from grace_rl.inspect.html_file import write_html

        write_html(runs, chosen, options.html, limit=options.limit)
        console.print(f"wrote {options.html}")
    elif options.export is not None:
        from grace_rl.inspect.notes import export

        if len(runs) > 1:
            raise UserError("--export takes one run")
        kind, path = options.export
        console.print(f"wrote {export(runs[0], kind, Path(path)):,} rows: {path}", markup=False)
    elif options.credit:
        _credit(runs, chosen, options, console)
    elif chosen != Filter() or options.row is not None:
        raise UserError("these choose rollouts for --terminal and --html; the page has fields")
    else:
        _page(runs, options, console)
    return 0


def _page(runs: list[Run], options: argparse.Namespace, console: Screen) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing leaves the machine
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the page has its own
    with needs_extra():
        from grace_rl.inspect.page.server import serve, warn_of

    if warning := warn_of(options.host):
        console.print(warning, style="yellow")
    names = ", ".join(run.name for run in runs)
    serve(
        runs,
        options.host,
        options.port,
        lambda address: console.print(f"{names}: {address} (Ctrl-C ends it)"),
    )


def _credit(runs: list[Run], chosen: Filter, options: argparse.Namespace, console: Screen) -> None:
    from grace_rl.inspect.credit import measurable_rewards
    from grace_rl.inspect.terminal import show_credit
    from grace_rl.recipe import read_rewards
    from grace_rl.reward import load_rewards

    for run in runs:
        if options.rewards is not None:
            path = Path(options.rewards)
            rewards, missing = load_rewards(read_rewards(path), path.parent), ""
        else:
            rewards, missing = measurable_rewards(run)
        if missing:
            console.print(missing, style="yellow", markup=False)
        show_credit(run, chosen, rewards, options, console)


@contextmanager
def needs_extra() -> Iterator[None]:
    """Within it a missing package of the extra becomes a sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise UserError(
            f"looking at runs needs {error.name}: pip install 'grace-rl[inspect]'"
        ) from None
