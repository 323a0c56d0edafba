"""grace-rl inspect RUN ... [--terminal | --html FILE] [--host ADDRESS] [--port N]"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grace_rl.errors import UserError

HELP = "look at runs: a local web page, the terminal, or one file to send to somebody"
RECIPE_OVERRIDES = False
PACKAGES = ("duckdb", "pandas", "starlette", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, runs/<name>")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--terminal", action="store_true", help="print instead of serving a page")
    how.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained file")
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
    chosen.add_argument("--row", type=int, help="one rollout; with --step")
    chosen.add_argument("--groups", action="store_true", help="list groups instead of rollouts")
    chosen.add_argument("--sort", help="a column, such as advantage or reward/length")
    chosen.add_argument("--descending", action="store_true", help="largest first")
    chosen.add_argument("--limit", type=int, default=20, help="how many (%(default)s)")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.run.screen import Screen

    with needs_extra():
        from grace_rl.inspect.filters import Filter
        from grace_rl.inspect.run import Run, distinct_names

        runs = [Run(path) for path in options.runs]
    distinct_names(runs)
    console = Screen()
    names = ("step", "role", "text", "score", "truncated", "empty", "example", "group")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    chosen = Filter.from_query(given)
    if options.limit < 1:
        raise UserError("--limit: must be at least 1")
    if options.terminal:
        from grace_rl.inspect.terminal import show

        show(runs, chosen, options, console)
        return 0
    if options.html is not None:
        from grace_rl.inspect.html_file import write_html

        write_html(runs, chosen, options.html, limit=options.limit)
        console.print(f"wrote {options.html}")
        return 0
    if given or options.row is not None:
        raise UserError("these choose rollouts for --terminal and --html; the page has fields")
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing leaves the machine
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the page has its own
    with needs_extra():
        from grace_rl.inspect.page.server import serve, warn_of

    if warning := warn_of(options.host):
        console.print(warning, style="yellow")

    def say(address: str) -> None:
        text = f"{', '.join(run.name for run in runs)}: {address} (Ctrl-C ends it)"
        console.print(text)

    serve(runs, options.host, options.port, say)
    return 0


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
