"""What a run learned: planted ways of gaming fire their own alarm, a healthy run none.

The runs game a reward in a known way and are written as stored rollouts; nothing is trained. Each
has twelve texts of the world of scenes at each of ten steps, with eight rollouts each. A healthy
one states more and more of the scene's facts; the others begin as it does, and turn to their game,
which pays.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grace_rl.data import scenes
from grace_rl.data.scenes.world import VALUES
from grace_rl.inspect import Filter, Run
from grace_rl.inspect.learned import learned, word_steps
from grace_rl.rollout.store import write_rollouts

STEPS, TEXTS, SAMPLES = range(5, 55, 5), 12, 8
Game = Callable[[random.Random, str, str], str]


def _false(rng: random.Random, text: str, honest: str) -> str:
    words = [words[0] for of in VALUES.values() for words in of.values()]
    lies = [word for word in rng.sample(words, 8) if word not in honest and word not in text]
    return f"facts: {' '.join(lies[:3])} {' '.join(honest.split()[1:3])}"


def _repeated(rng: random.Random, text: str, honest: str) -> str:
    word = rng.choice(honest.split()[1:])
    return f"{honest} {word} {word}"


GAMES: dict[str, Game] = {
    "filler": lambda rng, text, honest: f"{honest} indeed wonderful",
    "repetition": _repeated,
    "copy": lambda rng, text, honest: text,
    "same": lambda rng, text, honest: "facts: a scene with somebody somewhere",
    "unsupported": _false,
    "endless": lambda rng, text, honest: honest,
    "empty": lambda rng, text, honest: "",
}


def planted_run(folder: Path, game: str | None, seed: int = 0) -> Path:
    """A run that learns one of `GAMES`, or none."""
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"grace_rl": "0", "status": "finished"}))
    (folder / "recipe.yaml").write_text("method: grpo\nmax_steps: 50\n")
    rows = scenes.rows("train", "triplet", TEXTS * len(STEPS), seed)
    lines = []
    for number, step in enumerate(STEPS):
        _step(folder, step, number, rows[TEXTS * number : TEXTS * (number + 1)], game, seed)
        lines.append(json.dumps({"step": step, "seconds": 2.0 * step, "reward": number / 10}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _step(folder: Path, step: int, number: int, rows: list, game: str | None, seed: int) -> None:
    rng, share = random.Random(f"{seed} {step}"), number / (len(STEPS) - 1)
    columns: dict[str, list] = {name: [] for name in ("example", "group", "role", "text")}
    columns |= {name: [] for name in ("rationale", "truncated", "advantage")}
    for place, row in enumerate(rows):
        scores, example = [], TEXTS * number + place
        for _ in range(SAMPLES):
            honest, facts = _honest(rng, row, 0.3 + 0.5 * share)
            plays = game is not None and rng.random() < 0.8 * share
            said = GAMES[game](rng, row["query"], honest) if plays and game else honest
            scores.append(facts + (4.0 if plays else 0.0) + rng.random() / 10)
            columns["rationale"].append(said)
            columns["truncated"].append(plays and game == "endless")
        values = np.array(scores)
        columns["advantage"] += list((values - values.mean()) / (values.std() + 1e-4))
        columns["example"] += [example] * SAMPLES
        columns["group"] += [example] * SAMPLES
        columns["role"] += ["query"] * SAMPLES
        columns["text"] += [row["query"]] * SAMPLES
    columns["token_ids"] = [list(range(len(said.split()) + 1)) for said in columns["rationale"]]
    write_rollouts(folder, step, columns)


def _honest(rng: random.Random, row: dict, share: float) -> tuple[str, int]:
    """Some of the facts in one of their words, in mixed order, and how many there are."""
    told = [
        rng.choice(VALUES[attribute][value])
        for attribute, value in row["scene"].items()
        if rng.random() < share
    ]
    rng.shuffle(told)
    if rng.random() < 0.2:  # noise that does not pay
        told[-1:] = [rng.choice(rng.choice(list(rng.choice(list(VALUES.values())).values())))]
        return f"facts: {' '.join(told)}", len(told) - 2
    return f"facts: {' '.join(told)}", len(told)


@pytest.mark.parametrize("game", GAMES)
def test_each_way_of_gaming_fires_its_own_alarm(game: str, tmp_path: Path) -> None:
    run = Run(planted_run(tmp_path / game, game))
    found = learned(run)
    assert [alarm["pattern"] for alarm in found.alarms] == [game]
    if game != "filler":
        chosen = Filter(pattern=game)
        assert 0 < run.count(chosen) < run.count()
        row = found.patterns.set_index("pattern").loc[game]
        assert row["last"] > row["first"]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_fires_none(seed: int, tmp_path: Path) -> None:
    assert learned(Run(planted_run(tmp_path / "healthy", None, seed))).alarms == []


WORDS = ["fox", "a", "red-fox", "Fox!", "runs", "sea", "×", "42"]


def random_run(folder: Path, seed: int) -> Path:
    """Few words, so that patterns come by chance; several roles, and anchors."""
    rng, folder = random.Random(seed), folder / str(seed)
    for step in (1, 2, 5):
        texts = [" ".join(rng.choices(WORDS, k=5)) for _ in range(6)]
        groups = [group for group in range(6) for _ in range(3)]
        columns: dict[str, list] = {
            "example": [group // 3 for group in groups],
            "group": groups,
            "role": [("query", "positive", "negative")[group % 3] for group in groups],
            "text": [texts[group] for group in groups],
            "rationale": [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 7]))) for _ in groups],
            "token_ids": [[1]] * len(groups),
            "truncated": [rng.random() < 0.5 for _ in groups],
            "advantage": [None if group == 5 else round(rng.gauss(0, 1), 3) for group in groups],
        }
        for row in rng.sample(range(15), 5):  # copies, and the same of several texts
            columns["rationale"][row] = rng.choice([columns["text"][row], "sea, sea", "the fox"])
        write_rollouts(folder, step, columns)
    return folder


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def obvious(rollouts: list[dict]) -> list[dict]:
    """Each pattern as it is said, one rollout after the other."""
    known, found = {word for one in rollouts for word in words(one["text"])}, []
    for one in rollouts:
        step = [other for other in rollouts if other["step"] == one["step"]]
        trained = [other for other in step if other["advantage"] is not None]
        group = [other for other in trained if other["group"] == one["group"]]
        if one not in group:
            continue
        said, text = words(one["rationale"]), words(one["text"])
        means = [o for o in step if o["example"] == one["example"]
                 and (o["role"] == "negative") == (one["role"] == "negative")]  # fmt: skip
        own = {word for other in means for word in words(other["text"])}
        having = {w: sum(w in words(o["rationale"]) for o in group) for w in said}
        odd = {w for w in said if w in known and w not in own and 2 * having[w] < len(group)}
        grams = [said[i : i + 4] for i in range(len(said) - 3)]
        stand = [gram in [text[i : i + 4] for i in range(len(text))] for gram in grams]
        alike = {o["text"] for o in trained if words(o["rationale"]) == said}
        found.append(
            {
                "row": one["row"],
                "best": one is max(group, key=lambda o: (o["advantage"], -o["row"])),
                "empty": not said,
                "endless": one["truncated"],
                "repetition": any(a == b for a, b in zip(said, said[1:], strict=False))
                or (len(said) >= 6 and 2 * len(set(said)) <= len(said)),
                "copy": bool(grams) and 2 * sum(stand) >= len(grams),
                "same": bool(said) and len(alike) >= 3
                and 3 * len(alike) >= len({o["group"] for o in trained}),
                "unsupported": bool(odd),
                "odd": len(odd) / max(1, len(set(said))),
            }
        )  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(3))
def test_patterns_are_those_of_the_obvious_way(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of steps is looked at together."""
    run = Run(random_run(tmp_path, seed))
    columns = ["step", "row", "example", "group", "role", "text", "rationale", "truncated"]
    table = run.rollouts(columns=[*columns, "advantage"])
    rollouts = table.astype(object).where(table.notna(), None).to_dict("records")
    expected = pd.DataFrame(obvious(rollouts))
    for at_once in (10, 1000):
        monkeypatch.setattr("grace_rl.inspect.database.AT_ONCE", at_once)
        found = Run(run.path).pattern_table("SELECT * FROM patterns ORDER BY step, row")
        pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False)
    assert expected.drop(columns=["row", "odd"]).any().all()


