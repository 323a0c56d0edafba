"""One self-contained file with the overview and chosen rollouts, to send to somebody.

No script, no font and no request: the charts are SVG in the file, and a policy in its head forbids
the browser to load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from grace_rl.errors import UserError
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import LOOK, render
from grace_rl.inspect.neighbours import nearest_by_rationale
from grace_rl.inspect.notes import notes
from grace_rl.inspect.run import Run
from grace_rl.inspect.views import gaming_rows, group_cards, history, overview, soft_token_tables
from grace_rl.run.files import write_text

NEAREST = 5  # texts beside a group


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
    title = f"Run{'s' if len(runs) > 1 else ''}: {' and '.join(run.name for run in runs)}"
    html = render(
        "file",
        title=title,
        look=Markup(LOOK),  # our own
        view=overview(runs),
        notes=[(run.name, notes(run).to_dict("records")) for run in runs],
        gaming=[(run.name, gaming_rows(run)) for run in runs],
        chosen=[_chosen(run, chosen, limit) for run in runs if run.steps()],
        soft=[(run.name, soft_token_tables(run)) for run in runs],
    )
    write_text(file, html)


def _chosen(run: Run, chosen: Filter, limit: int) -> dict[str, Any]:
    """The groups of a run that fit, each with its rollouts and the text's history."""
    if chosen == Filter():
        chosen = Filter(step=run.steps()[-1])
    groups = [
        record
        | {
            "cards": group_cards(run, int(record["step"]), int(record["group"])),
            "history": history(run, str(record["text"])),
            "near": _nearest(run, int(record["step"]), record),
        }
        for record in run.groups(chosen, limit=limit).to_dict("records")
    ]
    return {"name": run.name, "whole": run.count_groups(chosen), "groups": groups}


def _nearest(run: Run, step: int, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts nearest to the best rollout of a group; none where no vectors are stored."""
    row = int(run.group(step, int(group["group"]))["row"].iloc[0])
    try:
        return nearest_by_rationale(run, step, row).head(NEAREST).to_dict("records")
    except UserError:
        return []
