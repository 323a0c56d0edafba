"""One self-contained file with the overview and chosen rollouts, to send to somebody.

No script, no font and no request: the charts are SVG in the file, and a policy in its head forbids
the browser to load anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from grace_rl.errors import UserError
from grace_rl.inspect import sections
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import LOOK, differences, mistakes, number, plain, table, text
from grace_rl.inspect.run import Run
from grace_rl.run.files import write_text

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_html(runs: Sequence[Run], chosen: Filter, file: Path, limit: int = 20) -> None:
    """Write the file, whole.

    Args:
        runs: One or several.
        chosen: Which rollouts; their groups are shown whole. Without a choice, those of each run's
            last stored step.
        file: Where to.
        limit: Groups per run at most.

    Raises:
        UserError: The folder of the file does not exist, or the filter does not fit.
    """
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}")
    title = " and ".join(run.name for run in runs)
    parts = [f'<div class="pair">{"".join(map(sections.summary, runs))}</div>']
    parts += [mistakes(run.unreadable()) for run in runs]
    parts += map(sections.alarm_list, runs)
    parts.append(sections.charts(list(runs)))
    if any(run.steps() for run in runs):
        chart = sections.advantage_chart(list(runs))
        parts.append(f'<h2>Stored rollouts</h2><div class="cards">{chart}</div>')
    parts += [_chosen(run, chosen, limit) for run in runs]
    parts += map(sections.soft_token_words, runs)
    write_text(file, page(f"Runs: {title}" if len(runs) > 1 else f"Run: {title}", "".join(parts)))


def page(title: str, body: str) -> str:
    """A whole page around HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{plain(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>{style()}</style></head>
<body><main class="whole"><h1>{plain(title)}</h1>{body}</main></body></html>
"""


def style() -> str:
    """The page's look, dark where the reader's system is."""
    dark = re.search(r"body\.body--dark \{(.*?)\}", LOOK, re.DOTALL)
    if dark is None:
        raise RuntimeError("dark must be there")
    return f"{LOOK}@media (prefers-color-scheme: dark) {{ :root {{{dark[1]}}} }}"


def _chosen(run: Run, chosen: Filter, limit: int) -> str:
    steps = run.steps()
    if not steps:
        return ""
    if chosen == Filter():
        chosen = Filter(step=steps[-1])
    groups = run.groups(chosen, limit=limit)
    parts = [f"<h2>Chosen rollouts of {plain(run.name)}</h2>"]
    whole = run.count_groups(chosen)
    if whole > len(groups):
        parts.append(f'<p class="quiet small">the first {len(groups)} of {whole} groups</p>')
    for record in groups.to_dict("records"):
        step, group = int(record["step"]), int(record["group"])
        rows = run.group(step, group, ["token_ids", "token_advantages"])
        about = f"Step {step}, {plain(str(record['role']))} of row {record['example']}"
        parts.append(
            f'<section><h3>{text(record["text"])}</h3><p class="quiet small">{about}</p>'
            f"{sections.group_cards(run, rows)}{_history(run, str(record['text']))}</section>"
        )
    if groups.empty:
        parts.append('<p class="quiet">no rollouts fit</p>')
    return "".join(parts)


def _history(run: Run, content: str) -> str:
    """The same text at other steps, where it is stored more than once, as HTML."""
    stored = run.through_training(content)
    if len(stored) < 2:
        return ""
    rationales = [str(value) for value in stored["rationale"]]
    rows = [
        {"step": number(int(step)), "rationale": shown}
        for step, shown in zip(
            stored["step"],
            [text(rationales[0]), *map(differences, rationales, rationales[1:])],
            strict=True,
        )
    ]
    cells = dict.fromkeys(("step", "rationale"), lambda value, row: str(value))
    shown = table(rows, {"step": "step", "rationale": "best rationale"}, cells)
    return f'<details><summary>through training</summary><div class="wide">{shown}</div></details>'
