"""A recipe's rewards are found, checked and built; every mistake is reported, together."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from grace_rl.errors import UserError
from grace_rl.plugins import REWARDS, installed
from grace_rl.reward import RewardRuntime, RewardSpec, build_rewards, load_rewards
from grace_rl.reward.example import random_batch

PLUGIN = """
from typing import Literal

built = []


class Brevity:
    gates = True

    def __init__(self, scale: float, mode: Literal["words", "letters"] = "words",
                 limit: int | None = None, names: list[str] | None = None, strict: bool = False):
        if scale < 0:
            raise ValueError("scale must not be negative")
        built.append(self)
        self.scale = scale

    def __call__(self, batch):
        return [-self.scale * len(rationale) for rationale in batch.rationales]


def brevity(batch, scale: float = 1.0):
    return [-scale * len(rationale) for rationale in batch.rationales]


def words(completions, threshold: int = 1, **kwargs):
    return [float(len(completion.split()) > threshold) for completion in completions]


def two(batch, other):
    return [0.0] * len(batch)


class NoCall:
    pass


number = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def problems(specs, folder="."):
    with pytest.raises(UserError) as caught:
        load_rewards(specs, folder)
    return caught.value.problems


def test_a_class_and_a_function_from_a_file(folder):
    cls, function = load_rewards(
        [
            RewardSpec("mine.py:Brevity", weight=0.5, keywords={"scale": 2, "limit": None}),
            RewardSpec("mine.py:brevity", keywords={"scale": 3}),
        ],
        folder,
    )
    batch = random_batch(rows=1, samples=2)
    assert cls(batch, {}) == [-22.0] * 4
    assert function(batch, {}) == [-33.0] * 4
    assert (cls.label, cls.weight, cls.gates) == ("Brevity", 0.5, True)
    assert not function.gates
    assert cls.plugin.source == str(folder / "mine.py")


def test_a_dotted_path_and_an_object():
    from grace_rl_rewards.contrastive import Contrastive

    loaded = load_rewards(
        [
            "grace_rl_rewards.contrastive:Contrastive",
            Contrastive(temperature=0.2),
            "grace_rl_rewards.length:Length",
        ],
        ".",
    )
    assert [r.label for r in loaded] == ["Contrastive", "Contrastive_2", "Length"]
    assert [r.gates for r in loaded] == [False, False, True]
    assert load_rewards(loaded, ".") == loaded


def test_duplicates_get_their_own_labels(folder):
    specs = [
        RewardSpec("mine.py:words"),
        RewardSpec("mine.py:words", keywords={"threshold": 4}),
        RewardSpec("mine.py:words", label="words_2"),
    ]
    assert [r.label for r in load_rewards(specs, folder)] == ["words", "words_3", "words_2"]


def test_all_mistakes_of_all_rewards_come_together(folder):
    found = problems(
        [
            RewardSpec("mine.py:Brevity", keywords={"scal": 1.0, "mode": "lines", "strict": 1}),
            RewardSpec("mine.py:Brevty"),
            RewardSpec("nowhere.py:Thing"),
            RewardSpec("no_such_package.rewards:Thing", label="same"),
            RewardSpec("mine.py:words", label="same", keywords={"treshold": 3}),
            RewardSpec("mine.py:number"),
            RewardSpec(
                "mine.py:Brevity", keywords={"scale": True, "limit": 1.5, "names": ["a", 1]}
            ),
        ],
        folder,
    )
    text = "\n".join(found)
    assert "rewards[0].scal: unknown argument; did you mean scale?" in text
    assert "rewards[0].mode: must be one of" in text
    assert "rewards[0].strict: must be true or false, not 1" in text
    assert "rewards[0] (mine.py:Brevity): the argument 'scale' is missing" in text
    assert "rewards[1] (mine.py:Brevty): mine.py has no 'Brevty'; did you mean Brevity?" in text
    assert f"there is no file {folder / 'nowhere.py'}" in text
    assert "there is no module 'no_such_package.rewards'" in text
    assert "the label 'same' is used 2 times" in text
    assert "rewards[4].treshold: unknown argument; did you mean threshold?" in text
    assert "'number' is a int, not a class or a function" in text
    assert "rewards[6].scale: must be a number, not True" in text
    assert "rewards[6].limit: must be a whole number, not 1.5" in text
    assert "rewards[6].names.1: must be a text, not 1" in text


@pytest.mark.parametrize("weight", [10**400, math.inf, math.nan, "1", True, None])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(UserError, match=r"rewards\.weight: "):
        RewardSpec("length", weight=weight)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(UserError, match=r"rewards\.timeout: "):
        RewardSpec("length", timeout=seconds)


