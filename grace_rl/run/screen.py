"""rich's console behind the door of `grace_rl.run.printing`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderHook,
    RenderResult,
)
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from grace_rl.errors import Finding
from grace_rl.run.printing import nobody_reads, shown

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]![/]", "problem": "[red]no[/]"}


class Screen(Console):
    """Tables, bars and texts are made safe as they are drawn.

    `print` takes a string as it is: no markup, no highlighting, no wrapping within a line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.push_render_hook(_Door())

    def print(self, *objects: Any, **options: Any) -> None:
        if objects and all(isinstance(one, str) for one in objects):
            options = {"markup": False, "highlight": False, "soft_wrap": True} | options
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """rich would end the program."""
        nobody_reads(sys.stderr if self.stderr else sys.stdout)


@contextmanager
def bar(
    console: Console,
    name: str,
    total: int | None,
    *,
    done: int = 0,
    unit: str = "rows",
    hidden: bool = False,
) -> Iterator[Callable[[int], None]]:
    """A bar over many rows, with how many of them a second; gives the function that moves it.

    Args:
        console: Where it is shown.
        name: What is done.
        total: How many there are; None: nobody knows.
        done: How many of them were done before.
        unit: What they are.
        hidden: Show nothing.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else self.unit)


def add_findings(table: Table, findings: Iterable[Finding]) -> None:
    """A row for each: how bad it is, what was looked at, what was found."""
    for finding in findings:
        table.add_row(MARKS[finding.level], finding.name, Text(finding.message))


class _Door(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Safe(one) for one in renderables]


class _Safe:
    """Draws another renderable, its texts made safe."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            if segment.control:
                yield segment
            else:
                yield Segment(shown(segment.text), segment.style)
