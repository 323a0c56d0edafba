"""The four steps on scenes with the cold start: order, resuming, sharding, and rows for `train`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from travelling import Travelling

from grace_rl.cli import main
from grace_rl.curate import run as run_module
from grace_rl.curate.run import Shard, curate
from grace_rl.data.rows import read_rows
from grace_rl.errors import UserError
from grace_rl.recipe.curation import FilterStep, GenerateStep, RateStep, load_curation
from grace_rl.recipe.rows import DataConfig

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "recipes/curate/scenes.yaml"
ENCODER = """
def encode(texts):
    from grace_rl.data.scenes import VALUES, read_facts
    facts = [(a, v) for a in VALUES for v in VALUES[a]]
    return [[0.1] + [float(f in read_facts(t).facts) for f in facts] for t in texts]
"""


def recipe(tmp_path: Path, *overrides: str):
    small = ["--dataset_rows", "24", "--chunk_rows", "8", "--generate.candidates", "2"]
    return load_curation(SCENES, [*small, "--output_dir", str(tmp_path / "out"), *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One finished curation, for the tests that only look."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.py").write_text(ENCODER)
    report = curate(recipe(folder, "--guide.model_name_or_path", f"{folder}/mine.py:encode"))
    return folder / "out", report


def test_filtering_raises_both_precisions_by_the_worlds_truth(whole):
    truth = whole[1].truth()
    assert truth["positives/after"] >= truth["positives/before"] > 0.8
    assert truth["negatives/after"] > truth["negatives/before"] + 0.1


def test_the_result_is_rows_that_train_reads(whole):
    folder, report = whole
    rows = read_rows(DataConfig(dataset_name=str(folder / "rows.jsonl")))
    assert len(rows) == report.kept > 0
    for row in rows:
        assert row["positive"] != row["negative"][0]
        assert row["score_positive"] - row["score_negative"] >= report.step.gamma
    done = json.loads((folder / "report.json").read_text())
    assert done["kept"] + sum(done["reasons"].values()) == done["rows"] == 24
    assert sum(map(sum, done["histogram"])) == 24
    assert (folder / "histogram.svg").read_text().startswith("<svg")
    guide = json.loads((folder / "guide/guide.json").read_text())
    assert 0 < guide["sigma"] <= 1


def lines(folder: Path) -> list[str]:
    return (folder / "out/rows.jsonl").read_text().splitlines()


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, whole):
    calls = []
    write = run_module.write_candidates

    def dies(*args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(run_module, "write_candidates", dies)
    with pytest.raises(KeyboardInterrupt):
        curate(recipe(tmp_path))
    curate(recipe(tmp_path))
    assert calls == [8, 8, 8, 8]  # the third chunk twice, the first two once
    assert lines(tmp_path) == (whole[0] / "rows.jsonl").read_text().splitlines()
    curate(recipe(tmp_path, "--filter.beta", "1.5"))  # other thresholds, no new work
    assert len(calls) == 4 and len(lines(tmp_path)) < 24


def test_shards_share_the_work_and_the_last_filters(tmp_path, whole):
    assert curate(recipe(tmp_path), Shard(1, 2)) is None
    assert sorted(p.name for p in (tmp_path / "out/rated").glob("*.jsonl")) == [
        "00000.jsonl",
        "00002.jsonl",
    ]
    assert curate(recipe(tmp_path), Shard(2, 2)) is not None
    assert lines(tmp_path) == (whole[0] / "rows.jsonl").read_text().splitlines()


def test_the_workers_of_a_cluster_give_the_same(tmp_path, whole):
    assert curate(recipe(tmp_path), cluster=Travelling()) is not None
    assert lines(tmp_path) == (whole[0] / "rows.jsonl").read_text().splitlines()


def test_shards_that_end_together_filter_one_after_the_other(tmp_path, monkeypatch, whole):
    shutil.copytree(whole[0], tmp_path / "out")
    inside, most = [], []
    filtering = run_module._Curation.filter

    def watched(self, step):
        inside.append(self)
        time.sleep(0.3)
        most.append(len(inside))
        report = filtering(self, step)
        inside.remove(self)
        return report

    monkeypatch.setattr(run_module._Curation, "filter", watched)
    model = ["--guide.model_name_or_path", f"{whole[0].parent}/mine.py:encode"]
    shards = [
        threading.Thread(target=curate, args=(recipe(tmp_path, *model), Shard(number, 2)))
        for number in (1, 2)
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert most == [1, 1]
    assert lines(tmp_path) == (whole[0] / "rows.jsonl").read_text().splitlines()


def test_other_settings_are_refused_or_start_over(tmp_path):
    file = tmp_path / "generate.yaml"
    file.write_text(SCENES.read_text().split("\nrate:")[0] + "\n")
    small = ["--dataset_rows", "8", "--generate.candidates", "0"]
    small += ["--output_dir", str(tmp_path / "out")]
    curate(load_curation(file, small))
    with pytest.raises(UserError, match="settings: generate.max_tokens was 32;"):
        curate(load_curation(file, [*small, "--generate.max_tokens", "16"]))
    curate(load_curation(file, [*small, "--generate.max_tokens", "16"]), overwrite=True)


def triplets(tmp_path: Path, judge: str = "return [5.0 * (a < b) for a, b in pairs]") -> list[str]:
    """Arguments of a curation of two given triplets by a judge of one's own."""
    rows = tmp_path / "rows.jsonl"
    texts = {"query": "b", "positive": "c", "negative": "a"}
    rows.write_text("".join(json.dumps(texts | {"id": n}) + "\n" for n in range(2)))
    (tmp_path / "judge.py").write_text(f"def judge(pairs):\n    {judge}\n")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"dataset_name: {rows}\noutput_dir: {tmp_path / 'out'}\n"
        f"rate: {{judge: '{tmp_path / 'judge.py'}:judge'}}\nfilter:\n"
    )
    return ["curate", str(file)]