@pytest.mark.parametrize("wrong", [{"label": "a/b"}, {"label": ""}, {"on_error": "ignore"}])
def test_labels_and_choices_are_checked(wrong):
    (key,) = wrong
    with pytest.raises(UserError, match=rf"rewards\.{key}: "):
        RewardSpec("length", **wrong)


def test_loading_builds_nothing_and_a_reward_is_built_once(folder):
    (folder / "loud.py").write_text(
        "built = []\n\n\nclass Loud:\n    def __init__(self):\n        built.append(self)\n\n"
        "    def __call__(self, batch):\n        return [0.0] * len(batch)\n"
    )
    import dataclasses
    import sys

    [loaded] = load_rewards([RewardSpec("loud.py:Loud")], folder)
    [again] = load_rewards([loaded], folder)
    heavier = dataclasses.replace(again, weight=2.0)
    built = sys.modules[loaded.plugin.target.__module__].built
    assert built == []
    build_rewards([loaded, heavier])
    RewardRuntime([heavier])
    assert built == [loaded.function] == [heavier.function]


CHECKED = """
class Checked:
    def __init__(self, low: float = 0.0, high: float = 1.0):
        raise SystemExit("built")

    def __call__(self, batch):
        return [0.0] * len(batch)

    @staticmethod
    def check(low, high):
        problems = []
        if low > 5:
            problems.append(f"low must be below 5, not {low}")
        if low > high:
            problems.append("nothing is between low and high")
        if problems:
            raise ValueError("\\n".join(problems))


class Other(Checked):
    def __init__(self, words: int = 3):
        self.words = words


class Method:
    def __call__(self, batch):
        return self.check(batch)

    def check(self, batch):
        return [0.0] * len(batch)
"""


def test_a_class_checks_its_values_without_being_built(folder):
    (folder / "checked.py").write_text(CHECKED)
    [low, rest] = problems([RewardSpec("checked.py:Checked", keywords={"low": 6.0})], folder)
    assert low == "rewards[0].low: must be below 5, not 6.0"
    assert rest.startswith("rewards[0] (checked.py:Checked): nothing")
    fine = ["checked.py:Other", "checked.py:Checked", "checked.py:Method"]
    assert len(load_rewards(fine, folder)) == 3  # only a static one is the class's own check


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("contrastive", {"temperature": math.nan}),
        ("contrastive", {"temperature": 0.0}),
        ("contrastive", {"clip": 1.0}),
        ("hard_negative", {"temperature": -1}),
        ("grace_published", {"temperature": -1}),
        ("length", {"margin": 0}),
        ("length", {"margin": math.inf}),
        ("format", {"pattern": "("}),
        ("judge", {"model": "m", "retries": 11, "base_url": "ftp://x"}),
        ("reconstruction", {"clip": 0.0}),
        ("stepwise", {"potential": "contrastiv"}),
    ],
)
def test_wrong_values_of_shipped_rewards_are_told_without_building(name, keywords, monkeypatch):
    monkeypatch.setattr("grace_rl.plugins.Plugin.object", property(lambda plugin: 1 / 0))
    found = problems([RewardSpec(name, keywords=keywords)])
    assert all(problem.startswith("rewards[0]") for problem in found)
    places = "".join(found)
    assert any(f"rewards[0].{key}" in places or f"{key}" in places for key in keywords)


