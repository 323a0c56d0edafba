"""Sections: every mistake at once, each with its key, and where it was written."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, Literal, Self

import pytest
from pydantic import Field, model_validator

from grace_rl.errors import UserError
from grace_rl.recipe.schema import FilePath, Items, Section, read_section, split_key
from grace_rl.recipe.source import read_source


class Inner(Section):
    rows: int = Field(1, ge=1)


class Outer(Section):
    recipe_key = "outer"

    share: float = Field(0.5, ge=0, lt=1)
    mode: Literal["soft", "hard"] = "soft"
    layers: Items[int] = (0, -1)
    inner: Inner = Inner()
    file: FilePath | None = None
    mixed: int | bool | str | None = None
    many: Items[Inner] = ()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.mode == "hard" and self.share:
            raise UserError("share: belongs to soft")
        return self


def keys(problems: list[str]) -> list[str]:
    return [".".join(str(part) for part in split_key(problem)[0]) for problem in problems]


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"share": float("nan")}, ["share"]),
        ({"share": float("inf")}, ["share"]),
        ({"share": True}, ["share"]),
        ({"share": "0.1"}, ["share"]),
        ({"share": 1}, ["share"]),
        ({"share": 10**5000}, ["share"]),
        ({"layers": [0.5, True]}, ["layers.0", "layers.1"]),
        ({"layers": 3}, ["layers"]),
        ({"inner": {"rows": 1.0}}, ["inner.rows"]),
        ({"inner": {"row": 1}}, ["inner.row"]),
        ({"inner": [1]}, ["inner"]),
        ({"mixed": 1.5}, ["mixed"]),
        ({"many": [{}, {"rows": 0}]}, ["many.1.rows"]),
        ({"mode": "hard"}, ["share"]),
        ({"mode": "x", "share": -1, "shar": 0}, ["share", "mode", "shar"]),
    ],
)
def test_every_mistake_is_told_once_with_its_key(values: dict[str, Any], wrong: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Outer(**values)
    assert sorted(keys(error.value.problems)) == sorted(f"outer.{key}" for key in wrong)
    with pytest.raises(UserError) as again:
        Outer.of(values)
    assert again.value.problems == error.value.problems


def test_mistakes_of_a_file_name_its_lines_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("outer:\n  share: 2\n  inner: {rows: 0}\n  sharre: 0\n")
    source = read_source(file, ["--outer.mode", "x"])
    assert read_section(Outer, source, ("outer",)) is None
    assert [problem.split(": ")[:2] for problem in source.problems] == [
        [f"{file}:2", "outer.share"],
        ["--outer.mode", source.problems[1].split(": ")[1]],
        [f"{file}:3", "outer.inner.rows"],
        [f"{file}:4", "outer.sharre"],
    ]


def test_a_section_is_a_value() -> None:
    one = Outer(layers=[3], inner={"rows": 2}, file="~/x")
    assert one.layers == (3,) and one.file == Path.home() / "x"
    assert one.given() == {"layers": [3], "inner": {"rows": 2}, "file": str(one.file)}
    assert Outer.of(one) is one and Outer.of(one.given()) == one
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert one.changed(share=0.25).given() == one.given() | {"share": 0.25}
    with pytest.raises(UserError):
        one.changed(share=1.0)


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean layers"):
        Outer(layer=[1])
