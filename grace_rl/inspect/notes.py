"""Flags, labels and notes on rollouts: kept beside the run, never in it, and what is made of them.

`<run>.inspect/notes/<reader>.jsonl` has a line for each time that a reader said something; the last
one of a rollout counts. Files of other readers merge by lying in the same folder. A rollout is told
by step and row, and by its words: once other rollouts are there, what was said is shown no more.
"""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from grace_rl.errors import UserError
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import write_rollouts
from grace_rl.run.files import write_text

FLAGS = ("", "good", "bad")
LONGEST = 4000  # characters of a note
KINDS = ("sft", "pairs", "tests")
COLUMNS = ["step", "row", "by", "flag", "label", "note", "at", "text", "rationale", "group"]


def reader_name() -> str:
    """Whose notes these are: the name of this machine's user, as a file may be called."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):
        name = ""
    return re.sub(r"[^\w.-]", "-", name) or "reader"


def write_note(run: Run, step: int, row: int, said: Mapping[str, Any], by: str = "") -> None:
    """Keep what a reader says of a rollout: `flag` (one of `FLAGS`), `label` and `note`.

    Raises:
        UserError: There is no such rollout, the flag is unknown, or nothing can be written there.
    """
    rollout = run.rollout(step, row)
    texts = {name: str(said.get(name) or "").strip() for name in ("flag", "label", "note")}
    problems = []
    if texts["flag"] not in FLAGS:
        problems.append(f"flag: must be good, bad or empty, not {texts['flag'][:40]!r}")
    if long := [name for name, text in texts.items() if len(text) > LONGEST]:
        problems.append(f"{', '.join(long)}: may have {LONGEST:,} characters")
    if problems:
        raise UserError(problems)
    line = {"step": step, "row": row, **texts, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
    line |= {"text": rollout["text"], "rationale": rollout["rationale"]}
    path = run.beside / "notes" / f"{by or reader_name()}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def notes(run: Run, step: int | None = None, row: int | None = None) -> pd.DataFrame:
    """What readers said, the last of each of them on each rollout: `COLUMNS`, by step and row.

    Lines that cannot be read, empty ones, and those on rollouts that are gone are left out.
    """
    last: dict[tuple[str, int, int], dict[str, Any]] = {}
    for path in sorted((run.beside / "notes").glob("*.jsonl")):
        for text in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
                key = path.stem, int(line["step"]), int(line["row"])
                line = {n: str(line.get(n, "")) for n in COLUMNS[3:9]} | {"by": path.stem}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue
            last[key] = {"step": key[1], "row": key[2], **line}
    wanted = [
        one
        for one in last.values()
        if step in (None, one["step"]) and row in (None, one["row"])
        if one["flag"] or one["label"] or one["note"]
    ]
    found = pd.DataFrame(wanted, columns=COLUMNS[:-1])
    if found.empty:
        return found.assign(group=[])
    names = ["step", "row", "rationale", "group"]
    there = pd.concat(
        run.rollouts(step=number, columns=names) for number in sorted(set(found["step"]))
    )
    found = found.merge(there, on=["step", "row", "rationale"])[COLUMNS]
    return found.sort_values(["step", "row", "by"]).reset_index(drop=True)


def flags(run: Run) -> dict[tuple[int, int], str]:
    """(step, row) -> `good` or `bad`, as most readers flagged it; ties are no flag."""
    found = notes(run)
    sums = (
        found["flag"].map({"good": 1, "bad": -1}).fillna(0).groupby([found["step"], found["row"]])
    )
    return {
        (int(step), int(row)): "good" if value > 0 else "bad"
        for (step, row), value in sums.sum().items()
        if value
    }


def sft_rows(run: Run) -> list[dict[str, str]]:
    """Rollouts that are flagged good, as rows of `method: sft`: `text` and `rationale`."""
    rollouts = [run.rollout(*key) for key, flag in flags(run).items() if flag == "good"]
    return [{"text": one["text"], "rationale": one["rationale"]} for one in rollouts]


def preference_pairs(run: Run) -> list[dict[str, str]]:
    """`prompt chosen rejected` for each good and bad rollout of one group; where only one kind is
    flagged, the worst (best) sibling by advantage without a flag stands for the other."""
    flagged, made = flags(run), []
    groups = {(step, run.rollout(step, row)["group"]) for step, row in flagged}
    for step, group in sorted(groups):
        rows = run.group(step, group).to_dict("records")
        by_flag: dict[str, list[Any]] = {flag: [] for flag in FLAGS}
        for rollout in rows:
            by_flag[flagged.get((step, rollout["row"]), "")].append(rollout)
        good = by_flag["good"] or by_flag[""][:1]
        bad = by_flag["bad"] or by_flag[""][-1:]
        made += [
            {"prompt": a["text"], "chosen": a["rationale"], "rejected": b["rationale"]}
            for a in good
            for b in bad
            if a["rationale"] != b["rationale"]
        ]
    return made


def export(run: Run, kind: str, path: Path) -> int:
    """Write flagged rollouts where they are used, and say how many.

    Args:
        run: The run.
        kind: `sft` and `pairs` are jsonl files; `tests` is a folder for `grace-rl rewards check
            NAME --rollouts` and `grace-rl replay`: the flagged rollouts' rows of data, whole.
        path: What to write; must not exist.

    Raises:
        UserError: The kind is unknown, nothing is flagged, or the path is there already.
    """
    if kind not in KINDS:
        raise UserError(f"--export: must be {', '.join(KINDS)}, not {kind!r}")
    if path.exists():
        raise UserError(f"{path}: is there already")
    if kind == "tests":
        return _export_tests(run, path)
    rows = sft_rows(run) if kind == "sft" else preference_pairs(run)
    if not rows:
        raise UserError(f"{run.path}: no rollout is flagged for {kind}; flag some on the page")
    write_text(path, jsonl(rows))
    return len(rows)


def jsonl(rows: list[dict[str, str]]) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _export_tests(run: Run, path: Path) -> int:
    flagged, count = flags(run), 0
    for step in sorted({step for step, _ in flagged}):
        table = run.step_table(step)
        rows = pa.array([row for of, row in flagged if of == step])
        examples = table["example"].take(rows).combine_chunks().unique()
        chosen = table.filter(pc.is_in(table["example"], value_set=examples))
        write_rollouts(path, step, chosen)
        count += len(chosen)
    if not count:
        raise UserError(f"{run.path}: no rollout is flagged; flag some on the page")
    write_text(path / "status.json", json.dumps({"grace_rl": "0", "status": "finished"}) + "\n")
    if (run.path / "recipe.yaml").is_file():
        write_text(path / "recipe.yaml", (run.path / "recipe.yaml").read_text(encoding="utf-8"))
    return count
