"""What a run learned: planted ways of gaming fire their own alarm, a healthy run none.

The runs game a reward in a known way and are written as stored rollouts; nothing is trained. Each
has twelve texts of the world of scenes at each of ten steps, with eight rollouts each. A healthy
one states more and more of the scene's facts; the others begin as it does, and turn to their game,
which pays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