@pytest.mark.parametrize("name", ["rows.jsonl", "judge.py"])
def test_work_on_other_inputs_of_the_same_name_and_size_is_not_continued(tmp_path, name, capsys):
    command = triplets(tmp_path)
    assert main(command) == 0
    before, changed = lines(tmp_path), tmp_path / name
    text = changed.read_text()
    changed.write_text(text.replace('"c"', '"d"').replace("a < b", "b < a"))
    assert changed.stat().st_size == len(text)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert ("rows was" in said) == (name == "rows.jsonl")
    assert ("rate.judge_content was" in said) == (name == "judge.py")
    assert lines(tmp_path) == before
    assert main([*command, "--overwrite"]) == 0
    assert lines(tmp_path) != before
    changed.write_text(text)


@pytest.mark.parametrize(
    ("judge", "options", "key"),
    [
        ("judge.py:nobody", "", "rate.judge"),
        ("gone.py:judge", "", "rate.judge"),
        ("judge.py:judge", ", options: {good: 1}", "rate.options.good"),
    ],
)
def test_a_judge_of_ones_own_is_checked_before_anything_is_generated(
    tmp_path, capsys, judge, options, key
):
    triplets(tmp_path)
    rate = f"rate: {{judge: '{tmp_path / judge}'{options}}}\n"
    file = tmp_path / "generate.yaml"
    file.write_text(SCENES.read_text().split("\nrate:")[0] + "\n" + rate)
    assert main(["curate", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"{key}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["settings.json", "00000.jsonl"])
def test_damaged_work_is_one_line_and_made_again(tmp_path, name, capsys):
    command = triplets(tmp_path)
    assert main(command) == 0
    before, damaged = lines(tmp_path), tmp_path / "out/rated" / name
    damaged.write_text(damaged.read_text()[:-9])
    capsys.readouterr()
    assert main([*command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(damaged.parent) in line
    damaged.unlink()
    assert main([*command, "--overwrite"]) == 0
    assert lines(tmp_path) == before


def test_what_a_killed_process_was_writing_goes(tmp_path):
    command = triplets(tmp_path)
    (tmp_path / "out/rated").mkdir(parents=True)
    left = [tmp_path / "out" / folder / ".x.gone-1.writing" for folder in (".", "rated")]
    for file in left:
        file.write_text("half")
    assert main(command) == 0
    assert not any(file.exists() for file in left)


def test_triplets_are_rated_and_filtered_without_generation(tmp_path):
    rows = [
        {"query": "a dog runs", "positive": "a dog moves", "negative": "a dog sleeps"},
        {"query": "a cat eats", "positive": "a cat sleeps", "negative": ["a cat feeds"]},
        {"query": "A cat eats!", "positive": "a cat feeds", "negative": ["a cat sleeps"]},
        {"query": "a dog runs", "positive": "the dog moves", "negative": "a dog sleeps"},
        {"query": "it rains", "positive": "it is wet", "negative": []},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "class Words:\n"
        "    def __init__(self, good: list[str]):\n"
        "        self.good = good\n"
        "    def __call__(self, pairs):\n"
        "        return [5.0 * any(w in b for w in self.good) for a, b in pairs]\n"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"dataset_name: {data}\noutput_dir: {tmp_path / 'out'}\n"
        f"rate:\n  judge: {tmp_path / 'judge.py'}:Words\n  options: {{good: [moves, feeds]}}\n"
        "filter:\n"
    )
    assert main(["curate", str(file)]) == 0
    kept = [json.loads(line) for line in lines(tmp_path)]
    assert [(row["positive"], row["swapped"]) for row in kept] == [
        ("a dog moves", False),
        ("a cat feeds", True),
        ("the dog moves", False),  # a text may have two positives
    ]
    reasons = json.loads((tmp_path / "out/report.json").read_text())["reasons"]
    assert reasons == {"duplicate": 1, "no negative": 1}


def test_every_mistake_is_named_with_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "dataset_name: scenes\n"
        "dataset_row: 5\n"
        "generate:\n"
        "  model_name_or_path: scenes\n"
        "  omega: 0.3\n"
        "  temprature: 1\n"
        "rate: {judge: best}\n"
        "filter: {rule: published-code, gamma: 1}\n"
        "guide: {}\n"
    )
    with pytest.raises(UserError) as error:
        load_curation(file)
    said = "\n".join(error.value.problems)
    assert f"{file}:2: dataset_row: unknown key; did you mean dataset_rows" in said
    assert f"{file}:6: generate.temprature: unknown key; did you mean temperature" in said
    assert f"{file}:7: rate.judge: must be one of digits, likelihood, encoder" in said
    assert f"{file}:8: filter.gamma: the published code has no such setting" in said
    assert f"{file}:9: guide.model_name_or_path: is missing" in said
    file.write_text("dataset_name: scenes\ngenerate:\n  model_name_or_path: scenes\n  omega: 0.3\n")
    with pytest.raises(UserError, match=r":4: generate.omega: vLLM cannot do contrastive"):
        load_curation(file)


def numbers() -> list[tuple[str, str]]:
    """Every number of a curation recipe, as step and key."""
    found = [("", "chunk_rows"), ("", "seed")]
    for step, kind in (("generate", GenerateStep), ("rate", RateStep), ("filter", FilterStep)):
        found += [
            (step, key)
            for key, field in kind.model_fields.items()
            if field.annotation in (int, float)
        ]
    return found


@pytest.mark.parametrize(("step", "key"), numbers())
@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "true", "some", "10000000000000000000"])
def test_a_number_that_is_none_or_out_of_range_is_named(step, key, value):
    name = ".".join(filter(None, (step, key)))
    with pytest.raises(UserError) as error:
        load_curation(SCENES, [f"--{name}={value}"])
    assert [problem.partition(":")[0] for problem in error.value.problems] == [f"--{name}"]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "one"])
def test_a_wrong_shard_is_the_users_mistake(shard, capsys):
    assert main(["curate", str(SCENES), "--shard", shard]) == 2
    assert "--shard" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_kill_loses_no_finished_chunk(tmp_path, whole):
    command = [sys.executable, "-m", "grace_rl", "curate", str(SCENES), "--dataset_rows", "24"]
    command += ["--chunk_rows", "8", "--generate.candidates", "2"]
    command += ["--output_dir", str(tmp_path / "out")]
    running = subprocess.Popen(command, cwd=ROOT)
    first = tmp_path / "out/generated/00000.jsonl"
    while running.poll() is None and not first.exists():
        pass
    running.kill()
    running.wait()
    written = first.stat().st_mtime_ns
    subprocess.run(command, cwd=ROOT, check=True)
    assert first.stat().st_mtime_ns == written
    assert lines(tmp_path) == (whole[0] / "rows.jsonl").read_text().splitlines()
