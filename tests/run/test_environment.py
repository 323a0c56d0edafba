"""The command line of a run, as its messages and environment.json give it."""

from __future__ import annotations

import sys

import pytest

from grace_rl.run.environment import command_line


def test_the_command_to_resume_leaves_overwrite_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["/env/bin/grace-rl", "train", "my recipe.yaml", "--overwrite", "--beta", "0.1"],
    )
    assert command_line(without=("--overwrite",)) == "grace-rl train 'my recipe.yaml' --beta 0.1"
    monkeypatch.setattr(sys, "argv", ["/lib/grace_rl/__main__.py", "train", "a.yaml"])
    assert command_line() == "python -m grace_rl train a.yaml"