def test_building_and_importing_errors_name_the_line(folder):
    (folder / "broken.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    (folder / "typo.py").write_text("def f(:\n")
    found = problems([RewardSpec("broken.py:F"), RewardSpec("typo.py:f")], folder)
    assert f"RuntimeError: no licence ({folder / 'broken.py'}:2)" in found[0]
    assert f"SyntaxError: invalid syntax ({folder / 'typo.py'}:1)" in found[1]
    loaded = load_rewards([RewardSpec("mine.py:Brevity", keywords={"scale": -1.0})], folder)
    with pytest.raises(UserError) as caught:
        build_rewards(loaded)
    [problem] = caught.value.problems
    assert "cannot be built: ValueError: scale must not be negative" in problem
    assert f"({folder / 'mine.py'}:13)" in problem


def test_a_file_that_ends_the_program_is_a_mistake(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('bye')\n", encoding="utf-8")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0\n")
    [left] = problems([RewardSpec("leaves.py:x")], tmp_path)
    assert "SystemExit: bye" in left and "leaves.py:2" in left
    [null] = problems([RewardSpec("nul.py:x")], tmp_path)
    assert "null bytes" in null and "None" not in null


def test_a_wrong_signature_is_explained(folder):
    found = problems([RewardSpec("mine.py:two"), RewardSpec("mine.py:NoCall")], folder)
    assert "the argument 'other' is missing" in found[0]
    found = problems([RewardSpec("mine.py:NoCall")], folder)
    assert "NoCall has no __call__ method" in found[0]
    found = problems([lambda a, b: a, int], folder)
    assert "a reward is called with one RewardBatch" in found[0]
    assert "it is a class; give an object" in found[1]


class Points:
    """Entry points as importlib.metadata gives them."""

    def __init__(self, **values: str) -> None:
        from importlib.metadata import EntryPoint

        self.points = [EntryPoint(n, v, "grace_rl.rewards") for n, v in values.items()]
        self.names = {point.name for point in self.points}

    def __iter__(self) -> Any:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def test_entry_points(monkeypatch):
    points = Points(
        contrastive="grace_rl_rewards.contrastive:Contrastive",
        length="grace_rl_rewards.length:Length",
    )
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    assert installed(REWARDS)["length"] == "grace_rl_rewards.length:Length"
    spec = RewardSpec("contrastive", keywords={"temperature": 0.05})
    (loaded,) = load_rewards([spec], ".")
    assert loaded.label == "contrastive"
    assert loaded.function.temperature == 0.05
    assert (
        "did you mean contrastive?; installed: contrastive, length" in problems(["contrastve"])[0]
    )


def test_entry_points_that_lead_nowhere_or_to_two_places(monkeypatch):
    points = Points(gone="grace_rl_rewards.length:Lenght")
    points.points += Points(twice="grace_rl_rewards.length:Length").points
    points.points += Points(twice="grace_rl_rewards.format:Format").points
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    found = problems(["gone", "twice"])
    assert "rewards.length has no 'Lenght'; did you mean Length?" in found[0]
    assert "2 packages use this name; write one of grace_rl_rewards.format:Format, " in found[1]


def test_the_shipped_rewards_are_installed_under_their_names():
    names = ["contrastive", "grace_published", "consistency", "hard_negative", "length", "format"]
    assert set(names) <= set(installed(REWARDS))
    assert [reward.label for reward in load_rewards(names, ".")] == names


def test_an_uninstalled_project_is_recognised(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: Points())
    assert "pip install -e ." in problems(["contrastive"])[0]


def test_trl_functions_are_recognised_by_their_parameters():
    def native(batch):
        return [0.0] * len(batch)

    def plain(completions, **kwargs):
        return [float(len(c)) for c in completions]

    def everything(**kwargs):
        return kwargs

    async def waiting(prompts, completions, completion_ids):
        return completion_ids

    class Object:
        def __call__(self, prompts, completions, **columns):
            return prompts

    loaded = load_rewards(
        [native, plain, everything, waiting, Object(), functools.partial(plain, extra=1)], "."
    )
    assert [r.trl_parameters is None for r in loaded] == [True] + [False] * 5
    assert [r.label for r in loaded] == [
        "native", "plain", "everything", "waiting", "Object", "plain_2"
    ]  # fmt: skip
    batch = random_batch(rows=1, samples=2)
    seen = loaded[2](batch, {"trainer_state": "state"})
    assert seen["prompts"] == batch.prompts
    assert seen["completions"] == batch.rationales
    assert seen["completion_ids"] == batch.token_ids
    assert seen["trainer_state"] == "state"
    assert loaded[1](batch, {}) == [11.0] * 4


def test_a_bound_keyword_wins_over_a_column_and_a_missing_column_is_named(folder):
    import dataclasses

    (loaded,) = load_rewards([RewardSpec("mine.py:words", keywords={"threshold": 2})], folder)
    batch = dataclasses.replace(random_batch(rows=1, samples=2), columns={"threshold": [1] * 4})
    assert loaded(batch, {}) == [0.0] * 4

    def needs(completions, solution):
        return solution

    (loaded,) = load_rewards([needs], ".")
    with pytest.raises(ValueError, match="needs the columns solution; the rows have: threshold"):
        loaded(batch, {})


def test_annotations_that_do_not_resolve_are_not_judged(folder):
    (folder / "odd.py").write_text(
        "from __future__ import annotations\n"
        "class Odd:\n"
        "    def __init__(self, table: Missing = None): self.table = table\n"
        "    def __call__(self, batch): return [0.0] * len(batch)\n"
    )
    (loaded,) = load_rewards([RewardSpec("odd.py:Odd", keywords={"table": 3})], folder)
    assert loaded.function.table == 3
    assert (
        "rewards[0].tabel: unknown argument"
        in problems([RewardSpec("odd.py:Odd", keywords={"tabel": 3})], folder)[0]
    )


def test_torch_stays_in_float32_of_the_batch():
    (loaded,) = load_rewards(["grace_rl_rewards.consistency:Consistency"], ".")
    assert loaded(random_batch(), {}).dtype == torch.float32
