"""A damaged run is shown as far as it can be, and each damaged file is one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from grace_rl.cli import main
from grace_rl.inspect import Run
from grace_rl.inspect.health import alarms, held_out
from grace_rl.inspect.replays import replayed_groups

BOMB = "a0: &a0 [1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)
)
DEEP = "[" * 100_000
DAMAGE = {
    "metrics.jsonl": [b"\xff\xfe\n", b"{}\n[1]\n", b'{"step": "x"}\n', b'{"step": 1e400}\n',
                      DEEP.encode() + b"\n", b'{"step": 1, "entropy": }\n', b"\0\0\0\n"],
    "evaluation.json": [b"", b"{", b"[]", b'{"rows": 3}', b'{"rows": [{"name": 1}]}',
                        b'{"rows": [{"name": "a", "rationale": "none", "scores": []}]}',
                        DEEP.encode(), b"\xff"],
    "recipe.yaml": [b"a: [", b"- 1\n", b"\xff\xff", BOMB.encode(), DEEP.encode(), b"%" * 1_100_000],
    "status.json": [b"{", b"[]", b'{"grace_rl": 1, "status": []}'],
    "soft_tokens.jsonl": [b"{\n", b'{"step": 1}\n', b'{"step":1,"text":"","steps":[3]}\n'],
    "rollouts/step-000002.parquet": [b"", b"PAR1", b"PAR1" * 50],
}  # fmt: skip
CASES = [(name, content) for name, contents in DAMAGE.items() for content in contents]


@pytest.fixture(scope="module")
def whole(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "written"
    shutil.copytree(written, folder)
    return folder


@pytest.mark.parametrize(("name", "content"), CASES)
def test_every_damage_is_one_line_and_the_rest_is_shown(
    name: str, content: bytes, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = whole / name, None
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        run, file = Run(whole), tmp_path / "report.html"
        problems = run.problems()
        assert len(problems) == 1 and "\n" not in problems[0]
        assert re.search(re.escape(name) if "step-" not in name else "step 2", problems[0])
        assert main(["inspect", str(whole), "--terminal"]) == 0
        assert main(["inspect", str(whole), "--terminal", "--step", "1", "--row", "0"]) == 0
        assert main(["inspect", str(whole), "--html", str(file)]) == 0
        assert "Traceback" not in capsys.readouterr().err
        assert 'role="alert"' in file.read_text(encoding="utf-8")
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert Run(whole).problems() == []


def test_the_page_of_a_parquet_file_that_is_damaged(run_folder: Path) -> None:
    """Whole at its end, where the columns are listed, and damaged inside."""
    path = run_folder / "rollouts" / "step-000001.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    assert len(Run(run_folder).problems()) == 1
    assert main(["inspect", str(run_folder), "--terminal", "--step", "1", "--row", "0"]) == 2
    (run_folder / "replays").mkdir()
    shutil.copy(path, run_folder / "replays" / "new.parquet")
    with pytest.raises(ValueError, match="new.parquet: "):
        replayed_groups(Run(run_folder), "new")


def test_a_damaged_line_leaves_the_others(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join([lines[0], "{\n", *lines[1:]]))
    run = Run(run_folder)
    assert run.metrics()["step"].tolist() == [1, 2, 3]
    assert "metrics.jsonl: 1 damaged lines are left out: 2" in run.problems()[0]


EVALUATION = """{"rows": [
  {"name": "cold_start", "rationale": "none", "scores": {"scenes/recall_at_1": 0.1}},
  {"name": "cold_start", "rationale": "greedy",
   "scores": {"scenes/recall_at_1": 0.57, "scenes/coverage": 0.665, "scenes/precision": 1.0}},
  {"name": "grpo", "rationale": "greedy",
   "scores": {"scenes/recall_at_1": 0.28, "scenes/coverage": 0.36, "scenes/precision": 0.997}}
]}"""


def test_a_run_that_got_worse_than_its_start_is_not_called_healthy(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "evaluation.json").write_text(EVALUATION)
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1, "entropy": 0.5}\n')
    run, file = Run(run_folder), tmp_path / "report.html"
    assert {a.metric for a in alarms(run.metrics(), run.evaluation())} == {
        "scenes/recall_at_1", "scenes/coverage",
    }  # fmt: skip
    assert held_out(run.evaluation().iloc[:2]) == []  # nothing is known yet
    assert main(["inspect", str(run_folder), "--html", str(file)]) == 0
    html = file.read_text(encoding="utf-8")
    assert "scenes/coverage" in html and "left its healthy range" not in html
    assert main(["inspect", str(run_folder), "--terminal"]) == 0
    assert "0.665 for cold_start, now 0.360" in " ".join(capsys.readouterr().out.split())


def test_empty_rationales_are_an_alarm_and_visible(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], add_step: object
) -> None:
    assert callable(add_step)
    add_step(run_folder, 4, ["", " ", *[f"rollout {i}" for i in range(6)]])
    (run_folder / "metrics.jsonl").write_text('{"step": 4, "rollouts/empty": 0.25}\n')
    run = Run(run_folder)
    assert [a.metric for a in alarms(run.metrics())] == ["rollouts/empty"]
    assert run.count(empty=True) == 2
    file = tmp_path / "report.html"
    assert main(["inspect", str(run_folder), "--html", str(file)]) == 0
    assert "(empty)" in file.read_text(encoding="utf-8")
    assert main(["inspect", str(run_folder), "--terminal", "--empty", "true"]) == 0
    assert capsys.readouterr().out.count("(empty)") == 2


def test_a_run_that_has_not_begun_is_not_called_healthy(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "metrics.jsonl").write_text("")
    file = tmp_path / "report.html"
    assert main(["inspect", str(run_folder), "--html", str(file)]) == 0
    html = file.read_text(encoding="utf-8")
    assert "nothing is logged yet" in html and "left its healthy range" not in html
