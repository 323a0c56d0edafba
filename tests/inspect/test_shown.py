"""What was written by others is shown as text: in HTML, in the terminal, in the file to send."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from grace_rl.cli import main
from grace_rl.commands.inspect import needs_extra
from grace_rl.errors import UserError
from grace_rl.inspect import Filter, Run, markup, views
from grace_rl.inspect.chart import Chart, Line
from grace_rl.inspect.csv_file import csv_text
from grace_rl.inspect.html_file import write_html
from grace_rl.inspect.terminal import show

CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
SHOWN = {
    "bdi", "span", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "ins", "del", "a",
    "div", "section", "article", "figure", "h1", "h2", "h3", "ul", "li", "dl", "dt", "dd", "svg",
    "g", "path", "line", "rect", "circle", "text", "title", "details", "summary", "main", "html",
    "head", "body", "meta", "style", "nav", "b",
}  # fmt: skip


EXTREMES = [
    [], [float("nan")], [1.0], [1e30, -1e30], [0.0, 0.0], [1e-300, 2e-300], [5e-324, 1e-323],
    [1e308, -1e308], [float("inf"), 1.0],
]  # fmt: skip
PARTS: Any = markup.TEMPLATES.get_template("parts.html.jinja").module


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def only_shows(html: str) -> Tags:
    """Nothing in it acts, loads or hides."""
    tags = parsed(html)
    assert {tag for tag, _ in tags.seen} <= SHOWN
    for tag, attributes in tags.seen:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        if tag == "a":
            assert attributes["href"].startswith(("/", "#"))  # within the page, within the file
    assert not CONTROLS.search(html.replace("\n", " "))
    return tags


def test_every_part_shows_hostile_text_as_text(written: Path) -> None:
    run = Run(written)
    hostile = run.rollouts(step=3)["rationale"].tolist()[:8]
    for text in hostile:
        for html in (
            PARTS.text(text),
            PARTS.tokens(markup.shaded([text, "x"], [0.5, -3.0]), text),
            PARTS.pieces(markup.differences("before", text)),
            PARTS.pieces(markup.differences(text, "after")),
            PARTS.table([{text: text}], {text: text}, text, {text: lambda row: "/a"}),
            PARTS.facts({text: text}),
            PARTS.mistakes([text]),
            PARTS.chart(Chart(text, [Line(text, [0, 1], [0.0, 1.0]), Line(text, [0], [1.0])])),
        ):
            only_shows(html)
    assert "<script>" in only_shows(PARTS.text(hostile[0])).text


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1", "＝1+1"])
def test_no_text_in_a_csv_is_a_formula(cell: str) -> None:
    table = pd.DataFrame({"rationale": [cell, "a\r=1", "x-1"], "advantage": [-0.5, 1.0, None]})
    rows = list(csv.reader(io.StringIO(csv_text(table), newline="")))
    assert rows == [
        ["rationale", "advantage"],
        [f"'{cell}", "-0.5"],
        ["a\r=1", "1.0"],  # in quotation marks, so no row begins inside
        ["x-1", ""],
    ]
    assert '"a\r=1"' in csv_text(table)
    assert csv_text(table.rename(columns={"rationale": cell})).startswith(("'", "\"'"))


def test_marks_say_what_changed() -> None:
    tags = parsed(PARTS.pieces(markup.differences("a b c", "a x c")))
    assert [tag for tag, _ in tags.seen] == ["del", "ins"] and tags.text == "a bx c"


def test_tokens_are_coloured_by_sign_and_size() -> None:
    kinds = [kind for kind, _, _ in markup.shaded(["a", "b", "c", "d"], [2.5, 0.1, -0.1, -9.0])]
    assert kinds == ["up5", "up1", "down1", "down5"]
    assert markup.shaded(["a"], None)[0][0] == ""


def test_colour_that_is_not_credit_is_named(written: Path) -> None:
    """One colour for all tokens says so; an anchor has none; own advantages are called that."""
    run = Run(written)
    plain = views.rollout_tokens(run, run.rollout(1, 0))
    anchor = views.rollout_tokens(run, run.rollout(1, 8))
    own = views.rollout_tokens(run, run.rollout(1, 0) | {"token_advantages": [0.5]})
    assert len({plain[1], anchor[1], own[1]}) == 3 and "not which words" in plain[1]


def test_charts_shade_the_healthy_range_mark_alarms_and_survive_anything() -> None:
    lines = [Line("x", list(range(5)), [0.1, float("nan"), 0.3, 0.9, 0.2])]
    html = PARTS.chart(Chart("t", lines, healthy=(None, 0.5), alarms=[3]))
    assert html.count('class="healthy"') == html.count('class="alarm"') == 1
    assert html.count("M") == 2  # the NaN breaks the curve
    many = Line("y", list(range(10_000)), [float(i == 777) for i in range(10_000)])
    assert "step 777: 1<" in PARTS.chart(Chart("t", [many]))
    for values in EXTREMES:
        line = Line("z", list(range(len(values))), values)
        PARTS.chart(Chart("t", [line], (0.0, 1.0)))


def test_no_two_curves_of_a_chart_look_alike(tmp_path: Path) -> None:
    """Three runs of eleven metrics in one chart, and three runs of one."""
    runs = []
    for name in "abc":
        (folder := tmp_path / name).mkdir()
        (folder / "status.json").write_text('{"grace_rl": "0", "status": "running"}')
        values = {f"time/{i}": i for i in range(11)} | {"step": 1, "entropy": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(values) + "\n")
        runs.append(Run(folder))
    for figures in views.charts(runs).values():
        for chart in figures:
            assert len({line.look for line in chart.lines}) == len(chart.lines)


def test_the_file_to_send_is_whole_and_asks_for_nothing(written: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert main(["inspect", str(written), "--html", str(file)]) == 0
    html = file.read_text(encoding="utf-8")
    tags = only_shows(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    assert not re.search(r"url\(|@import|https?://(?!evil)", html)
    assert "alarms/stale_engine" in tags.text and "<script>window.pwned" in tags.text
    assert "Soft tokens of written" in tags.text


def test_a_broken_file_is_told_everywhere(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1")
    file = tmp_path / "report.html"
    write_html([Run(run_folder)], Filter(), file)
    assert "the rollouts of step 2 are left out" in file.read_text(encoding="utf-8")
    assert "the rollouts of step 2 are left out" in printed(run_folder, "--step", "1")


def test_a_run_that_has_logged_and_stored_nothing(written: Path, tmp_path: Path) -> None:
    bare, file = tmp_path / "bare", tmp_path / "report.html"
    bare.mkdir()
    (bare / "status.json").write_text('{"grace_rl": "0", "status": "finished"}')
    (bare / "recipe.yaml").write_text("method: sft\nmax_steps: 9\n")
    write_html([Run(written), Run(bare)], Filter(), file)
    text = parsed(file.read_text(encoding="utf-8")).text
    assert "– of 9" in text and "lowest (written)" in text and "lowest (bare)" not in text
    assert "finished, step –" in printed(bare)


def test_the_file_holds_the_chosen_groups(written: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_html([Run(written)], Filter(step=1, text="fox"), file)
    html = file.read_text(encoding="utf-8")
    assert html.count("<article") == 2 and "step 1, rollout 1" in html
    assert "through training" in html


def printed(run: Path, *arguments: str, width: int = 150) -> str:
    from grace_rl.commands import inspect as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args([str(run), "--terminal", *arguments])
    names = ("step", "role", "text", "score", "group")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show([Run(run)], Filter.from_query(given), options, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [50, 150])
def test_the_terminal_shows_all_of_it_and_no_control_reaches_it(written: Path, width: int) -> None:
    views = {
        "overview": ([], "alarms/stale_engine"),
        "list": (["--step", "3"], "9 rollouts"),
        "groups": (["--groups", "--sort", "spread"], "12 groups"),
        "group": (["--step", "3", "--group", "1"], "advantage"),
        "rollout": (["--step", "3", "--row", "3"], "s_k"),
    }
    for arguments, expected in views.values():
        text = printed(written, *arguments, width=width)
        assert expected in text or width == 50  # folded there
        assert not CONTROLS.search(text)


def test_one_rollout_in_the_terminal_shows_controls_as_pictures(written: Path) -> None:
    assert "‹U+202E›" in printed(written, "--step", "3", "--row", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--terminal", "--row", "3"], "need one --step"),
        (["--terminal", "--step", "1", "--row", "99"], "has rollouts 0 to 8"),
        (["--terminal", "--step", "77", "--row", "0"], "no rollouts of step 77"),
        (["--terminal", "--step", "x"], "cannot read 'x'"),
        (["--terminal", "--limit", "0"], "must be at least 1"),
        (["--html", "/no/such/folder/x.html"], "there is no folder"),
        (["--text", "x"], "the page has fields"),
        (["--port", "99999"], "0 to 65535"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(
    written: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(written), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_of_the_extra_is_a_sentence() -> None:
    with (
        pytest.raises(UserError, match=r"needs duckdb: pip install 'grace-rl\[inspect\]'"),
        needs_extra(),
    ):
        raise ModuleNotFoundError("No module named 'duckdb'", name="duckdb")
    with pytest.raises(ModuleNotFoundError), needs_extra():  # ours, not the user's
        raise ModuleNotFoundError("No module named 'grace_rl.x'", name="grace_rl.x")


def test_without_the_extra_the_command_says_what_to_install(written: Path) -> None:
    code = (
        "import sys; sys.modules['duckdb'] = None\n"
        "from grace_rl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "inspect", str(written), "--terminal"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 2 and "pip install 'grace-rl[inspect]'" in result.stderr