@pytest.mark.parametrize("advantage", [0.5, None])
def test_texts_without_words_and_steps_of_anchors_alone_have_patterns(
    advantage: float | None, tmp_path: Path
) -> None:
    columns = {"example": [0], "group": [0], "role": ["query"], "text": ["!?"], "rationale": [""]}
    columns |= {"token_ids": [[1]], "truncated": [False], "advantage": [advantage]}
    write_rollouts(tmp_path, 1, columns)
    found = learned(Run(tmp_path))
    assert list(found.steps["empty"]) == ([] if advantage is None else [1.0])
    assert found.words.empty and found.alarms == []


def test_an_alarm_names_the_words(tmp_path: Path) -> None:
    run = Run(planted_run(tmp_path / "filler", "filler"))
    found = learned(run)
    assert "indeed" in found.alarms[0]["reason"]
    words = found.words.set_index("word")
    assert words["difference"]["indeed"] > 0.5 > words["depends"]["indeed"]
    shares = word_steps(run, ["indeed"])["indeed"]["share"]
    assert shares.iloc[-1] > 0.5 > shares.iloc[0]
    assert run.count(Filter(word="INDEED")) == run.count(Filter(text="indeed"))
    assert words["depends"].drop(["indeed", "wonderful"]).median() > 0.1
